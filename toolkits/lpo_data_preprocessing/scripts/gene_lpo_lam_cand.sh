#!/usr/bin/env bash
# Preference pairs with reference log-probs, from prompts and answers: normalise -> candidates -> select -> build_pairs -> reference_logps.
#   sbatch -N 4 toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh
#   INPUT=problems.jsonl HF_PATH=outputs/sft/hf OUTPUT=outputs/pairs bash toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh
# Choices by environment, or in a file of NAME=VALUE lines that CONFIG names (the environment wins):
#   INPUT  file, folder or glob of prompts and answers    HF_PATH  the fine-tuned model: samples the candidates, is the reference
#   OUTPUT folder of the stores                           STAGES   which of the five stages run (default all)
#   NORMALISE_FLAGS, SELECT_FLAGS  of these stages (--drop-invalid; default --method lppc; --method perturb needs no stage candidates)
#   N, TEMPERATURE, TOP_P, MAX_NEW_TOKENS  sampling (paper, Algorithm 1: temperature 1, top-p 1)
#   ENGINE transformers | vllm | openai    ENGINE_TP  GPUs of one vLLM    ENGINE_FLAGS  more of its flags (--base-url, --dtype...)
#   CANDIDATES_PYTHON  the engine's own    CANDIDATES_CONTAINER  an image that has it (pyxis or apptainer)
#   MAX_LENGTH tokens of prompt + response    VALID_FRACTION of the prompts goes to the validation store    SEED
#   TP, PP, DEVICE (auto, cuda, cpu), PRECISION, NPROC_PER_NODE: see scripts/launch.sh; flags after the name go to the reference pass
# Account, partition, nodes and GPUs are flags of sbatch. Started again (a requeued job), it goes on: a stage is skipped if its output
# is there and was made of the same input with the same options. Samples of another model, input or option need another OUTPUT.
#SBATCH --job-name=lpo-data --output=slurm-%x-%j.out --open-mode=append --requeue
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
set -euo pipefail

ROOT=$(dirname "${BASH_SOURCE[0]}")/../../.. # SLURM runs a copy in its spool, but knows where the file was
[ -f "$ROOT/scripts/launch.sh" ] || ROOT=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/gene_lpo_lam_cand\.sh\).*|\1|p')")/../../..
ROOT=$(cd "$ROOT" && pwd)
# shellcheck source-path=SCRIPTDIR source=../../../scripts/launch.sh
source "$ROOT/scripts/launch.sh"
[ "$PLAN" = 0 ] || refuse "--dry-run is for training: examples/qwen2_5/run_mcore_qwen_xpo.sh"
: "${INPUT:?set INPUT to a file, folder or glob of prompts and answers}" "${HF_PATH:?set HF_PATH to the fine-tuned Hugging Face checkpoint}"
OUTPUT=${OUTPUT:-$ROOT/outputs/pairs} STAGES=${STAGES:-normalise candidates select build_pairs reference_logps} SEED=${SEED:-1} N=${N:-1}
TEMPERATURE=${TEMPERATURE:-1.0} TOP_P=${TOP_P:-1.0} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-1024} ENGINE=${ENGINE:-transformers}
ENGINE_TP=${ENGINE_TP:-1} TP=${TP:-1} PP=${PP:-1} MAX_LENGTH=${MAX_LENGTH:-4096} VALID_FRACTION=${VALID_FRACTION:-0}
[[ $ENGINE_TP =~ ^[1-9][0-9]*$ && $ENGINE_TP -le $((GPUS > 0 ? GPUS : 1)) ]] || refuse "ENGINE_TP: '$ENGINE_TP' GPUs of a node that has $GPUS"
[[ $VALID_FRACTION =~ ^0?(\.[0-9]*)?$ ]] || refuse "VALID_FRACTION: '$VALID_FRACTION' is no fraction from 0 to below 1, such as 0.05"
! lies_in "$INPUT" "$OUTPUT" || refuse "OUTPUT: $OUTPUT lies in INPUT ($INPUT), and would be read as data"
shards=$((GPUS > 0 ? GPUS / ENGINE_TP : 1)) splits=(train) split_flags=() # shards of a node
[[ ! $VALID_FRACTION =~ [1-9] ]] || { splits+=(valid); split_flags=(--valid-fraction "$VALID_FRACTION" --valid-output "$OUTPUT/valid.jsonl"); }
[[ ${splits[1]:-} || ! -e $OUTPUT/valid.plan.json ]] || refuse "VALID_FRACTION: 0 puts prompts of $OUTPUT/valid into train: remove valid.*"
echo "[plan] $STAGES: $INPUT -> $OUTPUT, model $HF_PATH, seed $SEED, $NNODES node(s), $GPUS GPU(s) each"
echo "[plan] candidates: $N a prompt, temperature $TEMPERATURE, top-p $TOP_P, $MAX_NEW_TOKENS tokens; $ENGINE, $((NNODES * shards)) shard(s)"
echo "[plan] stores: $MAX_LENGTH tokens, validation $VALID_FRACTION; reference: TP $TP, PP $PP, $NPROC_PER_NODE process(es) a node"
read -ra normalise_flags <<<"${NORMALISE_FLAGS:-}"; read -ra select_flags <<<"${SELECT_FLAGS:---method lppc}"
stage() { supervise "$PYTHON" -m "toolkits.lpo_data_preprocessing.$1" --input "$2" --output "$3" "${@:4}"; }
for name in $STAGES; do
  case $name in
    normalise) stage normalise "$INPUT" "$OUTPUT/records.jsonl" "${normalise_flags[@]}" --update ;;
    candidates)
      read -ra more <<<"${ENGINE_FLAGS:-}"; in_image "${CANDIDATES_CONTAINER:-}"
      sharded "$shards" "${CANDIDATES_PYTHON:-$PYTHON}" -m toolkits.lpo_data_preprocessing.candidates --input "$OUTPUT/records.jsonl" \
        --output "$OUTPUT/candidates.jsonl" --model "$HF_PATH" --engine "$ENGINE" --engine-tensor-parallel "$ENGINE_TP" -n "$N" --seed "$SEED" \
        --temperature "$TEMPERATURE" --top-p "$TOP_P" --max-new-tokens "$MAX_NEW_TOKENS" --device "$DEVICE" --tokenizer "$HF_PATH" "${more[@]}"; in_image "" ;;
    select) [ -f "$OUTPUT/candidates.jsonl" ] && from=candidates || from=records
      stage select "$OUTPUT/$from.jsonl" "$OUTPUT/train.jsonl" "${select_flags[@]}" --seed "$SEED" "${split_flags[@]}" --update ;;
    build_pairs) for split in "${splits[@]}"; do
      stage build_pairs "$OUTPUT/$split.jsonl" "$OUTPUT/$split" --tokenizer "$HF_PATH" --max-length "$MAX_LENGTH" --update
    done ;;
    reference_logps)
      flags=(--hf-path "$HF_PATH" --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --seq-length "$MAX_LENGTH")
      [ "$TP" -gt 1 ] && flags+=(--sequence-parallel)
      launch reference "$OUTPUT" toolkits.lpo_data_preprocessing.reference_logps "${flags[@]}" --pair-data "${splits[@]/#/$OUTPUT/}" "$@" ;;
    *) refuse "STAGES: unknown stage '$name'" ;;
  esac
done
