"""What fits where: for a mixture's config.json, the memory that offloading needs and the speed it can reach.

    python mixtral-moe/fits.py --config scripts/shapes/mixtral-8x7b.json --vram_gb 8 16 24

One line for each precision and device memory: bytes on the device and on the host, the share of experts that have a
copy on the device, and tokens a second: 1 / (bytes read on the device / its bandwidth + bytes of active experts without
a copy / the host's bandwidth + a wait per layer). It is arithmetic, an upper bound: routing is taken as uniform, and
prefill is another matter. Bandwidths are measured here unless they are given.
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

import offload  # noqa: E402
from benchmark import tensor_names  # noqa: E402
from checkpoint import CheckpointError, args_from, weight_bytes  # noqa: E402
from figures import probe_bandwidth  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402
from quantize import empty_layer  # noqa: E402

MODES = {"bfloat16": {}, "int8": {"mode": "int8", "scale_dtype": "float32"},
         "int4.g128": {"mode": "int4", "groupsize": 128, "zeros": True}, "int4.g32": {"mode": "int4", "groupsize": 32, "zeros": True}}
WAIT = 50e-6            # seconds: a layer's ids to the host and its sum back


def shape_of(args: ModelArgs, spec: dict) -> Transformer:
    """The model on the meta device, all linear layers in one mode; no bytes are needed for it."""
    with torch.device("meta"):
        model = Transformer(args)
        for name, module in list(model.named_modules()) if spec else []:
            if type(module) is torch.nn.Linear:
                parent, _, leaf = name.rpartition(".")
                layer = empty_layer(module.in_features, module.out_features, bias=module.bias is not None, **spec)
                setattr(model.get_submodule(parent), leaf, layer)
    return model


def line(model: Transformer, mode: str, vram_gb: float, device_gbs: float, host_gbs: float) -> dict:
    """One row of the table; tok_s is None where the device cannot hold what must be there."""
    args = model.args
    s = offload.sizes(model, torch.bfloat16)
    room = vram_gb * 1e9 - s.device
    copies = max(0, min(int(room // s.expert), s.each * len(s.layers)))
    share = copies / (s.each * len(s.layers))
    active = s.expert * args.active_experts * len(s.layers)
    unread = () if args.tied else ("tok_embeddings.weight",)
    dense = weight_bytes(model, torch.bfloat16, [n for n in model.state_dict() if not offload.is_expert(n) and n not in unread])
    seconds = (dense + share * active) / device_gbs / 1e9 + (1 - share) * active / host_gbs / 1e9
    seconds += WAIT * len(s.layers) if share < 1 else 0
    return {"mode": mode, "vram_gb": vram_gb, "device_gb": (s.device + copies * s.expert) / 1e9, "host_gb": s.host / 1e9,
            "share": share, "tok_s": 1 / seconds if room >= 0 else None}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="What fits where, for a mixture of experts.", allow_abbrev=False)
    p.add_argument("--config", required=True, help="a config.json")
    p.add_argument("--vram_gb", type=float, nargs="+", default=[8, 12, 16, 24, 48, 80], help="device memory, in GB")
    p.add_argument("--device_gbs", type=float, help="GB a second that the device reads; default: measured")
    p.add_argument("--host_gbs", type=float, help="GB a second that the host reads; default: measured")
    return p


def main(argv: list[str] | None = None) -> int:
    o = parser().parse_args(argv)
    try:
        config = json.loads(Path(o.config).read_text())
        args, _ = args_from(config, dict.fromkeys(tensor_names(config)))
        host = o.host_gbs or probe_bandwidth(torch.device("cpu")) / 1e9
        device = o.device_gbs or (probe_bandwidth(torch.device("cuda")) / 1e9 if torch.cuda.is_available() else host)
        shapes = {mode: shape_of(args, spec) for mode, spec in MODES.items()}
        rows = [line(model, mode, vram, device, host) for mode, model in shapes.items() for vram in o.vram_gb]
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        print(f"error: {o.config}: {error}", file=sys.stderr)
        return 1
    print(f"device {device:,.0f} GB/s, host {host:,.0f} GB/s")
    print("| weights | device memory | of it used | host | experts on the device | tok/s at most |\n|---|---:|---:|---:|---:|---:|")
    for r in rows:
        speed = f"{r['tok_s']:.1f}" if r["tok_s"] else "does not fit"
        print(f"| {r['mode']} | {r['vram_gb']:g} GB | {r['device_gb']:.1f} GB | {r['host_gb']:.1f} GB | {r['share']:.0%} | {speed} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
