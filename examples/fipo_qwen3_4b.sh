#!/usr/bin/env bash
# FIPO on Qwen3-4B-Base: one node of 8 H100 with 80 GB. The paper trained no Qwen3: the algorithm is that of its 32B
# recipe, the batch an eighth of it.
#
#   HF_MODEL=/models/Qwen3-4B-Base PROMPT_DATA=/data/dapo-math-17k.jsonl EVAL_DATA=aime24:/data/aime24.jsonl:32 \
#   examples/fipo_qwen3_4b.sh
#
# More nodes: NNODES, MASTER_ADDR and NODE_RANK as examples/cluster.sh says; tools/plan_run.py forecasts them.
# Arguments are added to the command and win: `--dry-run` checks everything and prints the batch arithmetic as JSON. The
# same command started again goes on from the run's newest checkpoint.
set -euo pipefail
NNODES=${NNODES:-1}
# shellcheck source=examples/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
require HF_MODEL "the Hugging Face folder of Qwen3-4B-Base (config.json, safetensors, tokenizer)"
require PROMPT_DATA "a JSONL file of prompts with answers (docs/training.md)"

PARALLEL=(
    --tensor-model-parallel-size 1 # weights and fp32 gradients take 24 of 80 GB
    --pipeline-model-parallel-size 1
    --context-parallel-size 1      # one sequence of 18,432 tokens fits easily
    --use-distributed-optimizer    # 12 bytes a parameter over 8 replicas: 6 GB a GPU
    --overlap-grad-reduce --overlap-param-gather
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --distributed-timeout-minutes 60 # replicas wait for the one that still generates 16,384 tokens
)

ALGORITHM=(
    --preset fipo-32b                 # the paper's values; the rest of this list shows the main ones and the smaller batch
    --fipo-half-life 32               # gamma = 2^(-1/32)
    --fipo-weight-low 1.0 --fipo-weight-high 1.2
    --grpo-prompts-per-step 64 --grpo-group-size 16
    --global-batch-size 128           # 8 prompts: 8 updates on each rollout, FIPO acts from the second on
    --max-tokens-per-microbatch 32768 # more than one longest sequence, so that packs can be levelled
)

LENGTHS=(--max-prompt-tokens 2048 --rollout-max-tokens 16384)
SAMPLING=(--rollout-temperature 1.0 --eval-top-p 0.7)
ROLLOUT_ENGINE=${ROLLOUT_ENGINE:-embedded}
EMBEDDED=(--rollout-max-running 12) # 18,432 tokens x 144 KiB of keys and values: 33 GB a GPU at the most

OPTIMIZER=(--bf16 --lr 1e-6 --lr-warmup-iters 10 --weight-decay 0.1 --clip-grad 1.0)
SAVING=(--save-interval 5 --keep-last 2) # weights and optimizer: 56 GB a checkpoint
RUN_NAME=${RUN_NAME:-fipo-qwen3-4b}

train "${PARALLEL[@]}" "${ALGORITHM[@]}" "${LENGTHS[@]}" "${SAMPLING[@]}" "${OPTIMIZER[@]}" "${SAVING[@]}" "$@"
