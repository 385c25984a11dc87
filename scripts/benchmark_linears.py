"""How fast is a linear layer here, by precision and number of rows?

    python scripts/benchmark_linears.py --rows 1 4 16 128 512

Times the four linear layers of a Llama-3.2-1B block with cold weights (several copies, larger than the caches),
all precisions in turn, and prints each time as a multiple of PyTorch's own bfloat16 product (`F.linear`), and for
one row the gigabytes of weights read in a second. What it is not: a model; see benchmark.py.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402

from cli import positive  # noqa: E402
from figures import probe_bandwidth  # noqa: E402
from kernels.cpu import PackedLinear, available  # noqa: E402
from quantize import Int4Linear, Int8Linear  # noqa: E402

SHAPES = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)]      # wqkv, wo, w13, w2: outputs, inputs


def layers(copies: int) -> dict[str, list[nn.Module]]:
    weights = [torch.randn(shape).mul_(0.02).bfloat16() for _ in range(copies) for shape in SHAPES]
    found = {"F.linear": []}
    for w in weights:
        plain = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(w, requires_grad=False)
        found["F.linear"].append(plain)
    if available():
        found["bfloat16"] = [PackedLinear(w) for w in weights]
    found["int8"] = [Int8Linear.quantize(w).pack() for w in weights]
    found["int4.g32"] = [Int4Linear.quantize(w, 32).pack() for w in weights]
    found["int4.g128"] = [Int4Linear.quantize(w, 128).pack() for w in weights]
    return found


def seconds(modules: list[nn.Module], inputs: dict[int, torch.Tensor]) -> float:
    began = time.perf_counter()
    for module in modules:
        module(inputs[module.in_features])
    return time.perf_counter() - began


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description="Time linear layers by precision and rows, alternating.")
    p.add_argument("--rows", type=positive, nargs="+", default=[1, 4, 16, 128, 512])
    p.add_argument("--rounds", type=positive, default=9)
    p.add_argument("--copies", type=positive, default=3, help="of the block's weights, so that none is in a cache")
    o = p.parse_args()
    found = layers(o.copies)
    print(f"{'rows':>5} {'probe':>10} " + " ".join(f"{name:>20}" for name in found))
    for rows in o.rows:
        inputs = {K: torch.randn(rows, K).bfloat16() for K in (2048, 8192)}
        times, probes = {name: [] for name in found}, []
        for _ in range(o.rounds):
            probes.append(probe_bandwidth(torch.device("cpu"), repeats=2) / 1e9)
            for name, modules in found.items():
                times[name].append(seconds(modules, inputs))
        reference = statistics.median(times["F.linear"])
        cells = []
        for name, modules in found.items():
            median = statistics.median(times[name])
            read = sum(t.nbytes for m in modules for t in [*m.parameters(), *m.buffers()])
            speed = f" {read / median / 1e9:5.1f} GB/s" if rows == 1 else ""
            cells.append(f"{median * 1e3:6.1f} ms {median / reference:4.2f}{speed}"[:26])
        print(f"{rows:>5} {statistics.median(probes):>5.1f} GB/s " + " ".join(f"{cell:>20}" for cell in cells),
              flush=True)


if __name__ == "__main__":
    main()
