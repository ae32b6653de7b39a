#!/usr/bin/env bash
# A SLURM of two nodes on this machine, for trying and testing jobs: real slurmctld, slurmd, munge and accounting-free scheduling.
#   eval "$(scripts/local_slurm.sh up DIR)"    start it with all its files in DIR (short path); sets SLURM_CONF for this shell
#   scripts/local_slurm.sh down DIR            stop it
# Jobs of its partition "urgent" preempt those of "local", which have 60 seconds to leave.
# Nothing outside DIR is touched and no system service is used. Needs Debian's slurm-wlm and munge; with root and apt-get they are
# installed. Exit code 3: SLURM is not here and cannot be installed.
set -euo pipefail
usage() { echo "[error] scripts/local_slurm.sh up|down DIR" >&2; exit 2; }
[ $# = 2 ] || usage
mkdir -p "$2"
dir=$(cd "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin

have_slurm() { command -v slurmctld && command -v slurmd && command -v munged && command -v sbatch; } >/dev/null

install_slurm() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } >"$dir/apt.log" 2>&1
}

configure() {
  local cpus user; cpus=$(nproc) user=$(id -un)
  cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=300
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=$cpus RealMemory=4000 Gres=gpu:8
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=$cpus RealMemory=4000 Gres=gpu:8
PartitionName=local Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
END
  # Eight GPUs a node that are empty files: what a job asks for is granted, and the job then says DEVICE=cpu.
  touch "$dir"/gpu{0..7}
  printf 'NodeName=%s Name=gpu File=%s\n' n1 "$dir/gpu[0-7]" n2 "$dir/gpu[0-7]" >"$dir/gres.conf"
}

up() {
  have_slurm || install_slurm || { echo "[error] slurm-wlm and munge are not installed, and root with apt-get is needed to install them" >&2; exit 3; }
  PORT=${LOCAL_SLURM_PORT:-$((20000 + RANDOM % 12000))}
  mkdir -p "$dir/state" "$dir/spool-n1" "$dir/spool-n2"
  configure
  (umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
  munged --key-file "$dir/munge.key" --socket "$dir/munge.socket" --pid-file "$dir/munged.pid" --log-file "$dir/munged.log" \
    --seed-file "$dir/munged.seed" --force
  slurmctld
  slurmd -N n1
  slurmd -N n2
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --format=%T --state=idle 2>/dev/null)" = idle ] &&
      [ "$(sinfo --noheader --format=%D --state=idle)" = 2 ] && { echo "export SLURM_CONF=$SLURM_CONF"; return; }
    sleep 0.2
  done
  echo "[error] the nodes did not come up; see $dir/*.log" >&2
  down
  exit 1
}

down() {
  local daemon pid
  for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
    [ -f "$dir/$daemon.pid" ] || continue
    pid=$(cat "$dir/$daemon.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  done
}

case $1 in
  up) up ;;
  down) down ;;
  *) usage ;;
esac
