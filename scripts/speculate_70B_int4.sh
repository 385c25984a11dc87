#!/usr/bin/env bash
# Llama-2-70B int4, guessed for by Llama-2-7B int4.
# TARGET and DRAFT name other checkpoints; further flags are passed on.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${TARGET:-$root/checkpoints/meta-llama/Llama-2-70b-chat-hf/model_int4.g32.safetensors}
draft=${DRAFT:-$root/checkpoints/meta-llama/Llama-2-7b-chat-hf/model_int4.g32.safetensors}
"${PYTHON:-python}" "$root/generate.py" --compile --checkpoint_path "$target" --draft_checkpoint_path "$draft" \
    --speculate_k 5 --prompt "Hi my name is" --max_new_tokens 200 --num_samples 50 --temperature 0 "$@"
