#!/usr/bin/env bash
# Several preference losses from the same weights on the same pairs: trained, measured, and set side by side with intervals over seeds.
#   scripts/compare_losses.sh examples/qwen2_5/comparisons/r2.toml
# Writes outputs/comparisons/NAME/comparison.md, comparison.json, curves.png and accuracy.png. Started again, it goes on with what is
# missing; a run is repeated only if something in its configuration changed, and not if it diverged (its learning rate is out then).
# The quickstart's model and pairs are made when they are missing (QUICKSTART_SMALL=1: few and meaningless, for tests).
# Choices by environment:
#   JOBS         trainings at a time (default: one a CPU core; one on a machine with GPUs, where the launcher takes them all)
#   COMPARE_OUT  another folder
#   TP, PP, NPROC_PER_NODE, PRECISION, DEVICE: of each training, see scripts/launch.sh
set -euo pipefail
[ $# = 1 ] || { echo "[error] give one file: scripts/compare_losses.sh FILE.toml" >&2; exit 2; }
file=$(realpath -m -- "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
file=$(realpath -m --relative-base="$ROOT" -- "$file")
scripts/setup_env.sh
export HF_HUB_OFFLINE=1
unset N STAGES TEMPERATURE TOP_P SEED INPUT HF_PATH VALID_FRACTION SLURM_NNODES # choices of other jobs in this shell are not ours
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$ROOT/scripts/launch.sh"
export PATH=$ROOT/.venv/bin:$PATH
default=1
[ "$GPUS" -gt 0 ] || default=$(env -u OMP_NUM_THREADS nproc) # nproc would answer with that variable
JOBS=${JOBS:-$default}
exec "$PYTHON" -m toolkits.loss_comparison "$file" --out "${COMPARE_OUT:-outputs/comparisons/$(basename "$file" .toml)}" --jobs "$JOBS"
