# shellcheck shell=bash
# The mechanics every job shares; sourced by the run scripts, which hold the choices. Needs $ROOT, the repository.
#   launch NAME OUTPUT ENTRY FLAGS...   check the flags in one process, then run ENTRY on every device, under SLURM or without
# Environment: NPROC_PER_NODE (default: the GPUs of a node, else 1), MASTER_PORT, PRECISION (bf16 on GPUs, fp32 on the CPU).
# The terminal shows lines that start with "[" (one a stage, a step or an error); everything goes to OUTPUT/logs/NAME.log.
# Exit code: 0 finished, 2 a user's error, 75 preempted (please requeue), 1 anything else.

PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export LPO_TRACEBACK=1 # for the log; the terminal shows the one line
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
[ -n "${PYTHONWARNINGS:-}" ] || export PYTHONWARNINGS=ignore

gpu_count() { if command -v nvidia-smi >/dev/null 2>&1; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; else echo 0; fi; }

GPUS=$(gpu_count)
NNODES=${SLURM_NNODES:-1}
NPROC_PER_NODE=${NPROC_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
PRECISION=${PRECISION:-$([ "$GPUS" -gt 0 ] && echo bf16 || echo fp32)}

# Lines for the terminal: ours only, steps as one progress bar.
show() { "$PYTHON" "$ROOT/scripts/terminal.py"; }

# One line a user's error before anything is started. WORLD_SIZE is what the job will have; nothing talks to anybody yet.
check() {
  local log=$1; shift
  RANK=0 WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) LOCAL_RANK=0 "$PYTHON" "$@" --check >"$log" 2>&1 && return 0
  local code=$?
  show <"$log"
  grep -q '^\[error\]' "$log" || tail -n 20 "$log" >&2
  return "$code"
}

run_torch() {
  local rendezvous=(--standalone)
  if [ "$NNODES" -gt 1 ]; then
    local head; head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID"
      --rdzv-endpoint "$head:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}")
    srun --ntasks="$NNODES" --ntasks-per-node=1 "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" "$@"
  else
    "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" "$@"
  fi
}

launch() {
  local name=$1 output=$2 entry=$3; shift 3
  local log=$output/logs/$name.log code=0 run=("$ROOT/$entry") flags=("$@")
  [[ $entry == *.py ]] || run=(-m "$entry")
  [ "$PRECISION" = fp32 ] || flags+=("--$PRECISION")
  mkdir -p "$output/logs"
  check "$log" "${run[@]}" "${flags[@]}" || return $?
  trap '' USR1 # handled by Megatron, which saves at the next step; torchrun and this shell must not die of it
  run_torch "${run[@]}" "${flags[@]}" > >(tee "$log" | show) 2>&1 || code=$?
  wait # for the last lines
  if [ "$code" != 0 ]; then
    grep -q '^\[error\]' "$log" && return 2
    { echo "[failed] $name: exit code $code, log $log"; grep -m 1 -E 'Error|exitcode' "$log"; tail -n 20 "$log"; } >&2
    return 1
  fi
  local state=$output/run_state.json
  if [ -f "$state" ] && grep -q '"preempted"' "$state"; then return 75; fi
}
