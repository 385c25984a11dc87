"""The tables of speed in a page, all rows measured anew: what `benchmark.py --tables README.md` does.

What it is: two lists of rows, for a CPU and for a GPU, a `benchmark.py --json` for each row in a process of its own, and
Markdown between the marks `<!-- speed -->` and `<!-- /speed -->` of the page, or `<!-- gpu speed -->` and its end. What it is not: a benchmark; that is benchmark.py.
"""
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
INT8, INT4 = ["--mode", "int8"], ["--mode", "int4"]
ROWS = [                                # a shape of scripts/shapes, and flags
    *(("llama-3.2-1b", ["--compile", *mode]) for mode in (
        [], INT8, INT4, [*INT4, "--groupsize", "64"], [*INT4, "--groupsize", "128"])),
    *(("llama-3.2-1b", mode) for mode in ([], INT8, INT4)),
    *(("stories15m", ["--compile", "--new_tokens", "200", *mode]) for mode in ([], INT8)),
    *(("olmoe-half", ["--compile", *mode]) for mode in ([], INT8, INT4))]
GPU_ROWS = [(shape, ["--compile", "--prompt_tokens", "2048", "--new_tokens", "200", *mode, *more]) for shape, mode, more in (
    *(("llama-3.1-8b", mode, more) for mode in ([], INT8, [*INT4, "--groupsize", "128"])
      for more in ([], ["--stock"], ["--batch_size", "16"], ["--batch_size", "32"])),
    *(("llama-2-7b", mode, more) for mode in ([], INT8, INT4) for more in ([], ["--stock"])),
    *(("llama-3.1-70b", mode, []) for mode in (INT8, [*INT4, "--groupsize", "128"])))]
COMPARED = ("llama-3.2-1b", "stories15m")                                            # with others, where compiled


def machine(on_gpu: bool) -> str:
    """Processor or accelerator, versions, commit."""
    name = platform.processor() or platform.machine()
    if on_gpu:
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"Python {platform.python_version()}, commit {commit()}")


def commit() -> str:
    return subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def measure(shape: str, flags: list[str], more: list[str]) -> dict:
    """One run of benchmark.py; ValueError with its last line where it fails."""
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "--config", str(ROOT / f"scripts/shapes/{shape}.json")]
    done = subprocess.run([*command, *flags, *more, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip() or "it was killed").splitlines()[-1].removeprefix("error: "))
    found = json.loads(done.stdout)
    print(f"{shape} {' '.join(flags)}: {found['decode_tok_s']:.1f} tok/s, {found['share_of_bandwidth']:.0%} of "
          f"{found['bandwidth_probe_gbs']:.1f} GB/s", file=sys.stderr, flush=True)
    return found


def speed_table(rows: list[tuple[str, dict]]) -> list[str]:
    lines = ["| shape | weights | steps | MB a token | decode | share of the probe | "
             f"prefill of {rows[0][1]['prefill_tokens']:,} | first token |", "|---|---|---|---:|---:|---:|---:|---:|"]
    return lines + [
        f"| {shape} | {f['quant'] or f['dtype']} | {steps(f)} | {f['bytes_per_token'] / 1e6:,.0f} | "
        f"{f['decode_tok_s']:,.1f} tok/s | {f['share_of_bandwidth']:.0%} of {f['bandwidth_probe_gbs']:.1f} GB/s | "
        f"{f['prefill_tok_s']:,.0f} tok/s | {f['ttft_s']:.2f} s |" for shape, f in rows]


def steps(f: dict) -> str:
    """compiled, stock, of 16 rows"""
    words = ["compiled" if f["compile"] else "eager", "stock" if f["stock"] else "",
             f"of {f['batch_size']} rows" if f["batch_size"] > 1 else ""]
    return ", ".join(word for word in words if word)


def peer_table(rows: list[tuple[str, dict]]) -> list[str]:
    lines = ["", "| shape | ours | theirs | decode | theirs | ours / theirs | prefill of 512 | theirs | ours / theirs |",
             "|---|---|---|---:|---:|---:|---:|---:|---:|"]
    compared = [f"| {shape} | {f['quant'] or f['dtype']} | {p['name']} {p['version']} {p['kind']} | {f['decode_tok_s']:,.1f} tok/s | "
                f"{p['decode_tok_s']:,.1f} tok/s | {p['decode_ratio']:.2f} | {f['prefill_tok_s']:,.0f} tok/s | "
                f"{p['prefill_tok_s']:,.0f} tok/s | {p['prefill_ratio']:.2f} |" for shape, f in rows for p in f["peers"]]
    return lines + compared if compared else []


def write(page: Path, against: list[str], more: list[str], rows: list | None = None, on_gpu: bool = False):
    """Measure all rows and replace what stands between the page's marks. more: flags for every row."""
    text = page.read_text()
    kind, rows = "gpu speed" if on_gpu else "speed", rows or (GPU_ROWS if on_gpu else ROWS)
    begin, end = f"<!-- {kind} -->\n", f"<!-- /{kind} -->"
    if begin not in text or end not in text:
        raise ValueError(f"'{page}' has no lines {begin.strip()} and {end}, between which the tables go")
    found = []
    for shape, flags in rows:
        compared = against and shape in COMPARED and "--compile" in flags and "--groupsize" not in flags
        found.append((shape, measure(shape, flags, [*more, "--against", ",".join(against)] if compared else more)))
    lines = [f"{machine(on_gpu)}:", "", *speed_table(found), *peer_table(found)]
    before, rest = page.read_text().split(begin)                # it may have been edited meanwhile
    page.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1])
