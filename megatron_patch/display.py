"""What people look at: a page of ours is one file that fetches nothing, light or dark as the reader's system is.

All that comes from data passes through ``safe`` on its way into a page, and through ``visible`` on its way to a terminal; should something
slip through all the same, the page's content policy allows no script but its own (by hash) and no request at all.
"""

import base64
import hashlib
import html
from collections.abc import Iterable

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1d2125; --soft: #646c75; --line: #dfe2e6;
  --prompt: #f1f2f4; --chosen: #1668a8; --rejected: #b4501a; --end: #8a6a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --ink: #e4e7ea; --soft: #98a1ab; --line: #32383f;
  --prompt: #23282d; --chosen: #6db3ec; --rejected: #f0985c; --end: #dcb74a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2rem 0 .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; font-weight: normal; padding: .2rem 0 .2rem 1rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); } th:first-child { text-align: left; padding-left: 0; color: inherit; }
.soft, small { color: var(--soft); font-size: .85rem; }
"""


def safe(text: str) -> str:
    """Text for between tags or in a quoted attribute."""
    return html.escape(text)


def visible(text: str) -> str:
    """The text with control characters but newline and tab spelled out: data must not steer a terminal."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}" for c in text)


def document(title: str, body: str, *, style: str = "", script: str = "", pictures: bool = False) -> str:
    """The whole page: ``title`` is text, ``body`` is HTML, possibly with ``pictures`` in it; ``style`` comes after the common one."""
    policy = f"default-src 'none';{' img-src data:;' if pictures else ''} style-src 'unsafe-inline'"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
{body}{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def facts(of: Iterable[tuple[str, str]]) -> str:
    """Terms and their values, as a list; a term may stand there several times."""
    return f"<dl>{''.join(f'<dt>{safe(term)}</dt><dd>{safe(value)}</dd>' for term, value in of)}</dl>"
