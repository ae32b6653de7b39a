#!/usr/bin/env bash
# One node's part of a job of several nodes; srun starts it with torchrun's command line. srun hands signals to this shell alone, torchrun's
# workers are in sessions of their own: USR1 (SLURM's warning before the time limit) goes on to them, and torchrun must not die of it.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$ROOT/scripts/launch.sh"
(trap '' USR1; without_orphans "$@") &
wait_for $!
