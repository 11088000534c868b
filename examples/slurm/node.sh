#!/usr/bin/env bash
# What train.sbatch starts on each node: `node.sh SCRIPT [FLAGS]`. Slurm's USR1 (the time is up), or a TERM to this
# process alone, goes on to the ranks, which save and end. torchrun, which would kill ranks that have not saved within
# 30 s, does not see it.
set -uo pipefail

trap 'cat "/proc/$TORCHRUN/task/"*/children | xargs --no-run-if-empty kill -USR1' USR1 TERM
(
    trap '' USR1 # inherited, should Slurm signal every process; the ranks have a handler of their own
    NODE_RANK=$SLURM_NODEID exec "$@"
) &
TORCHRUN=$!
while
    CODE=0
    wait "$TORCHRUN" || CODE=$? # a signal ends the wait, not what it waits for
    kill -0 "$TORCHRUN" 2>/dev/null
do :; done
exit "$CODE"
