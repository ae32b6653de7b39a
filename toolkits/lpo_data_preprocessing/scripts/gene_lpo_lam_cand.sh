#!/usr/bin/env bash
# Preference pairs with reference log-probs, from prompts and answers: normalise -> candidates -> select -> build_pairs -> reference_logps.
#   sbatch toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh
#   INPUT=problems.jsonl HF_PATH=outputs/sft/hf OUTPUT=outputs/pairs bash toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh
# Choices by environment:
#   INPUT  JSONL of prompts and answers        HF_PATH  the fine-tuned model: samples the candidates, is the reference
#   OUTPUT folder of the stores                STAGES   which of the five stages run (default all)
#   N, TEMPERATURE, TOP_P, MAX_NEW_TOKENS      sampling (paper, Algorithm 1: temperature 1, top-p 1)
#   MAX_LENGTH tokens of prompt + response     VALID_FRACTION of the prompts goes to the validation store
#   SEED, TP, PP, DEVICE (auto, cuda, cpu); flags after the script's name go to the reference pass
# Started again (a requeued job), it goes on: candidates and reference_logps take up what is finished, the other stages are quick and
# make the same bytes again. Another model, input or sampling option needs another OUTPUT.
#SBATCH --job-name=lpo-data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

for ROOT in "$(dirname "${BASH_SOURCE[0]}")/../../.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.." "${SLURM_SUBMIT_DIR:-.}/../../.."; do
  [ -f "$ROOT/scripts/launch.sh" ] && break
done
ROOT=$(cd "$ROOT" && pwd)
# shellcheck source-path=SCRIPTDIR source=../../../scripts/launch.sh
source "$ROOT/scripts/launch.sh"

: "${INPUT:?set INPUT to a JSONL file of prompts and answers}" "${HF_PATH:?set HF_PATH to the fine-tuned Hugging Face checkpoint}"
OUTPUT=${OUTPUT:-$ROOT/outputs/pairs}
STAGES=${STAGES:-normalise candidates select build_pairs reference_logps}
TP=${TP:-1} PP=${PP:-1} MAX_LENGTH=${MAX_LENGTH:-4096} VALID_FRACTION=${VALID_FRACTION:-0}
mkdir -p "$OUTPUT"

splits=(train)
split_flags=()
if [ "$VALID_FRACTION" != 0 ]; then
  splits+=(valid)
  split_flags=(--valid-fraction "$VALID_FRACTION" --valid-output "$OUTPUT/valid.jsonl")
fi
stage() { "$PYTHON" -m "toolkits.lpo_data_preprocessing.$1" "${@:2}"; }

for name in $STAGES; do
  case $name in
    normalise) stage normalise --input "$INPUT" --output "$OUTPUT/records.jsonl" --overwrite ;;
    candidates) stage candidates --input "$OUTPUT/records.jsonl" --output "$OUTPUT/candidates.jsonl" --model "$HF_PATH" -n "${N:-1}" \
      --temperature "${TEMPERATURE:-1.0}" --top-p "${TOP_P:-1.0}" --max-new-tokens "${MAX_NEW_TOKENS:-1024}" \
      --seed "${SEED:-1}" --device "$DEVICE" ;;
    select) stage select --method lppc --input "$OUTPUT/candidates.jsonl" --output "$OUTPUT/train.jsonl" --seed "${SEED:-1}" \
      "${split_flags[@]}" --overwrite ;;
    build_pairs) for split in "${splits[@]}"; do
      stage build_pairs --input "$OUTPUT/$split.jsonl" --output "$OUTPUT/$split" --tokenizer "$HF_PATH" --max-length "$MAX_LENGTH" --overwrite
    done ;;
    reference_logps)
      flags=(--hf-path "$HF_PATH" --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --seq-length "$MAX_LENGTH")
      [ "$TP" -gt 1 ] && flags+=(--sequence-parallel)
      launch reference "$OUTPUT" toolkits.lpo_data_preprocessing.reference_logps "${flags[@]}" --pair-data "${splits[@]/#/$OUTPUT/}" "$@" ;;
    *) echo "[error] STAGES: unknown stage '$name'" >&2; exit 2 ;;
  esac
done
