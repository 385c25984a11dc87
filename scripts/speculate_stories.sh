#!/usr/bin/env bash
# The bundled pair: runs anywhere, in seconds. A model of 3 M parameters and a draft of a ninth of it show the machinery;
# they are far too small to gain from it. Flags are passed on:   scripts/speculate_stories.sh --temperature 0
# 2.1 to 2.3 of 4 guesses accepted on average: about 3.2 tokens a step.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"${PYTHON:-python}" "$root/generate.py" --checkpoint_path "$root/checkpoints/stories" \
    --draft_checkpoint_path "$root/checkpoints/stories-draft" --speculate_k 4 --prompt "Once upon a time" "$@"
