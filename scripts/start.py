"""From the shell to the first token: seconds of `python generate.py --compile`, with nothing built, without a compiled graph,
and warm.

    python scripts/start.py --checkpoint_path DIR

What it is: the same command in processes of its own, each with caches in a temporary folder: first an empty one, as on a
new machine; then one that holds the CPU kernels; then as the run before left it. The weights are read once before, so that
all find them in the page cache. What it is not: a benchmark of steps; that is benchmark.py.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli import positive  # noqa: E402


def first_token(o: argparse.Namespace, caches: Path) -> float:
    """Seconds until the first byte of text; ValueError with the program's last line if there is none."""
    place = {"TORCH_EXTENSIONS_DIR": caches / "kernels", "TRITON_CACHE_DIR": caches / "triton",
             "TORCHINDUCTOR_CACHE_DIR": caches / "graphs", "TMPDIR": caches / "tmp"}
    for folder in place.values():
        folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "generate.py"), "--compile", "--checkpoint_path", o.checkpoint_path, "--prompt", o.prompt,
               "--max_new_tokens", "8", "--ignore_eos", "--device", o.device]
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {k: str(v) for k, v in place.items()})
        there = run.stdout.read(1)
        seconds = time.perf_counter() - began
        run.communicate()
        if run.returncode or not there:
            errors.seek(0)
            raise ValueError((errors.read().decode().strip() or "it printed nothing").splitlines()[-1].removeprefix("error: "))
    return seconds


def measure(o: argparse.Namespace) -> dict[str, list[float]]:
    found = {"nothing built": [], "no graph": [], "warm": []}
    for file in Path(o.checkpoint_path).glob("*.safetensors"):
        with file.open("rb") as weights:
            while weights.read(1 << 24):
                pass
    for _ in range(o.rounds):
        with tempfile.TemporaryDirectory() as folder:
            caches = Path(folder)
            found["nothing built"].append(first_token(o, caches))
            shutil.rmtree(caches / "graphs")
            found["no graph"].append(first_token(o, caches))
            found["warm"].append(first_token(o, caches))
    return found


def main() -> int:
    p = argparse.ArgumentParser(description="Seconds from the shell to the first token, cold and warm.")
    p.add_argument("--checkpoint_path", required=True)
    p.add_argument("--prompt", default="Once upon a time")
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=positive, default=1)
    p.add_argument("--json", action="store_true")
    o = p.parse_args()
    try:
        found = measure(o)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found) if o.json else "\n".join(
        f"{name:<14s} {', '.join(f'{seconds:.1f}' for seconds in times)} s" for name, times in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
