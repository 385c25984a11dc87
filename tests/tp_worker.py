"""One rank of the tests in test_tp.py: runs every case and saves what it found. torchrun starts it, or one process."""
import os
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ranks  # noqa: E402
import tp  # noqa: E402
from checkpoint import load_checkpoint, weight_bytes  # noqa: E402
from experts import pack_model  # noqa: E402
from figures import bytes_per_token  # noqa: E402
from generate import compile_steps, generate  # noqa: E402
from speculate import Speculation  # noqa: E402

PROMPTS = [list(range(3, 23)), [5, 9, 40], list(range(60, 50, -1))]


class CopyCount(TorchDispatchMode):
    """Bytes that copies read: what a rank looks at of a mapped file."""
    read = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.read += args[1].nbytes
        return function(*args, **(kwargs or {}))


def load(path: Path, dtype: str):
    counter = CopyCount()
    with counter:
        model = load_checkpoint(path, dtype=getattr(torch, dtype), cut=tp.cut if ranks.size() > 1 else None)
    held = weight_bytes(model)
    pack_model(model)
    if ranks.size() > 1:
        tp.connect(model)
    model.end_ids, model.generation_config, model.limit = set(), {}, 256
    return model, counter.read, held


class NoText:
    vocab_size, eos_ids = 1000, set()

    def detokenizer(self, prompt_ids=()):
        return self

    def push(self, token: int = 0) -> str:
        return ""

    flush = push

    def turn_end_ids(self):
        return set()


@torch.no_grad()
def run_case(path: Path, dtype: str) -> dict:
    """Logits of a batch without a cache, in chunks and steps with one, and greedy texts of unlike prompts."""
    model, read, held = load(path, dtype)
    tokens = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(1))
    found = {"whole": model(tokens), "read": read, "held": held, "step_bytes": bytes_per_token(model)}
    model.setup_caches(3, 24)
    parts = [(0, 7), (7, 20), *((i, i + 1) for i in range(20, 24))]
    found["parts"] = torch.cat([model(tokens[:, a:b], torch.arange(a, b)) for a, b in parts], 1)
    model.drop_caches()
    found["ids"] = [row.ids for row in generate(model, NoText(), PROMPTS, max_new_tokens=12, temperature=0)]
    found["drawn"] = [row.ids for row in generate(model, NoText(), PROMPTS, max_new_tokens=12, seed=3 + ranks.rank())]
    return found


@torch.no_grad()
def run_speculation(path: Path, draft_path: Path) -> dict:
    """220 tokens with a draft, drawn and adaptive: where ranks drift apart, they wait for each other for ever."""
    model, draft = load(path, "float32")[0], load(draft_path, "float32")[0]
    began = time.perf_counter()
    greedy = generate(model, NoText(), [PROMPTS[0]], max_new_tokens=220, temperature=0, speculation=Speculation(draft, 3))
    drawn = generate(model, NoText(), PROMPTS, max_new_tokens=200, seed=ranks.rank(), speculation=Speculation(draft, "auto"))
    return {"ids": greedy[0].ids, "drawn": [row.ids for row in drawn], "seconds": time.perf_counter() - began}


@torch.no_grad()
def run_compiled(path: Path) -> dict:
    model = load(path, "float32")[0]
    rows = generate(model, NoText(), PROMPTS, max_new_tokens=12, temperature=0, steps=compile_steps())
    return {"ids": [row.ids for row in rows]}


def main(folder: Path, out: Path, *only: str):
    ranks.start("cpu")
    found = {}
    for path in sorted(p for p in folder.iterdir() if not only or p.name in only):
        for dtype in ("float32", "bfloat16") if path.name in ("llama", "int8", "int4") else ("float32",):
            found[f"{path.name}-{dtype}"] = run_case(path, dtype)
    if not only:
        found["speculation"] = run_speculation(folder / "llama", folder / "tied")
        found["compiled"] = run_compiled(folder / "llama") if ranks.size() == 2 else {}
    torch.save(found, f"{out}.{ranks.rank()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    if "RANK" in os.environ and ranks.size() > 1:
        torch.distributed.destroy_process_group()
