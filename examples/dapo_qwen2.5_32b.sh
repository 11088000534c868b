#!/usr/bin/env bash
# DAPO on Qwen2.5-32B-Base, the baseline of FIPO (arXiv 2503.14476): 16 nodes of 8 H100 with 80 GB.
# The same as fipo_qwen2.5_32b.sh, where the numbers are argued, but for ALGORITHM.
#
#   HF_MODEL=/models/Qwen2.5-32B PROMPT_DATA=/data/dapo-math-17k.jsonl EVAL_DATA=aime24:/data/aime24.jsonl:32 \
#   SGLANG_URLS="http://node16:30000 http://node17:30000" \
#   MASTER_ADDR=node0 NODE_RANK=0 examples/dapo_qwen2.5_32b.sh          # and so on, on every node
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
    --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 1 --context-parallel-size 1
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --distributed-timeout-minutes 60
)

ALGORITHM=(
    --preset dapo                     # influence weights fixed at 1, no sequence filter
    --grpo-prompts-per-step 512 --grpo-group-size 16
    --global-batch-size 512           # 32 prompts: 16 updates on each rollout
    --max-tokens-per-microbatch 32768
)

LENGTHS=(--max-prompt-tokens 2048 --rollout-max-tokens 20480)
SAMPLING=(--rollout-temperature 1.0 --eval-top-p 0.7)
ROLLOUT_ENGINE=${ROLLOUT_ENGINE:-sglang} # embedded: on the trainer's nodes (docs/launching.md)
EMBEDDED=(--rollout-max-running 48)

OPTIMIZER=(--bf16 --lr 1e-6 --lr-warmup-iters 10 --weight-decay 0.1 --clip-grad 1.0)
SAVING=(--save-interval 5 --keep-last 2) # weights and optimizer: 459 GB a checkpoint
RUN_NAME=${RUN_NAME:-dapo-qwen2.5-32b}

train "${PARALLEL[@]}" "${ALGORITHM[@]}" "${LENGTHS[@]}" "${SAMPLING[@]}" "${OPTIMIZER[@]}" "${SAVING[@]}" "$@"
