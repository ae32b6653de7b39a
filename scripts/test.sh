#!/usr/bin/env bash
# Every test that needs no GPU.
#   scripts/test.sh          quick tier, <= 12 min on 2 cores
#   scripts/test.sh --ci     + the tests marked "ci", <= 30 min
#   scripts/test.sh --full   everything
#   further arguments go to pytest:  scripts/test.sh tests/unit -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup_env.sh
select=(-m "not ci and not full")
case "${1:-}" in
  --ci) select=(-m "not full"); shift ;;
  --full) select=(); shift ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest "${select[@]}" "$@"
