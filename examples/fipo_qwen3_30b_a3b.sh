#!/usr/bin/env bash
# FIPO on Qwen3-30B-A3B-Base, a mixture of 128 experts: 4 nodes of 8 H100 with 80 GB. The paper trained no Qwen3: the
# algorithm is that of its 32B recipe, the batch half of it.
#
#   HF_MODEL=/models/Qwen3-30B-A3B-Base PROMPT_DATA=/data/dapo-math-17k.jsonl EVAL_DATA=aime24:/data/aime24.jsonl:32 \
#   SGLANG_URLS="http://node4:30000 http://node5:30000" \
#   MASTER_ADDR=node0 NODE_RANK=0 examples/fipo_qwen3_30b_a3b.sh          # and so on, on every node
# Further nodes generate: examples/sglang_server.sh on each, as SGLANG_URLS names them.
#
# Arguments are added to the command and win: `--dry-run` checks everything and prints the batch arithmetic as JSON. The
# same command started again goes on from the run's newest checkpoint.
set -euo pipefail
NNODES=${NNODES:-4}
# shellcheck source=examples/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
require HF_MODEL "the Hugging Face folder of Qwen3-30B-A3B-Base (config.json, safetensors, tokenizer)"
require PROMPT_DATA "a JSONL file of prompts with answers (docs/training.md)"

PARALLEL=(
    --tensor-model-parallel-size 4   # attention and embeddings: one of 4 KV heads a GPU
    --sequence-parallel
    --expert-model-parallel-size 8   # 16 of 128 experts a GPU: 3.6 billion parameters, 22 GB with fp32 gradients
    --expert-tensor-parallel-size 1  # an expert's matrices are too narrow to cut
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --use-distributed-optimizer      # experts lie on 4 replicas of 8 GPUs each: 11 GB a GPU
    --overlap-grad-reduce --overlap-param-gather
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --distributed-timeout-minutes 60 # replicas wait for the one that still generates 16,384 tokens
)

ALGORITHM=(
    --preset fipo-32b                 # the paper's values; the rest of this list shows the main ones and the smaller batch
    --fipo-half-life 32               # gamma = 2^(-1/32)
    --fipo-weight-low 1.0 --fipo-weight-high 1.2
    --grpo-prompts-per-step 256 --grpo-group-size 16
    --global-batch-size 512           # 32 prompts: 8 updates on each rollout, FIPO acts from the second on
    --max-tokens-per-microbatch 32768 # more than one longest sequence, so that packs can be levelled
)

LENGTHS=(--max-prompt-tokens 2048 --rollout-max-tokens 16384)
SAMPLING=(--rollout-temperature 1.0 --eval-top-p 0.7)
ROLLOUT_ENGINE=${ROLLOUT_ENGINE:-sglang} # embedded: on the trainer's nodes (docs/launching.md)
EMBEDDED=(--rollout-max-running 64) # 18,432 tokens x 24 KiB of keys and values: 29 GB a GPU at the most

OPTIMIZER=(--bf16 --lr 1e-6 --lr-warmup-iters 10 --weight-decay 0.1 --clip-grad 1.0)
SAVING=(--save-interval 5 --keep-last 2) # weights and optimizer: 427 GB a checkpoint
RUN_NAME=${RUN_NAME:-fipo-qwen3-30b-a3b}

train "${PARALLEL[@]}" "${ALGORITHM[@]}" "${LENGTHS[@]}" "${SAMPLING[@]}" "${OPTIMIZER[@]}" "${SAVING[@]}" "$@"
