"""One HTML page about a pair store: facts, lengths, and a sample to browse. All that comes from data passes through `_safe`."""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_patch.display import document, facts, safe, visible
from toolkits.lpo_data_preprocessing.store_view import Part, Sample, StoreView, histogram, quantiles

_STYLE = """
.lengths { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem 2.5rem; align-items: start; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; } svg line { stroke: var(--line); }
svg rect { fill: var(--chosen); }
.find { display: flex; gap: 1rem; align-items: center; position: sticky; top: 0; background: var(--paper); padding: .6rem 0; }
input { flex: 1; max-width: 24rem; font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .35rem .6rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem 1rem; margin: 0 0 1rem; }
header { display: flex; flex-wrap: wrap; gap: 0 1rem; margin-bottom: .6rem; }
.parts { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(18rem, 40%), 1fr)); gap: .8rem; }
.part { min-width: 0; border-left: 3px solid var(--line); padding-left: .75rem; }
.part.wide { grid-column: 1 / -1; }
.prompt pre { background: var(--prompt); padding: .5rem .7rem; border-radius: 6px; max-height: 16rem; overflow: auto; }
.chosen, .response, .text { border-color: var(--chosen); } .chosen b, .response b, .text b { color: var(--chosen); }
.rejected { border-color: var(--rejected); } .rejected b { color: var(--rejected); }
pre { margin: .25rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
.control { color: var(--soft); }
.end { color: var(--end); border: 1px solid; border-radius: 4px; padding: 0 .3em; font-size: 11px; white-space: nowrap; }
[hidden] { display: none; }
"""
_SCRIPT = """
const box = document.querySelector("input"), shown = document.querySelector("#shown"), all = [...document.querySelectorAll("article")];
const texts = all.map(article => article.textContent.toLowerCase());
box.addEventListener("input", () => {
  const wanted = box.value.toLowerCase();
  all.forEach((article, i) => { article.hidden = !texts[i].includes(wanted); });
  shown.textContent = all.filter(article => !article.hidden).length;
});
"""
_WIDTH, _HEIGHT, _BOTTOM, _TOP = 480, 190, 22, 16  # of the drawing, in its own units


def page(view: StoreView, samples: Sequence[Sample]) -> str:
    """The whole page, with these samples on it."""
    name = visible(str(view.store.prefix))
    body = f"""<h1>{safe(name)}: {len(view)} {view.unit}s</h1>
{facts((visible(term), visible(value)) for term, value in view.facts().items())}
<h2>Lengths</h2>
<div class="lengths">{_table(view.lengths())}{_drawing(*list(view.lengths().items())[-1], view.unit)}</div>
<h2>{_some(len(samples), len(view), view.unit)}</h2>
<div class="find"><input type="search" placeholder="Find text or id" aria-label="Find text or id">
<span class="soft"><span id="shown">{len(samples)}</span> shown</span></div>
{"".join(_article(sample, view.unit) for sample in samples)}
"""
    return document(name, body, style=_STYLE, script=_SCRIPT)


def _safe(text: str) -> str:
    return safe(visible(text))


def _some(shown: int, count: int, unit: str) -> str:
    return f"All {unit}s" if shown == count else f"{shown} of {count} {unit}s, drawn at random"


def _table(lengths: dict[str, np.ndarray]) -> str:
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("tokens", "min", "median", "p90", "max"))
    rows = (
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{value}</td>" for value in quantiles(values).values()) + "</tr>"
        for name, values in lengths.items()
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _drawing(name: str, lengths: np.ndarray, unit: str) -> str:
    """Bars over lengths; the axis has the first number of every bin that leaves room for it."""
    bins = histogram(lengths)
    step, most, floor = _WIDTH / len(bins.counts), max(bins.counts), _HEIGHT - _BOTTOM
    every = -(-len(bins.counts) // 8)
    parts = []
    for i, (label, count) in enumerate(zip(bins.labels(), bins.counts, strict=True)):
        height = count / most * (floor - _TOP)
        tip = f"<title>{label} tokens: {count} {unit}{'s' * (count != 1)}</title>"
        parts.append(f'<rect x="{i * step + 1:.1f}" y="{floor - height:.1f}" width="{step - 2:.1f}" height="{height:.1f}">{tip}</rect>')
        if i % every == 0:
            parts.append(f'<text x="{i * step + 1:.1f}" y="{_HEIGHT - 6}">{bins.first + i * bins.width}</text>')
        if count == most and count not in bins.counts[:i]:
            parts.append(f'<text x="{(i + 0.5) * step:.1f}" y="{_TOP - 4}" text-anchor="middle">{count}</text>')
    axis = f'<line x1="0" x2="{_WIDTH}" y1="{floor}" y2="{floor}"/>'
    about = f"{unit}s by length in tokens ({name})"
    return f"""<div><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{about}">{axis}{"".join(parts)}</svg>
<small>{about}</small></div>"""


def _article(sample: Sample, unit: str) -> str:
    spans = "".join(f'<span class="soft">{_safe(item)}</span>' for item in sample.about())
    parts = "".join(map(_part, sample.parts))
    return f'<article><header><b>{unit} {sample.number}</b>{spans}</header><div class="parts">{parts}</div></article>\n'


def _part(part: Part) -> str:
    wide = "" if part.name in ("chosen", "rejected") else " wide"
    return f"""<section class="part {part.name}{wide}"><b>{part.name}</b> <span class="soft">{" · ".join(part.measures())}</span>
<pre>
{"".join(_body(part))}</pre></section>"""


def _body(part: Part) -> Iterator[str]:
    for segment in part.segments:
        yield f'<span class="control">{_safe(segment.text)}</span>' if segment.control else _safe(segment.text)
    if part.scored:
        yield f' <span class="end">{_safe(part.end) if part.end else "cut: no end token"}</span>'
