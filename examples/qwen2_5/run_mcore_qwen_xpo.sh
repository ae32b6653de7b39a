#!/usr/bin/env bash
# Fine-tune or preference-optimise a Qwen2.5-class model, on one machine or on a cluster, on GPUs or on the CPU.
#   sbatch -N 4 examples/qwen2_5/run_mcore_qwen_xpo.sh --hf-path DIR --pair-data PREFIX --epochs 1
#   bash examples/qwen2_5/run_mcore_qwen_xpo.sh --hf-path DIR --pair-data PREFIX --train-iters 100
# Every argument is a flag of train_qwen.py (ours: --help, losses: --help-losses, and all of Megatron's); later flags win over the
# preset. Choices by environment:
#   PRESET  general | math | tts | asr | dpo | sft, or a file of flags     OUTPUT  folder for checkpoints, logs and the exported model
#   TP, PP  tensor- and pipeline-parallel sizes                            NPROC_PER_NODE, PRECISION, ...: see scripts/launch.sh
#   CONTAINER  an image to run in, by pyxis or apptainer (PYTHON: the one in it)
# With --dry-run nothing is started: layout, steps and memory of a job on NNODES nodes with GPU_MEMORY_GB a GPU, or what would fit there.
#SBATCH --job-name=xpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

ROOT=$(dirname "${BASH_SOURCE[0]}")/../.. # SLURM runs a copy in its spool, but knows where the file was
[ -f "$ROOT/scripts/launch.sh" ] || ROOT=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/run_mcore_qwen_xpo\.sh\).*|\1|p')")/../..
ROOT=$(cd "$ROOT" && pwd)
export ON_TERM=${ON_TERM:-USR1} # SIGTERM too is a reason to save
# shellcheck source-path=SCRIPTDIR source=../../scripts/launch.sh
source "$ROOT/scripts/launch.sh"

PRESET=${PRESET:-math}
OUTPUT=${OUTPUT:-$ROOT/outputs/$(basename "$PRESET" .args)}
TP=${TP:-1}
PP=${PP:-1}
[[ $TP =~ ^[1-9][0-9]*$ && $PP =~ ^[1-9][0-9]*$ ]] || refuse "TP, PP: '$TP' and '$PP' are not both numbers"
[[ " $* " != *" --save"[\ =]* ]] || refuse "--save: say OUTPUT=DIR, where this script looks for how the run ended"
[ -f "$PRESET" ] || PRESET=$ROOT/examples/qwen2_5/presets/$PRESET.args

# A requeued or repeated job goes on from the checkpoints that it finds there.
flags=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --save "$OUTPUT" --load "$OUTPUT" --export-hf "$OUTPUT/hf")
[ "$TP" -gt 1 ] && flags+=(--sequence-parallel)
[ "$GPUS" -gt 0 ] && flags+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)

in_image "${CONTAINER:-}"
launch train "$OUTPUT" examples/qwen2_5/train_qwen.py "@$PRESET" "${flags[@]}" "$@"
