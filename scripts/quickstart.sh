#!/usr/bin/env bash
# The main job end to end on this machine: data, a small Qwen2.5 model, fine-tuning, preference pairs, LPO and DPO, report.
# Nothing is downloaded beyond the Python packages. Output: outputs/quickstart (made anew each time).
#   scripts/quickstart.sh             about 6 minutes on 2 cores
#   QUICKSTART_SMALL=1 scripts/quickstart.sh    the same path with few steps, for tests: its numbers mean nothing
#   QUICKSTART_OUT=DIR scripts/quickstart.sh    another folder; one that an earlier quickstart made is removed, any other is refused
#   QUICKSTART_UNTIL=pairs scripts/quickstart.sh   stops after stage 4: what scripts/compare_losses.sh starts from
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
out=${QUICKSTART_OUT:-outputs/quickstart}
if [ -e "$out" ] && [ ! -f "$out/.quickstart" ]; then
  echo "[error] $out exists and no quickstart made it (no .quickstart in it): remove it, or set QUICKSTART_OUT to another folder" >&2
  exit 2
fi
case ${QUICKSTART_UNTIL:-report} in
  pairs | report) ;;
  *) echo "[error] QUICKSTART_UNTIL: '$QUICKSTART_UNTIL' is none of pairs, report" >&2; exit 2 ;;
esac
scripts/setup_env.sh
PYTHON=$ROOT/.venv/bin/python
unset N STAGES TEMPERATURE TOP_P SEED PP SLURM_NNODES # choices of other jobs in this shell are not ours
export DEVICE=cpu
export OMP_NUM_THREADS=1 PYTHONPATH=$ROOT PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PRECISION=fp32
export PATH=$ROOT/.venv/bin:$PATH

# The small model learns to add in about 400 steps; accuracy rises steeply then, so fine-tuning stops on validation accuracy.
problems=3000 heldout=500 first_steps=380 more_steps=40 rounds=6 enough=0.35 steps=150 pair_problems=1800
if [ "${QUICKSTART_SMALL:-0}" = 1 ]; then problems=300 heldout=40 first_steps=30 more_steps=10 rounds=1 enough=0 steps=6 pair_problems=120; fi
batch=24        # pairs a step
lpo_lr=5e-5     # the paper's 2e-7 is for 7B; DPO, which has no anchor, needs a lower rate to survive (see README)
dpo_lr=1e-5

rm -rf "$out"
mkdir -p "$out"
echo "made by scripts/quickstart.sh, which may remove this folder" >"$out/.quickstart"
if [ "${QUICKSTART_SMALL:-0}" = 1 ]; then echo small >>"$out/.quickstart"; fi
stage_started=$SECONDS
finished() { printf '%s\t%s\n' "$1" "$((SECONDS - stage_started))" >>"$out/seconds.tsv"; stage_started=$SECONDS; }
say() { printf '\n== %s\n' "$*"; }
accuracy() { "$PYTHON" scripts/greedy_accuracy.py --model "$1" --problems "$out/problems/$2.jsonl"; }
train() { OUTPUT=$out/$1 bash examples/qwen2_5/run_mcore_qwen_xpo.sh --seq-length 128 --lr-decay-style constant --lr-warmup-iters 5 "${@:2}"; }

say "1/6 problems: generated, seeded"
"$PYTHON" scripts/make_word_problems.py --output "$out/problems" --train "$problems" --heldout "$heldout"
finished problems

say "2/6 a Qwen2.5-architecture checkpoint with its own tokenizer"
"$PYTHON" scripts/make_tiny_qwen.py --input "$out/problems/train.jsonl" --output "$out/tiny"
finished checkpoint

say "3/6 fine-tuning on 2 processes (DP 2) until validation accuracy is at least $enough"
toolkit() { "$PYTHON" -m "toolkits.lpo_data_preprocessing.$1" "${@:2}"; }
toolkit normalise --input "$out/problems/train.jsonl" --output "$out/sft_data/records.jsonl"
toolkit build_pairs --kind sft --input "$out/sft_data/records.jsonl" --output "$out/sft_data/train" --tokenizer "$out/tiny" --max-length 128
target=$first_steps
for round in $(seq "$rounds"); do
  PRESET=sft NPROC_PER_NODE=2 train sft --hf-path "$out/tiny" --pair-data "$out/sft_data/train" --global-batch-size 48 --lr 2e-3 \
    --train-iters "$target"
  reached=$(accuracy "$out/sft/hf" valid)
  echo "greedy accuracy on the validation problems after $target steps: $reached"
  if [ "$round" = "$rounds" ] || awk "BEGIN { exit !($reached >= $enough) }"; then break; fi
  target=$((target + more_steps))
done
finished finetune

say "4/6 preference pairs: chosen = the worked answer, rejected = a sample of the fine-tuned model (Algorithm 1), reference with TP 2"
head -n "$pair_problems" "$out/problems/train.jsonl" >"$out/problems/pairs.jsonl"
export HF_PATH=$out/sft/hf MAX_NEW_TOKENS=64 MAX_LENGTH=128 TP=2 NPROC_PER_NODE=2
data_job=toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh
INPUT=$out/problems/pairs.jsonl OUTPUT=$out/pairs VALID_FRACTION=0.1 bash "$data_job"
INPUT=$out/problems/heldout.jsonl OUTPUT=$out/heldout STAGES="normalise candidates select build_pairs" bash "$data_job"
finished pairs
if [ "${QUICKSTART_UNTIL:-report}" = pairs ]; then exit 0; fi

say "5/6 LPO and DPO from the same weights on the same pairs, TP 2 with sequence parallelism"
common=(--hf-path "$HF_PATH" --pair-data "$out/pairs/train" --valid-pair-data "$out/pairs/valid" --eval-interval 50
  --global-batch-size "$batch" --train-iters "$steps")
PRESET=math train lpo "${common[@]}" --lr "$lpo_lr" --min-lr 0
finished lpo
PRESET=dpo train dpo "${common[@]}" --lr "$dpo_lr" --min-lr 0
finished dpo

say "6/6 report: measured with transformers from the exported checkpoints"
"$PYTHON" scripts/quickstart_report.py "$out"
finished report
echo "$out/report.json, $out/curves.png"
