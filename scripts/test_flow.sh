#!/usr/bin/env bash
# A checkpoint's whole way: convert, quantize, generate, eval. It writes to a temporary folder and deletes nothing else.
#   ./scripts/test_flow.sh                                            (the bundled model)
#   ./scripts/test_flow.sh meta-llama/Llama-2-7b-chat-hf text.txt     (a hub id or a folder, and a text to judge by)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
model=${1:-$root/checkpoints/stories}
text=${2:-$root/checkpoints/stories/held_out.txt}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
step() { echo "== $*" >&2; }

step convert "$model"
if [ ! -e "$model" ]; then
    "$python" "$root/scripts/download.py" "$model" --dir "$work/download"
    model=$work/download
fi
"$python" "$root/scripts/convert_hf_checkpoint.py" --checkpoint_dir "$model" --output "$work/model_fast.safetensors"
for mode in int8 int4 int4-gptq; do
    step quantize $mode
    "$python" "$root/quantize.py" --checkpoint_path "$work/model_fast.safetensors" --mode $mode \
        --calibration_file "$text" --calibration_seq_length 256 --calibration_limit 32
done
for file in "$work"/model_*.safetensors; do
    step generate "$(basename "$file")"
    "$python" "$root/generate.py" --checkpoint_path "$file" --prompt "Once upon a time" --max_new_tokens 30 --seed 1
    step eval "$(basename "$file")"
    "$python" "$root/eval.py" --checkpoint_path "$file" --perplexity "$text" --quiet
done
