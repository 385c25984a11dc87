"""What offloading costs, or gains, here: decode and prefill of a shape with random weights, by expert path.

    python mixtral-moe/benchmark.py --config scripts/shapes/olmoe-half.json --mode int8

The same model runs with its experts at home (on a machine without an accelerator, where home is the host), offloaded with
the host multiplying, and offloaded with the experts streaming past; rounds alternate with a probe of the host's
bandwidth. Random routers spread tokens evenly, so that copies are hit by chance only. With a GPU the experts are not at
home in any row.
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "scripts"), str(HERE)]

import torch  # noqa: E402

import experts  # noqa: E402
import offload  # noqa: E402
import quantize  # noqa: E402
from figures import bytes_per_token, peak_memory, probe_bandwidth  # noqa: E402
from generate import EAGER, compile_steps, make_room, pick_device, run_prefill  # noqa: E402
from model import MoEFeedForward, Transformer  # noqa: E402


def offload_random(model: Transformer, device: torch.device, copies: int) -> tuple[Transformer, offload.Store]:
    """Move all but the experts to the device; each layer's first `copies` experts have one there too."""
    for block in model.layers:
        layer = block.feed_forward
        if isinstance(layer, MoEFeedForward):
            kept, layer.experts = layer.experts, torch.nn.ModuleList()
            block.to(device)
            layer.experts = kept
        else:
            block.to(device)
    for part in (model.tok_embeddings, model.norm, model.ropes, *([model.output] if model.output is not None else [])):
        part.to(device)
    sparse = experts.layers(model)
    traffic = offload.Traffic(torch.zeros(len(sparse), model.args.n_experts, dtype=torch.int64))
    store = offload.Store(device, traffic, math.inf)

    def finish(block):
        layer = getattr(block, "feed_forward", None)
        if isinstance(layer, MoEFeedForward):
            at = next(i for i, other in enumerate(sparse) if other is layer)
            layer.run = offload.Offloaded(layer, store, list(range(copies)), traffic.counts[at])
    return quantize.pack_model(model, finish), store


@torch.no_grad()
def measure(o: argparse.Namespace) -> dict:
    from benchmark import decode_work, random_model, seconds
    device = pick_device(o.device)
    model = random_model(o.config, torch.device("cpu"), torch.bfloat16, o.mode, o.groupsize, pack=lambda model: model)
    model, store = offload_random(model, device, o.copies)
    offloaded = [layer.run for layer in experts.layers(model)]
    home = [run.stacked or run for run in offloaded]
    steps = compile_steps() if o.compile else EAGER
    make_room(model, 1, max(o.prompt_tokens, 100 + o.new_tokens))
    decode = decode_work(model, steps, 1, 100, o.new_tokens, 100 + o.new_tokens)

    def prefill():
        run_prefill(model, EAGER, [[7] * 3 + torch.randint(model.args.vocab_size, (o.prompt_tokens - 3,)).tolist()])[0, 0].item()

    def use(how: str):
        store.few = 0 if how == "stream" else math.inf
        for layer, run in zip(experts.layers(model), home if how == "resident" else offloaded):
            layer.run = run
    ways = (["resident"] if device.type == "cpu" else []) + ["cpu", "stream"]
    times = {how: {"decode": [], "prefill": []} for how in ways}
    probes = []
    for how in ways:
        use(how)
        decode(), prefill()
    for _ in range(o.rounds):
        probes.append(probe_bandwidth(torch.device("cpu"), repeats=3))
        for how in ways:
            use(how)
            times[how]["decode"].append(seconds(decode) / o.new_tokens)
            times[how]["prefill"].append(seconds(prefill))
    read, probe = bytes_per_token(model), statistics.median(probes)
    rows = {how: {"decode_tok_s": 1 / statistics.median(t["decode"]), "prefill_tok_s": o.prompt_tokens / statistics.median(t["prefill"]),
                  "share_of_host_bandwidth": read / statistics.median(t["decode"]) / probe} for how, t in times.items()}
    return {"config": o.config, "mode": o.mode or "bfloat16", "device": str(device), "bytes_per_token": read, "copies": o.copies,
            "host_probe_gbs": probe / 1e9, "peak_device_bytes": peak_memory(device), "torch": torch.__version__, "ways": rows}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Decode and prefill by expert path, random weights.", allow_abbrev=False)
    p.add_argument("--config", default=str(HERE.parent / "scripts/shapes/olmoe-half.json"), help="a config.json")
    p.add_argument("--mode", default="", choices=["", "int8", "int4"], help="of the weights; default: bfloat16")
    p.add_argument("--groupsize", type=int, default=32, help="of int4")
    p.add_argument("--device", default="auto")
    p.add_argument("--copies", type=int, default=0, help="experts of each layer with a copy on the device")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--prompt_tokens", type=int, default=512)
    p.add_argument("--new_tokens", type=int, default=20)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", action="store_true")
    return p


def main(argv: list[str] | None = None) -> int:
    o = parser().parse_args(argv)
    try:
        found = measure(o)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if o.json:
        print(json.dumps(found))
        return 0
    print(f"{Path(o.config).stem} {found['mode']} on {found['device']}, {found['bytes_per_token'] / 1e6:,.0f} MB a token, host "
          f"{found['host_probe_gbs']:.1f} GB/s, peak {found['peak_device_bytes'] / 1e9:.2f} GB, torch {found['torch']}")
    for how, r in found["ways"].items():
        print(f"{how:<9s} decode {r['decode_tok_s']:7.1f} tok/s, {100 * r['share_of_host_bandwidth']:.0f} % of the host's; "
              f"prefill of {o.prompt_tokens} {r['prefill_tok_s']:7.1f} tok/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
