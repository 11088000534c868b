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
# Both keys are the recipe's too, by the same variables. Arguments are added to the command and win.
set -euo pipefail
# shellcheck source=examples/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
require HF_MODEL "the Hugging Face folder that the recipe trains"
require SGLANG_API_KEY "the key of every request, for example \$(openssl rand -hex 16)"
require SGLANG_ADMIN_API_KEY "the key of weight updates, another one"

exec python -m sglang.launch_server --model-path "$HF_MODEL" --host "${HOST:-$(hostname)}" --port "${PORT:-30000}" \
    --tp-size "$GPUS_PER_NODE" --skip-tokenizer-init --incremental-streaming-output \
    --api-key "$SGLANG_API_KEY" --admin-api-key "$SGLANG_ADMIN_API_KEY" "$@"
