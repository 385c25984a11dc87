"""Rewrite a checkpoint as one file that describes itself: weights fused as model.py wants them, config
inside.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

Converting is not needed to generate text, as checkpoint.py loads a Hugging Face folder as it is; one file is
handier to copy, and quantize.py starts from one. Anything that loads can be converted: folders, .bin, .pt,
.pth.

The default name is model_fast.safetensors, in the same folder: there the tokenizer's files lie beside it,
and it is none of the names that Hugging Face gives to weights, so that loading the folder still means the
original.
"""
import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from checkpoint import CheckpointError, load_checkpoint, open_source, resolve, save_checkpoint, weight_bytes

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENIZER = ("tokenizer*", "*.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
             "*.tiktoken", "*.jinja", "tekken.json", "tok*.bin")


def convert(checkpoint_dir: Path, dtype: torch.dtype | None = None, output: Path | None = None,
            trust_architecture: bool = False) -> Path:
    """Load `checkpoint_dir`, save it as `output`, see to the tokenizer beside it, and return the file's
    path."""
    source = open_source(resolve(checkpoint_dir))
    folder = source.path if source.path.is_dir() else source.path.parent
    output = output or folder / "model_fast.safetensors"
    if output.resolve() == source.path.resolve():
        raise CheckpointError(f"'{output}' cannot be converted into itself: give another --output")
    model = load_checkpoint(source.path, dtype=dtype, trust_architecture=trust_architecture)
    save_checkpoint(model, output, {"generation_config": source.generation_config, "source_config": source.config,
                                    "source": folder.name})
    for pattern in TOKENIZER:
        for file in folder.glob(pattern):
            if not (output.parent / file.name).exists():
                shutil.copyfile(file, output.parent / file.name)
    print(f"{weight_bytes(model) / 1e6:,.0f} MB of weights in {next(model.parameters()).dtype}", file=sys.stderr)
    return output


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="a folder or a file that generate.py loads")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as stored)")
    parser.add_argument("--output", type=Path,
                        help="a .safetensors or .pth file (default: model_fast.safetensors in the same folder)")
    parser.add_argument("--trust_architecture", action="store_true", help="load an unknown model_type as a Llama")
    parser.add_argument("--model_name", help="not needed: the checkpoint says what it is")
    args = parser.parse_args()
    if args.model_name:
        print("--model_name is ignored: config.json says what the model is", file=sys.stderr)
    try:
        print(convert(args.checkpoint_dir, DTYPES[args.dtype], args.output, args.trust_architecture))
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
