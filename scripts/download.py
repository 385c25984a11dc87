"""Download what is needed of a model on Hugging Face's hub: weights (safetensors, or pickles where there are
none), config and tokenizer.

    python scripts/download.py meta-llama/Llama-3.2-1B

generate.py accepts the hub's id as well and then uses the shared cache; this script makes a plain folder
instead, checkpoints/<org>/<name> beside this repository's files. Nothing is loaded here: see checkpoint.py
for that.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import CheckpointError, download


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repo_id", help="org/name on huggingface.co")
    parser.add_argument("--token", help="access token for gated and private models (default: HF_TOKEN)")
    parser.add_argument("--dir", type=Path, help="target folder (default: checkpoints/<repo_id> in the repository)")
    args = parser.parse_args()
    if args.repo_id.count("/") != 1:
        parser.error(f"'{args.repo_id}' is no hub id: it must read org/name")
    try:
        print(download(args.repo_id, folder=args.dir or ROOT / "checkpoints" / args.repo_id, token=args.token))
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
