#!/usr/bin/env bash
# One node's part of a SLURM job; srun starts it with torchrun's command line. srun hands signals to this shell alone, torchrun's workers are
# in sessions of their own: USR1 (SLURM's warning before the time limit) goes on to them, and torchrun must not die of it. SLURM itself sends
# SIGTERM to every process of a step that it preempts.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$ROOT/scripts/launch.sh"
trap - EXIT # the job's script goes back into the queue

# The first node holds the rendezvous, whatever names its address has, and each is known to the others by its address in SLURM. Without a
# word from us gloo takes the interface of the host's own name, which may be the loopback's; it and NCCL get the one that leads to another
# node (NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME say otherwise).
read -ra addresses <<<"${NODE_ADDRESSES:-}" || true
if [ "${#addresses[@]}" -gt 1 ]; then
  other=${addresses[$((SLURM_NODEID == 0))]}
  export PET_LOCAL_ADDR=${addresses[$SLURM_NODEID]} PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0))${RDZV_CONF:+,$RDZV_CONF}
  interface=$("${HOST_PYTHON:-$PYTHON}" "$ROOT/scripts/interface.py" "$other") || true
  [ -z "$interface" ] || export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
fi
(hold_out; without_orphans "$@") &
code=0
wait_for $! || code=$?
[ "$terminated$ON_TERM" != 1TERM ] || exit 75
exit "$code"
