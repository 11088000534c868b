#!/usr/bin/env bash
# Sourced by the training scripts beside it: `launch -m MODULE ...` starts a module once per GPU of this node, at the
# place in the cluster that the environment says. Start a script on every node, all variables alike but NODE_RANK.
#
#   NNODES         nodes (the script's own default)
#   NODE_RANK      this node, 0 .. NNODES - 1 (0)
#   MASTER_ADDR    address of node 0, required for more than one node
#   MASTER_PORT    a free port of node 0, and the one above it (29500)
#   GPUS_PER_NODE  (8)
#   JOIN_TIMEOUT   seconds that a node waits for the others (600)

require() { # require NAME WHAT: end with one line unless the variable NAME is set
    [[ -n ${!1:-} ]] || { echo "${0##*/}: $1 is not set: $2" >&2; exit 2; }
}

NODE_RANK=${NODE_RANK:-0}
MASTER_PORT=${MASTER_PORT:-29500}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}

export HF_HUB_OFFLINE=1 # model and data are folders; hundreds of ranks must not ask a hub

launch() { # launch ARGUMENTS: replaces the shell, so that a signal to the script reaches torchrun
    # Packs differ in length: fixed segments would fragment.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    if [[ " $* " == *" --dry-run "* ]]; then
        # One process checks the command line for the whole cluster: no GPU, no other node, and JSON alone on stdout,
        # under which torchrun would hide the exit code.
        WORLD_SIZE=$((NNODES * GPUS_PER_NODE)) exec python "$@"
    fi
    if ((NNODES > 1)); then
        require MASTER_ADDR "the address of node 0, the same on all $NNODES nodes"
        # torchrun would only count the nodes that came; this names those that did not.
        python "$(dirname "${BASH_SOURCE[0]}")/../tools/wait_for_nodes.py" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
            --master-addr "$MASTER_ADDR" --port $((MASTER_PORT + 1)) --timeout "$JOIN_TIMEOUT"
    fi
    exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE" \
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT" --rdzv-conf "timeout=$JOIN_TIMEOUT" "$@"
}
