"""How cost grows: a page of tables and three plots, by precision, batch, context length and model size.

    python scripts/scaling.py --out scaling/README.md

What is measured here stands beside what a model predicts: a step takes the bytes it reads, weights and the filled part of
the cache, over the bandwidth probed around it. The page marks which is which. Random weights, eager steps, greedy;
medians of rounds that alternate with the probe. Plots are SVG files beside the page, written by hand, without a library.
What it is not: a comparison with others; that is `benchmark.py --against`.
"""
import argparse
import statistics
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # as in generate.py

import torch  # noqa: E402

from benchmark import decode_work, random_model, seconds  # noqa: E402
from cli import positive  # noqa: E402
from figures import bytes_per_token, probe_bandwidth  # noqa: E402
from generate import EAGER, pick_device, run_prefill  # noqa: E402
from tables import machine  # noqa: E402

SHAPES = ["stories15m", "llama-3.2-1b", "llama-3.2-3b"]
MODES = {"": "bfloat16", "int8": "int8", "int4": "int4, groups of 32"}
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (128, 512, 2048, 8192, 32768)
BEYOND = ((8.03e9, "Llama-3.1-8B"), (70.6e9, "Llama-3.1-70B"))        # weights a token, for the modelled rows


def median_steps(model, cases: list[tuple[int, int, int]], rounds: int) -> list[tuple[float, float]]:
    """cases: (rows, tokens behind, steps a round). For each, seconds of a step, and bytes a second that were probed around
    it. They take turns, so that all see the same minutes."""
    works = [decode_work(model, EAGER, rows, filled, steps, filled + steps) for rows, filled, steps in cases]
    times, probes = [[] for _ in cases], [[] for _ in cases]
    for work in works:
        work()
    for _ in range(rounds):
        for (_, _, steps), work, taken, probed in zip(cases, works, times, probes):
            probed.append(probe_bandwidth(model.norm.weight.device, repeats=2))
            taken.append(seconds(work) / steps)
    model.drop_caches()
    return [(statistics.median(taken), statistics.median(probed)) for taken, probed in zip(times, probes)]


def cache_bytes(model, tokens: int) -> int:
    a = model.args
    return 2 * a.n_layers * a.n_kv_heads * a.head_dim * tokens * model.norm.weight.itemsize


# ---- measurements ------------------------------------------------------------------------------------------

@torch.no_grad()
def measure(o: argparse.Namespace) -> dict:
    device, dtype = pick_device(o.device), torch.bfloat16
    found = {"precision": [], "batch": {}, "context": [], "size": []}
    for mode in MODES:
        model = random_model(str(ROOT / f"scripts/shapes/{o.shape}.json"), device, dtype, mode)
        steps = median_steps(model, [(rows, 100, max(2, o.steps // rows)) for rows in BATCHES], o.rounds)
        found["batch"][mode] = [(rows, rows / step, step, probe) for rows, (step, probe) in zip(BATCHES, steps)]
        say(f"{o.shape} {MODES[mode]}: {', '.join(f'{speed:.1f}' for _, speed, *_ in found['batch'][mode])} tok/s")
        prefill = statistics.median(seconds(lambda: run_prefill(model, EAGER, [[1] * 512])) for _ in range(o.rounds))
        _, speed, step, probe = found["batch"][mode][0]
        found["precision"].append((mode, bytes_per_token(model), speed, bytes_per_token(model) / step / probe, 512 / prefill, probe))
        if not mode:
            contexts = [c for c in CONTEXTS if c <= o.longest]
            for filled, (step, probe) in zip(contexts, median_steps(model, [(1, c - o.steps, o.steps) for c in contexts], o.rounds)):
                found["context"].append((filled, step, probe, bytes_per_token(model), cache_bytes(model, filled)))
                say(f"{o.shape}, {filled} tokens behind: {1e3 * step:.1f} ms")
    for shape in o.shapes:
        model = random_model(str(ROOT / f"scripts/shapes/{shape}.json"), device, dtype)
        [(step, probe)] = median_steps(model, [(1, 100, o.steps)], o.rounds)
        found["size"].append((shape, bytes_per_token(model), step, probe))
        say(f"{shape}: {1 / step:.1f} tok/s")
    return found


def say(text: str):
    print(text, file=sys.stderr, flush=True)


# ---- the page ----------------------------------------------------------------------------------------------

def page(o: argparse.Namespace, found: dict) -> str:
    on = machine(pick_device(o.device).type == "cuda")
    lines = ["# How cost grows", "", f"Made by `python scripts/scaling.py` on {on}. Shape {o.shape} unless said otherwise, "
             "random weights, batch 1, eager steps, medians. *Modelled*: bytes read / bandwidth probed around the measurement.", "",
             "## Precision", "", "| weights | MB a token | decode | share of the probe | prefill of 512 |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {MODES[m]} | {b / 1e6:,.0f} | {s:.1f} tok/s | {share:.0%} of {probe / 1e9:.1f} GB/s | {p:.0f} tok/s |"
              for m, b, s, share, p, probe in found["precision"]]
    lines += ["", "![tokens a second against bytes a token](scaling-precision.svg)", "", "## Batch", "",
              "Tokens a second of all rows together, and a step's time over one row's:", "",
              "| rows | " + " | ".join(MODES.values()) + " |", "|---:|" + "---:|" * len(MODES)]
    one = {mode: found["batch"][mode][0][2] for mode in MODES}
    for i, rows in enumerate(BATCHES):
        cells = [f"{found['batch'][m][i][1]:.1f} tok/s, {found['batch'][m][i][2] / one[m]:.2f} x" for m in MODES]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    lines += ["", "![tokens a second against batch](scaling-batch.svg)", "", "## Context", "",
              "| tokens behind | a step, measured | modelled | the cache's share of the bytes |", "|---:|---:|---:|---:|"]
    for filled, step, probe, weights, cache in found["context"]:
        lines.append(f"| {filled:,} | {1e3 * step:.1f} ms | {1e3 * (weights + cache) / probe:.1f} ms | {cache / (weights + cache):.0%} |")
    filled, step, probe, weights, cache = found["context"][-1]
    for beyond in (c for c in CONTEXTS if c > filled):
        more = cache * beyond / filled
        lines.append(f"| {beyond:,} | not measured | {1e3 * (weights + more) / probe:.1f} ms | {more / (weights + more):.0%} |")
    lines += ["", "![a step's time against tokens behind](scaling-context.svg)", "", "## Model size", "", "| shape, bfloat16 | MB a token | decode, measured | modelled |", "|---|---:|---:|---:|"]
    lines += [f"| {s} | {b / 1e6:,.0f} | {1 / step:.1f} tok/s | {probe / b:.1f} tok/s |" for s, b, step, probe in found["size"]]
    share = statistics.median(b / step / probe for _, b, step, probe in found["size"][1:] or found["size"])
    probe = found["size"][-1][3]
    lines += [f"| {name} | {2 * n / 1e6:,.0f} | not measured | {share * probe / 2 / n:.2f} tok/s, at the {share:.0%} of the above |"
              for n, name in BEYOND]
    lines += ["", "## Ranks", "", "Measured for one and two ranks, and modelled beyond, in the root's [README](../README.md#several-ranks)."]
    return "\n".join(lines) + "\n"


# ---- plots -------------------------------------------------------------------------------------------------

def plot(title: str, x_name: str, y_name: str, series: dict[str, list[tuple[float, float]]], dashed=()) -> str:
    """An SVG of lines and dots on two logarithmic axes to the base of 2. series: name -> points; dashed: without dots."""
    import math
    W, H, left, right, top, bottom = 640, 400, 70, 170, 40, 50
    points = [p for line in series.values() for p in line]
    (x0, x1), (y0, y1) = ((math.floor(math.log2(min(v))), math.ceil(math.log2(max(v)))) for v in zip(*points))
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + (math.log2(x) - x0) / (x1 - x0) * (W - left - right),
                H - bottom - (math.log2(y) - y0) / (y1 - y0) * (H - top - bottom))
    colors = ("#1f6fb2", "#c2571a", "#2b8a3e", "#777777", "#7b3fa0")
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="12">',
           f'<rect width="{W}" height="{H}" fill="white"/>', f'<text x="{left}" y="22" font-size="14">{title}</text>']
    for e in range(x0, x1 + 1):
        x, y = at(2 ** e, 2 ** y0)
        out += [f'<path d="M{x:.1f} {y:.1f}V{top}" stroke="#ddd"/>', f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{2 ** e:g}</text>']
    for e in range(y0, y1 + 1):
        x, y = at(2 ** x0, 2 ** e)
        out += [f'<path d="M{x:.1f} {y:.1f}H{W - right}" stroke="#ddd"/>', f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{2 ** e:g}</text>']
    out += [f'<text x="{(left + W - right) / 2}" y="{H - 12}" text-anchor="middle">{x_name}</text>',
            f'<text transform="translate(18 {(top + H - bottom) / 2}) rotate(-90)" text-anchor="middle">{y_name}</text>']
    for i, (name, line) in enumerate(series.items()):
        color, style = colors[i % len(colors)], ' stroke-dasharray="5 4"' if name in dashed else ""
        path = "L".join("{:.1f} {:.1f}".format(*at(*p)) for p in line)
        out.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"{style}/>')
        out += ['<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="{}"/>'.format(*at(*p), color) for p in line if name not in dashed]
        y = top + 14 + 20 * i
        out.append(f'<path d="M{W - right + 12} {y - 4}h18" stroke="{color}" stroke-width="2"{style}/>'
                   f'<text x="{W - right + 36}" y="{y}">{name}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def plots(found: dict) -> dict[str, str]:
    p = found["precision"]
    probe = statistics.median(row[-1] for row in p)
    sizes = [row[1] / 1e6 for row in p]
    line = [(mb, probe / mb / 1e6) for mb in (max(sizes), min(sizes))]
    speeds = {MODES[row[0]]: [(row[1] / 1e6, row[2])] for row in p}
    name = f"bandwidth, {probe / 1e9:.0f} GB/s"
    context = {"measured": [(filled, 1e3 * step) for filled, step, *_ in found["context"]],
               "modelled": [(filled, 1e3 * (weights + cache) / probe) for filled, _, probe, weights, cache in found["context"]]}
    return {"scaling-precision.svg": plot("Decode against the bandwidth line", "MB read a token", "tok/s", {name: line} | speeds, (name,)),
            "scaling-batch.svg": plot("Tokens a second of all rows", "rows", "tok/s", {
                MODES[mode]: [(rows, speed) for rows, speed, *_ in found["batch"][mode]] for mode in MODES}),
            "scaling-context.svg": plot("A step's time, bfloat16, one row", "tokens behind", "ms", context, ("modelled",))}


def main() -> int:
    p = argparse.ArgumentParser(description="How cost grows with precision, batch, context and size.", allow_abbrev=False)
    p.add_argument("--out", type=Path, default=ROOT / "scaling/README.md", help="the page; plots go beside it")
    shapes = sorted(path.stem for path in (ROOT / "scripts/shapes").glob("*.json"))
    p.add_argument("--shape", default="llama-3.2-1b", choices=shapes, metavar="SHAPE", help="of scripts/shapes")
    p.add_argument("--shapes", nargs="+", default=SHAPES, choices=shapes, metavar="SHAPE", help="for the table of sizes")
    p.add_argument("--device", default="auto")
    p.add_argument("--steps", type=positive, default=16, help="steps a round")
    p.add_argument("--rounds", type=positive, default=5)
    p.add_argument("--longest", type=int, default=32768, choices=CONTEXTS, help="longest context to measure")
    o = p.parse_args()
    if o.steps > CONTEXTS[0]:
        p.error(f"argument --steps: {o.steps} steps do not fit into the shortest context, {CONTEXTS[0]} tokens")
    try:
        o.out.parent.mkdir(parents=True, exist_ok=True)         # what cannot be written is told before minutes are spent
        found = measure(o)
        o.out.write_text(page(o, found))
        for name, svg in plots(found).items():
            (o.out.parent / name).write_text(svg)
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return 1
    print(o.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
