#!/usr/bin/env bash
# FIPO on this machine, from nothing: makes a tiny base model and its problems (kept for the next run), then trains on
# two data-parallel ranks. `make quickstart` calls it. Another model and run: SEED=2 RUN_NAME=second examples/quickstart/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

SEED=${SEED:-1}
RANKS=${RANKS:-2}
BASE=.cache/quickstart/base-$SEED
RUN_NAME=${RUN_NAME:-quickstart}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

python tools/make_base_model.py --out "$BASE" --seed "$SEED"
rm -rf "runs/$RUN_NAME" # the last demonstration's

MODEL_ARGS=(--preset quickstart --hf-model "$BASE" --seed "$SEED")
DATA_ARGS=(--prompt-data "$BASE/train.jsonl" --eval-data "heldout:$BASE/heldout.jsonl:1")
OUTPUT_ARGS=(--run-name "$RUN_NAME" --save-hf "runs/$RUN_NAME/hf")

torchrun --standalone --nproc-per-node "$RANKS" -m megatron_fipo.train \
    "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
