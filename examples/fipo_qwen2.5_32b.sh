#!/usr/bin/env bash
# FIPO on Qwen2.5-32B-Base with the published recipe (arXiv 2603.19835): 16 nodes of 8 H100 with 80 GB.
#
#   HF_MODEL=/models/Qwen2.5-32B PROMPT_DATA=/data/dapo-math-17k.jsonl EVAL_DATA=aime24:/data/aime24.jsonl:32 \
#   SGLANG_URLS="http://node16:30000 http://node17:30000" \
#   MASTER_ADDR=node0 NODE_RANK=0 examples/fipo_qwen2.5_32b.sh          # and so on, on every node
# Further nodes generate: examples/sglang_server.sh on each, as SGLANG_URLS names them.
#
# The smallest cluster that fits is NNODES=2; tools/plan_run.py forecasts others.
# Arguments are added to the command and win: `--dry-run` checks everything and prints the batch arithmetic as JSON. The
# same command started again goes on from the run's newest checkpoint.
set -euo pipefail
NNODES=${NNODES:-16}
# shellcheck source=examples/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
require HF_MODEL "the Hugging Face folder of Qwen2.5-32B (config.json, safetensors, tokenizer)"
require PROMPT_DATA "a JSONL file of prompts with answers (docs/training.md)"

PARALLEL=(
    --tensor-model-parallel-size 8 # one of 8 KV heads a GPU; weights and fp32 gradients take 24.6 of 80 GB
    --sequence-parallel            # what lies between the matrix products is cut by 8 too
    --pipeline-model-parallel-size 1 # some 15 micro-batches an update: a second stage would idle for a fifteenth
    --context-parallel-size 1      # one sequence of 22,528 tokens fits; raise it for longer responses
    --use-distributed-optimizer    # 12 bytes a parameter over 16 replicas: 3.1 GB a GPU
    --overlap-grad-reduce --overlap-param-gather
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 # 32,768 tokens keep 2.7 GB, not 60
    --distributed-timeout-minutes 60 # replicas wait for the one that still generates 20,480 tokens
)

ALGORITHM=(
    --preset fipo-32b                 # every value of the paper; the rest of this list only shows the main ones
    --fipo-half-life 32               # gamma = 2^(-1/32)
    --fipo-weight-low 1.0 --fipo-weight-high 1.2
    --grpo-prompts-per-step 512 --grpo-group-size 16
    --global-batch-size 1024          # 64 prompts: 8 updates on each rollout, FIPO acts from the second on
    --max-tokens-per-microbatch 32768 # more than one longest sequence, so that packs can be levelled
)

LENGTHS=(--max-prompt-tokens 2048 --rollout-max-tokens 20480)
SAMPLING=(--rollout-temperature 1.0 --eval-top-p 0.7)
ROLLOUT_ENGINE=${ROLLOUT_ENGINE:-sglang} # embedded: on the trainer's nodes (docs/launching.md)
EMBEDDED=(--rollout-max-running 48) # 22,528 tokens x 32 KiB of keys and values: 35 GB a GPU at the most

OPTIMIZER=(--bf16 --lr 1e-6 --lr-warmup-iters 10 --weight-decay 0.1 --clip-grad 1.0)
SAVING=(--save-interval 5 --keep-last 2) # weights and optimizer: 459 GB a checkpoint
RUN_NAME=${RUN_NAME:-fipo-qwen2.5-32b}

train "${PARALLEL[@]}" "${ALGORITHM[@]}" "${LENGTHS[@]}" "${SAMPLING[@]}" "${OPTIMIZER[@]}" "${SAVING[@]}" "$@"
