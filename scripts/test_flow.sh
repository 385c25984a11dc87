#!/usr/bin/env bash
# A checkpoint's whole way, from a hub id (or a folder that is already here) to text and figures; it deletes nothing.
#   ./scripts/test_flow.sh meta-llama/Llama-2-7b-chat-hf
#   ./scripts/test_flow.sh checkpoints/stories
set -euo pipefail
model=${1:?"usage: scripts/test_flow.sh REPO_ID_OR_FOLDER [flags for generate.py]"}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
if [ ! -e "$model" ]; then
    "$root/scripts/prepare.sh" "$model"
fi
for flags in "" "--compile"; do
    echo "== generate.py $flags" >&2
    "$python" "$root/generate.py" --checkpoint_path "$model" --prompt "Hello, my name is" --max_new_tokens 50 $flags "${@:2}"
done
