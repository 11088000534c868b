#!/usr/bin/env bash
# One SGLang server over all GPUs of this node, for the recipes beside it to generate with. Start it on every node that
# generates; then give their addresses to the recipe: SGLANG_URLS="http://node16:30000 http://node17:30000".
#
#   HF_MODEL=/models/Qwen2.5-32B SGLANG_API_KEY=... SGLANG_ADMIN_API_KEY=... examples/sglang_server.sh
#
#   HOST           address that trainers reach (this host's name)
#   PORT           (30000)
#   GPUS_PER_NODE  tensor-parallel ranks (8)
#
# Both keys are the recipe's too, by the same variables. Arguments are added to the command and win. It needs SGLang, with
# the trainer's torch and NCCL (docs/engines.md), and of this repository no installation.
set -euo pipefail
# shellcheck source=examples/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
require HF_MODEL "the Hugging Face folder that the recipe trains"
require SGLANG_API_KEY "the key of every request, for example \$(openssl rand -hex 16)"
require SGLANG_ADMIN_API_KEY "the key of weight updates, another one"

# sglang.launch_server takes keys by its command line only, which every user of the machine can read.
export MEGATRON_FIPO_SGLANG_API_KEY=$SGLANG_API_KEY MEGATRON_FIPO_SGLANG_ADMIN_KEY=$SGLANG_ADMIN_API_KEY
PYTHONPATH="$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec python -m megatron_fipo.rollout.sglang.launch --model-path "$HF_MODEL" --host "${HOST:-$(hostname)}" \
    --port "${PORT:-30000}" --tp-size "$GPUS_PER_NODE" --skip-tokenizer-init --incremental-streaming-output "$@"
