#!/usr/bin/env bash
# Download a model, convert it to one file and quantize it:   scripts/prepare.sh meta-llama/Llama-3.2-1B
# A folder that is here already is not downloaded. HF_TOKEN opens gated models; PYTHON names the interpreter.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 ORG/NAME | FOLDER" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
folder=$1
if [ ! -d "$folder" ]; then
    folder=$root/checkpoints/$1
    "$python" "$root/scripts/download.py" "$1" --dir "$folder"
fi
"$python" "$root/scripts/convert_hf_checkpoint.py" --checkpoint_dir "$folder"
"$python" "$root/quantize.py" --checkpoint_path "$folder/model_fast.safetensors" --mode int8
