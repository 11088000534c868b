#!/usr/bin/env bash
# FIPO on Qwen2.5-Math-7B with the published recipe (arXiv 2603.19835, Table 3): 4 nodes of 8 H100 with 80 GB.
#
#   HF_MODEL=/models/Qwen2.5-Math-7B PROMPT_DATA=/data/dapo-math-17k.jsonl EVAL_DATA=aime24:/data/aime24.jsonl:32 \
#   MASTER_ADDR=node0 NODE_RANK=0 examples/fipo_qwen2.5_7b_math.sh         # and so on, on every node
#
# It fits on one node (NNODES=1) as it is; tools/plan_run.py forecasts others. As in the recipe, set
# max_position_embeddings in the folder's config.json from 4096 to 32768: servers and later users of the model read it.
# Arguments are added to the command and win: `--dry-run` checks everything and prints the batch arithmetic as JSON. The
# same command started again goes on from the run's newest checkpoint.
set -euo pipefail
NNODES=${NNODES:-4}
# shellcheck source=examples/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
require HF_MODEL "the Hugging Face folder of Qwen2.5-Math-7B (config.json, safetensors, tokenizer)"
require PROMPT_DATA "a JSONL file of prompts with answers (docs/training.md)"

PARALLEL=(
    --tensor-model-parallel-size 2 # weights and fp32 gradients take 22.8 of 80 GB; more would only add communication
    --sequence-parallel
    --pipeline-model-parallel-size 1
    --context-parallel-size 1      # one sequence of 12,288 tokens fits easily
    --use-distributed-optimizer    # 12 bytes a parameter over 16 replicas: 2.9 GB a GPU; over 4, one node: 11.4 GB
    --overlap-grad-reduce --overlap-param-gather
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 # 32,768 tokens keep 3.3 GB, not 73
    --distributed-timeout-minutes 60 # replicas wait for the one that still generates 10,240 tokens
)

ALGORITHM=(
    --preset fipo-7b                  # every value of the paper; the rest of this list only shows the main ones
    --fipo-half-life 32               # gamma = 2^(-1/32)
    --fipo-weight-low 0.8 --fipo-weight-high 1.2 --fipo-safety-threshold 3
    --grpo-prompts-per-step 512 --grpo-group-size 32
    --global-batch-size 2048          # 64 prompts: 8 updates on each rollout, FIPO acts from the second on
    --max-tokens-per-microbatch 32768 # more than two longest sequences, so that packs can be levelled
)

LENGTHS=(--max-prompt-tokens 2048 --rollout-max-tokens 10240)
SAMPLING=(--rollout-temperature 1.0 --eval-top-p 0.7)
ROLLOUT_ENGINE=${ROLLOUT_ENGINE:-embedded}
EMBEDDED=(--rollout-max-running 96) # 12,288 tokens x 28 KiB of keys and values: 34 GB a GPU at the most

OPTIMIZER=(--bf16 --lr 1e-6 --lr-warmup-iters 10 --weight-decay 0.1 --clip-grad 1.0)
SAVING=(--save-interval 5 --keep-last 2) # weights and optimizer: 107 GB a checkpoint
RUN_NAME=${RUN_NAME:-fipo-qwen2.5-math-7b}

train "${PARALLEL[@]}" "${ALGORITHM[@]}" "${LENGTHS[@]}" "${SAMPLING[@]}" "${OPTIMIZER[@]}" "${SAVING[@]}" "$@"
