# shellcheck shell=bash
# The mechanics every job shares; sourced by the run scripts, which hold the choices. Needs $ROOT, the repository.
#   launch NAME OUTPUT ENTRY FLAGS...   check the flags in one process, then run ENTRY on every device, under SLURM or without
#   spread PER_NODE COMMAND...          COMMAND PER_NODE times on every node, numbered by SLURM_PROCID or RANK
#   sharded PER_NODE PYTHON WORDS...    a stage that knows --shard and --merge, spread
#   supervise COMMAND...                COMMAND, with SIGTERM to this shell passed on to it
#   refuse MESSAGE                      a user's error: one line, exit code 2
#   in_image IMAGE                      from here on processes run in it, by pyxis or apptainer
#   lies_in NAME PATH                   whether PATH is, or is below, what NAME names, a path or a glob
# Environment: CONFIG (a file with more of these), DEVICE (auto, cuda or cpu: the one switch between GPUs and CPU), NPROC_PER_NODE
# (default: the GPUs of a node that CUDA_VISIBLE_DEVICES leaves, else 1), MASTER_PORT, PRECISION (bf16 on GPUs, fp32 on the CPU),
# TORCHRUN_FLAGS (more of its flags, e.g. --max-restarts=3), ON_TERM (what SIGTERM becomes for what was launched: TERM, or USR1, on which
# training saves and leaves). With --dry-run among the flags nothing is started, and NNODES and
# GPU_MEMORY_GB (GiB; or DEVICE=cuda) plan for nodes and GPUs that need not be here.
# The terminal shows lines that start with "[" (one a stage, a step or an error); everything goes to OUTPUT/logs/NAME.log.
# SLURM does not hand --cpus-per-task on to srun; this file does, divided where a node has several tasks.
# Exit code: 0 finished, 2 a user's error, 75 preempted or stopped on the way (start it again), 1 anything else. A job that leaves early
# after SLURM's warning, or while SLURM preempts it, goes back into the queue.

refuse() { echo "[error] $*" >&2; exit 2; }
# shellcheck disable=SC2053 # a glob may match
lies_in() { [[ $(realpath -m "$2")/ == $(realpath -m "$1")/* ]]; }

# CONFIG, a file of NAME=VALUE lines (# opens a comment): choices that the environment does not make.
read_config() {
  local line number=0
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Z][A-Z0-9_]*)=(.*)$ ]] || refuse "$1:$number: not NAME=VALUE: $line"
    [ -n "${!BASH_REMATCH[1]+set}" ] || export "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
  done <"$1"
}
if [ -n "${CONFIG:-}" ]; then
  [ -f "$CONFIG" ] || refuse "CONFIG: no file $CONFIG"
  read_config "$CONFIG"
  unset CONFIG # what it says is in the environment of all that follows, also where that file is not
fi

PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron refuses TP > 1 without it before Blackwell
export LPO_TRACEBACK=1 # for the log; the terminal shows the one line
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
[ -n "${PYTHONWARNINGS:-}" ] || export PYTHONWARNINGS=ignore

# GPUs that a process here may use: the driver's, less what CUDA_VISIBLE_DEVICES hides (set but empty: all; -1 ends the list).
gpu_count() {
  local present=0 id visible=0 listed=()
  if command -v nvidia-smi >/dev/null 2>&1; then present=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi
  if [ "$present" = 0 ] || [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then echo "$present"; return; fi
  IFS=, read -ra listed <<<"$CUDA_VISIBLE_DEVICES" || true
  for id in "${listed[@]}"; do
    [[ $id != -* ]] || break
    visible=$((visible + 1))
  done
  echo "$visible"
}

DEVICE=${DEVICE:-auto}
case $DEVICE in
  auto | cuda) GPUS=$(gpu_count) ;;
  cpu) GPUS=0 ;;
  *) refuse "DEVICE: '$DEVICE' is none of auto, cuda, cpu" ;;
esac
PLAN=0
if [[ " $* " == *" --dry-run "* ]]; then
  PLAN=1 NNODES=${NNODES:-${SLURM_NNODES:-1}}
  [ "$DEVICE${GPU_MEMORY_GB:-}" = auto ] || [ "$DEVICE" = cpu ] || GPUS=${NPROC_PER_NODE:-$((GPUS > 0 ? GPUS : 8))}
else
  NNODES=${SLURM_NNODES:-${NNODES:-1}}
fi
[[ $NNODES =~ ^[1-9][0-9]*$ && ${NPROC_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] ||
  refuse "NNODES, NPROC_PER_NODE: '$NNODES' and '${NPROC_PER_NODE:-1}' are not both numbers"
CPUS=$((${SLURM_CPUS_PER_TASK:-0} * ${SLURM_NTASKS_PER_NODE:-1})) # of a node, if SLURM was asked for a number
[ "$CPUS" = 0 ] || export SRUN_CPUS_PER_TASK=$CPUS                    # of a step's only task there
if [ "$PLAN" = 0 ] && [ "$NNODES" -gt 1 ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  refuse "NNODES=$NNODES without SLURM is for --dry-run only: sbatch -N $NNODES"
fi
NPROC_PER_NODE=${NPROC_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}
PRECISION=${PRECISION:-$([ "$GPUS" -gt 0 ] && echo bf16 || echo fp32)}

# Lines for the terminal: ours only, steps as one progress bar. With a path: and all of them into that log.
show() { "${HOST_PYTHON:-$PYTHON}" "$ROOT/scripts/terminal.py" "$@"; }
# After a failure that is no user's error: the first error of the first rank that failed, its last lines, the log's path.
explain() { "${HOST_PYTHON:-$PYTHON}" "$ROOT/scripts/failure.py" "$1"; }

# The first of these commands that is a Python of 3.10 or later.
first_of_310() {
  local python
  for python in "$@"; do
    ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || { echo "$python"; return; }
  done
  return 1
}

# How jobs run from here on: in an image (none: as they are), by pyxis where srun has it, else by apptainer, with the folders
# CONTAINER_MOUNTS (default: the repository and this folder) at their own places. HOST_PYTHON is for what stays outside.
SRUN_FLAGS=() PREFIX=()
in_image() {
  local mounts=${CONTAINER_MOUNTS:-$ROOT:$ROOT,$PWD:$PWD} mount targets
  SRUN_FLAGS=() PREFIX=()
  [ -n "$1" ] || return 0
  HOST_PYTHON=$(first_of_310 "${HOST_PYTHON:-$ROOT/.venv/bin/python}" "$PYTHON" python3) ||
    refuse "what stays outside of the image needs a Python of this host, 3.10 or later: say HOST_PYTHON"
  if [ -n "${SLURM_JOB_ID:-}" ] && srun --help 2>&1 | grep -q -e --container-image; then
    SRUN_FLAGS=("--container-image=$1" "--container-mounts=$mounts")
    export -n HOST_PYTHON # on_node.sh is in the image
    IFS=, read -ra targets <<<"$mounts"
    for mount in "${targets[@]#*:}"; do # pyxis would begin in the image's own folder, and refuses one that is not there
      mount=${mount%%:*}
      [[ $PWD/ != "${mount%/}"/* ]] || { SRUN_FLAGS+=("--container-workdir=$PWD"); break; }
    done
  elif command -v apptainer >/dev/null; then
    PREFIX=(apptainer exec --nv --bind "$mounts" "$1")
    export HOST_PYTHON # on_node.sh is outside
  else
    refuse "an image ($1) needs pyxis or apptainer, and neither is here"
  fi
}

# One process on this node, in the image.
alone() {
  if [ "${#SRUN_FLAGS[@]}" = 0 ]; then "${PREFIX[@]}" "$@"; else srun --nodes=1 --ntasks=1 "${SRUN_FLAGS[@]}" "$@"; fi
}

# One process before anything is started: a user's error is one line. WORLD_SIZE is what the job will have; nothing talks to anybody yet.
foresee() {
  local log=$1 code=0; shift
  WANDB_MODE=disabled RANK=0 WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) LOCAL_RANK=0 alone "$PYTHON" "$@" >"$log" 2>&1 || code=$?
  [ "$PLAN$code" = 00 ] || show <"$log"
  [ "$code" = 0 ] || grep -q '^\[error\]' "$log" || explain "$log"
  return "$code"
}

# The nodes' addresses in SLURM's configuration, in the order of SLURM_NODEID: a node's name need not be a host's.
node_addresses() {
  local node
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    scontrol show node "$node" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$node"
  done
}

# A port for the nodes of this job to meet at, which nobody listens on here, on the first of them (MASTER_PORT is taken at its word).
rendezvous_port() {
  local port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  while listens "$port"; do
    [ -z "${MASTER_PORT:-}" ] || refuse "MASTER_PORT: somebody listens on port $port of $(hostname) already"
    port=$((port + 1))
  done
  echo "$port"
}
listens() { grep -qsE "$(printf ':%04X [0F]+:0000 0A' "$1")" /proc/net/tcp /proc/net/tcp6; }

# A command, and after it an end of whatever it left: a rank that is killed leaves the helper processes of its checkpoints, which hold its
# memory and our pipe. They are known by a word in their environment.
without_orphans() {
  local code=0 orphan
  local -x LPO_JOB=$$-$RANDOM$RANDOM
  "$@" || code=$?
  while read -r orphan; do kill -KILL "$orphan" 2>/dev/null || true; done < <(grep -lzxs "LPO_JOB=$LPO_JOB" /proc/[0-9]*/environ | cut -d/ -f3)
  return "$code"
}

# Whether torchrun is a step of SLURM's: on several nodes, for pyxis, and in a job's script where there is something to save, for SLURM
# announces a preemption to steps alone.
as_step() {
  [ "$NNODES" -gt 1 ] || [ "${#SRUN_FLAGS[@]}" -gt 0 ] || { [ "$ON_TERM" != TERM ] && [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; }
}

run_torch() {
  local rendezvous=(--standalone) more port addresses word flags=()
  read -ra more <<<"${TORCHRUN_FLAGS:-}" || true
  for word in "${more[@]}"; do # on_node.sh has more to say of it
    if [ "$NNODES" -gt 1 ] && [[ $word == --rdzv-conf=* ]]; then export RDZV_CONF=${word#*=}; else flags+=("$word"); fi
  done
  # SLURM's SIGTERM meets every process of a step: torchrun must not end its ranks, which know torchrun's from others' (entry.py).
  [ "$ON_TERM" = TERM ] || flags+=("--signals-to-handle=SIGINT,SIGHUP,SIGQUIT")
  # Without this, ranks that --max-restarts starts again find the addresses of the dead ones in the store (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  if [ "$NNODES" -gt 1 ]; then
    port=$(rendezvous_port) || return 2
    mapfile -t addresses < <(node_addresses)
    export NODE_ADDRESSES="${addresses[*]}" # for on_node.sh, which may run where there is no scontrol
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${addresses[0]}:$port")
  fi
  set -- "${PREFIX[@]}" "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" "${flags[@]}" --nproc-per-node "$NPROC_PER_NODE" "$@"
  if ! as_step; then
    without_orphans "$@"
  else
    (trap - USR1 TERM; exec srun --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "${SRUN_FLAGS[@]}" "$ROOT/scripts/on_node.sh" "$@")
  fi
}

spread() {
  local per_node=$1 number code=0 jobs=(); shift
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    [ "$CPUS" = 0 ] || local -x SRUN_CPUS_PER_TASK=$((CPUS > per_node ? CPUS / per_node : 1))
    supervise srun --ntasks=$((NNODES * per_node)) --ntasks-per-node="$per_node" "${SRUN_FLAGS[@]}" "${PREFIX[@]}" "$@"
    return
  fi
  for ((number = 0; number < per_node; number++)); do
    RANK=$number LOCAL_RANK=$number WORLD_SIZE=$per_node "${PREFIX[@]}" "$@" &
    jobs+=($!)
  done
  for number in "${jobs[@]}"; do wait_for "$number" "${jobs[@]}" || code=$?; done
  return "$code"
}

# One process makes everything, or each of several its share and one more puts them together.
sharded() {
  if [ $((NNODES * $1)) = 1 ]; then
    spread "$@"
  else
    spread "$@" --shard auto
    supervise "$PYTHON" "${@:3}" --merge
  fi
}

supervise() { "$@" & wait_for $!; }

terminated=0 warned=0 ON_TERM=${ON_TERM:-TERM}
trap 'exit 75' TERM # when what is in the foreground has ended
trap 'warned=1' USR1
trap 'requeue $?' EXIT

# For what is to live on while those who listen to USR1 save.
hold_out() { trap '' USR1; [ "$ON_TERM" = TERM ] || trap '' TERM; }

# The exit code of a job of this shell. Meanwhile SIGTERM (a user's kill, a preemption) goes on to it and its fellows, and USR1 (SLURM's
# warning before the time limit) to what they started. A job that SIGTERM met when its work was done (0, or 143 while Python ends) is
# preempted too: the next one is not started. The warning is repeated: who is still starting up does not listen yet.
wait_for() {
  local job=$1 code=0 repeat=; shift
  trap 'terminated=1; if [ "$ON_TERM" = USR1 ]; then keep_warning; else pass_on TERM "${@:-$job}" $(descendants "$job"); fi' TERM
  trap 'warned=1; keep_warning' USR1
  while wait "$job" || code=$?; kill -0 "$job" 2>/dev/null; do code=0; done # a trapped signal ends wait early
  [ "$code" -le 128 ] || { code=0; wait "$job" || code=$?; }               # also when the job ended at that moment
  [ -z "$repeat" ] || kill "$repeat" 2>/dev/null || true
  trap 'exit 75' TERM
  trap 'warned=1' USR1
  if [ "$terminated$ON_TERM" = 1TERM ] && [[ $code = 0 || $code = 143 ]]; then return 75; fi
  return "$code"
}
keep_warning() { [ -n "$repeat" ] || { warn "$job" >/dev/null 2>&1 & repeat=$!; }; } # wait_for's

# shellcheck disable=SC2046 # process ids
warn() { while kill -0 "$1" 2>/dev/null; do pass_on USR1 $(descendants "$1"); sleep 2; done; }
descendants() { local child; for child in $(pgrep -P "$1"); do echo "$child"; descendants "$child"; done; }
pass_on() { local signal=$1; shift; kill "-$signal" "$@" 2>/dev/null || true; }

launch() {
  local name=$1 output=$2 entry=$3; shift 3
  local log=$output/logs/$name.log code=0 run=("$ROOT/$entry") flags=("$@")
  [[ $entry == *.py ]] || run=(-m "$entry")
  [ "$DEVICE" = auto ] || flags=(--device "$DEVICE" "${flags[@]}")
  [ "$PRECISION" = fp32 ] || flags+=("--$PRECISION")
  if [ "$PLAN" = 1 ]; then
    [ -z "${GPU_MEMORY_GB:-}" ] || flags+=(--gpu-memory-gb "$GPU_MEMORY_GB")
    log=$(mktemp --suffix=.log)
    foresee "$log" "${run[@]}" "${flags[@]}" && rm "$log"
    return
  fi
  mkdir -p "$output/logs" || refuse "OUTPUT: $output cannot be made"
  [ ! -s "$log" ] || mv "$log" "$output/logs/$name-$(date -r "$log" +%Y%m%d-%H%M%S).log" # of an earlier start
  foresee "$log" "${run[@]}" "${flags[@]}" --check || return $?
  if [ "$warned" = 1 ]; then
    warned=0 # a job that is warned before it began would be warned again
    echo "[failed] the warning before the time limit came before anything had begun: the job needs more time than that" >&2
    return 75
  fi
  ! preempting || return 75 # nobody was told: this was no step
  # USR1 reaches the workers, which torchrun starts in sessions of their own: Megatron saves at the next step. torchrun must not die of
  # it: it inherits "ignore". srun passes it on to the nodes (on_node.sh). A pipeline, not >(...): when it has ended the log is complete.
  # Its exit code is the job's alone: a full disk ends no job because of its log.
  (hold_out; set +e; run_torch "${run[@]}" "${flags[@]}" 2>&1 | (trap '' TERM; show "$log"); exit "${PIPESTATUS[0]}") &
  wait_for $! || code=$?
  if [ "$code" = 0 ]; then
    ! grep -qsE '"(preempted|stopped)"' "$output/run_state.json" || return 75
  elif grep -q '^\[error\]' "$log"; then
    return 2
  elif [ "$terminated" = 1 ] || preempting; then
    warned=0 # who had time to save and did not would have none the next time either
    [ "$ON_TERM" = TERM ] || echo "[failed] told to end, the run came to no save: the next start goes on from the checkpoint before" >&2
    return 75
  else
    explain "$log"
    return 1
  fi
}

# Whether this job is in the time of grace that SLURM gives before it preempts.
preempting() { [ -n "${SLURM_JOB_ID:-}" ] && scontrol show job "$SLURM_JOB_ID" --oneliner | grep -q ' JobState=RUNNING .* PreemptTime=[0-9]'; }

# At the end of a job, with its exit code: back into the queue, if it left early after a warning before the time limit or for a preemption.
# (Whom a preemption or a failing node ends is requeued by SLURM itself, and who is cancelled stays so.)
requeue() {
  [ -n "${SLURM_JOB_ID:-}" ] && [[ $1 != [02] ]] || return 0
  [ "$1$warned" = 751 ] || preempting || return 0
  scontrol requeue "$SLURM_JOB_ID" || echo "[failed] SLURM did not take job $SLURM_JOB_ID back into its queue: submit it again" >&2
}
