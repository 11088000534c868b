#!/usr/bin/env bash
# Train a tiny model with FIPO on this machine's CPU, from nothing to a report. `make quickstart` runs this.
#   SEED=2 examples/quickstart/run.sh    another base model, other problems
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SEED=${SEED:-1}
BASE=.cache/quickstart/base-$SEED

python tools/make_base_model.py --out "$BASE" --seed "$SEED"
