#!/usr/bin/env bash
# Sourced by the training scripts beside it: `train FLAGS` starts training with a recipe's flags once per GPU of this node,
# at the place in the cluster that the environment says. Start a script on every node, all variables alike but NODE_RANK.
#
#   HF_MODEL, PROMPT_DATA, EVAL_DATA, ROLLOUT_ENGINE, SGLANG_URLS, RUN_NAME, RUNS_DIR   what to train (docs/launching.md)
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

train() { # train FLAGS: megatron_fipo.train with a recipe's flags and what the environment says
    # The recipe sets ROLLOUT_ENGINE and RUN_NAME, and in EMBEDDED what its rollouts take in the embedded engine alone.
    local data=(--prompt-data "$PROMPT_DATA") rollout=(--rollout-engine "$ROLLOUT_ENGINE") sets servers
    if [[ -n ${EVAL_DATA:-} ]]; then # NAME:PATH:N, or several of them with spaces between
        read -ra sets <<<"$EVAL_DATA"
        data+=(--eval-data "${sets[@]}")
    fi
    if [[ $ROLLOUT_ENGINE == embedded ]]; then
        rollout+=("${EMBEDDED[@]}")
    else
        require SGLANG_URLS "the running SGLang servers, http://HOST:PORT with spaces between (docs/engines.md)"
        read -ra servers <<<"$SGLANG_URLS"
        rollout+=(--sglang-url "${servers[@]}")
    fi
    launch -m megatron_fipo.train --hf-model "$HF_MODEL" "${data[@]}" "${rollout[@]}" \
        --run-name "$RUN_NAME" --runs-dir "${RUNS_DIR:-runs}" "$@"
}
