"""What other numbers of experts a token cost: a table of perplexity by --experts_per_token.

    python mixtral-moe/perplexity.py --checkpoint_path MODEL --text FILE --experts_per_token 1 2 4

Fewer experts read fewer bytes, and are another model than the one that was trained: no speed with fewer experts should
be told without this table. Perplexity is ../eval.py's, over windows of the text.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import experts  # noqa: E402
from cli import positive  # noqa: E402
from eval import perplexity, read_text  # noqa: E402
from figures import bytes_per_token  # noqa: E402
from generate import load_model  # noqa: E402


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Perplexity by number of experts a token.", allow_abbrev=False)
    p.add_argument("--checkpoint_path", required=True, help="a mixture of experts: folder, file or hub id")
    p.add_argument("--text", required=True, help="a text file, or .jsonl with a \"text\" a line")
    p.add_argument("--experts_per_token", type=positive, nargs="+", help="default: 1 up to all")
    p.add_argument("--max_seq_length", type=int, default=0, help="tokens of a window; default: the model's, at most 2048")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    p.add_argument("--device", default="auto")
    return p


def main(argv: list[str] | None = None) -> int:
    o = parser().parse_args(argv)
    try:
        model, tokenizer = load_model(o.checkpoint_path, o.device, o.dtype)
        layers, X = experts.layers(model), model.args.n_experts
        if not layers:
            raise ValueError(f"'{o.checkpoint_path}' has no experts")
        numbers = o.experts_per_token or range(1, X + 1)
        if max(numbers) > X:
            raise ValueError(f"--experts_per_token {max(numbers)}: the model has {X} experts a layer")
        text = read_text(o.text)
        print("| experts a token | MB a token | perplexity | bits per byte |\n|---:|---:|---:|---:|")
        for k in numbers:
            for layer in layers:
                layer.active = k
            found = perplexity(model, tokenizer, text, length=o.max_seq_length)
            trained = " (as trained)" if k == model.args.active_experts else ""
            print(f"| {k}{trained} | {bytes_per_token(model) / 1e6:,.1f} | {found['perplexity']:.4g} | "
                  f"{found['bits_per_byte']:.4f} |", flush=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
