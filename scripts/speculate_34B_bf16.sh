#!/usr/bin/env bash
# CodeLlama-34B bf16, guessed for by CodeLlama-7B int4, which has the same tokenizer.
# TARGET and DRAFT name other checkpoints; further flags are passed on.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${TARGET:-$root/checkpoints/codellama/CodeLlama-34b-Python-hf/model_fast.safetensors}
draft=${DRAFT:-$root/checkpoints/codellama/CodeLlama-7b-Python-hf/model_int4.g32.safetensors}
"${PYTHON:-python}" "$root/generate.py" --compile --checkpoint_path "$target" --draft_checkpoint_path "$draft" \
    --speculate_k 6 --prompt "Hi my name is" --max_new_tokens 200 --num_samples 50 --temperature 0 "$@"
