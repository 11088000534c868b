#!/usr/bin/env bash
# FIPO on a model that may use a calculator: the quickstart's base model (made if it is not there) writes 7+1=, the tool
# writes 8. It knows the notation, but often answers without working anything out; what it learns is to use the tool.
set -euo pipefail
cd "$(dirname "$0")/../.."

SEED=${SEED:-1}
RANKS=${RANKS:-2}
BASE=.cache/quickstart/base-$SEED
RUN_NAME=${RUN_NAME:-calculator}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=examples/calculator${PYTHONPATH:+:$PYTHONPATH}

python tools/make_base_model.py --out "$BASE" --seed "$SEED"
rm -rf "runs/$RUN_NAME" # the last demonstration's

MODEL_ARGS=(--preset quickstart --hf-model "$BASE" --seed "$SEED")
DATA_ARGS=(--prompt-data "$BASE/train.jsonl" --eval-data "heldout:$BASE/heldout.jsonl:1")
TOOL_ARGS=(--rollout-function calculator:worked_sums)

torchrun --standalone --nproc-per-node "$RANKS" -m megatron_fipo.train \
    "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TOOL_ARGS[@]}" --run-name "$RUN_NAME" "$@"
