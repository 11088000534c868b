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

MODEL=(--hf-model "$HF_MODEL" --bf16)

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

DATA=(--prompt-data "$PROMPT_DATA" --max-prompt-tokens 2048)
if [[ -n ${EVAL_DATA:-} ]]; then # NAME:PATH:N, or several of them with spaces between
    read -ra EVAL_SETS <<<"$EVAL_DATA"
    DATA+=(--eval-data "${EVAL_SETS[@]}" --eval-top-p 0.7)
fi

ROLLOUT_ENGINE=${ROLLOUT_ENGINE:-sglang} # embedded: on the trainer's nodes (docs/launching.md)
ROLLOUT=(--rollout-engine "$ROLLOUT_ENGINE" --rollout-max-tokens 20480 --rollout-temperature 1.0)
if [[ $ROLLOUT_ENGINE == embedded ]]; then
    ROLLOUT+=(--rollout-max-running 48)
else
    require SGLANG_URLS "the running SGLang servers, http://HOST:PORT with spaces between (docs/engines.md)"
    read -ra SERVERS <<<"$SGLANG_URLS"
    ROLLOUT+=(--sglang-url "${SERVERS[@]}")
fi

OPTIMIZER=(--lr 1e-6 --lr-warmup-iters 10 --weight-decay 0.1 --clip-grad 1.0)

RUN_NAME=${RUN_NAME:-dapo-qwen2.5-32b}
RUNS_DIR=${RUNS_DIR:-runs} # on a file system that all nodes share
OUTPUT=(
    --run-name "$RUN_NAME" --runs-dir "$RUNS_DIR"
    --save-interval 5 --keep-last 2 # weights and optimizer: 459 GB a checkpoint
)

launch -m megatron_fipo.train "${MODEL[@]}" "${PARALLEL[@]}" "${ALGORITHM[@]}" "${DATA[@]}" "${ROLLOUT[@]}" \
    "${OPTIMIZER[@]}" "${OUTPUT[@]}" "$@"
