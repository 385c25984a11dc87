"""Text from a mixture of experts: the root's generate.py, and flags that only mixtures need.

    python mixtral-moe/generate.py --checkpoint_path MODEL --offload_experts --vram_gb 8

What it is not: another loop or another model. Flags, prompts, chat and figures are ../cli.py's; where experts are and
how they run is in offload.py, which is what to read next.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]            # the root's `generate` before this file

import cli  # noqa: E402
import experts  # noqa: E402
import offload  # noqa: E402
import ranks  # noqa: E402

OFFLOAD = ("vram_gb", "expert_path", "expert_stats", "expert_file")


def parser() -> argparse.ArgumentParser:
    p = cli.parser()
    add = p.add_argument
    add("--offload_experts", action="store_true", help="experts in host memory, everything else on the device")
    add("--vram_gb", type=float, help="device memory to use, in GB: experts that fit have a copy there; default: on CUDA "
        "what is free, else none")
    add("--expert_path", choices=["cpu", "stream", "auto"],
        help="where offloaded experts run: where they are, on the device as they stream past, or as measured at the "
             "start, by the number of tokens; default: auto")
    add("--expert_stats", metavar="FILE", help="count which experts are wanted, there; the most wanted get the copies")
    add("--expert_file", metavar="FILE", help="keep the experts in this file, packed, and map it: written if it is not there")
    add("--experts_per_token", type=cli.positive, metavar="K", help="run another number of experts than the model was trained "
        "for: faster or slower, and worse; README.md has a table")
    return p


def load(o: argparse.Namespace, report: dict):
    if o.offload_experts:
        model, tokenizer, store = offload.load(
            o.checkpoint_path, o.device, o.dtype, vram_gb=o.vram_gb, how=o.expert_path or "auto", stats=o.expert_stats,
            file=o.expert_file, trust_architecture=o.trust_architecture)
        o.traffic = store.traffic
        report["offload"] = store.traffic.report
        cli.say(o, f"experts on the host: {store.traffic.report['experts']}, {store.traffic.report['copies']} of them with a "
                   f"copy on {store.device}" + (f"; up to {store.few} tokens the host multiplies" if 0 < store.few < 1e9 else ""))
    else:
        model, tokenizer = cli.load(o, report)
    if o.experts_per_token:
        use_experts(model, o.experts_per_token)
        report["experts_per_token"] = o.experts_per_token
        cli.say(o, f"warning: {o.experts_per_token} experts a token instead of {model.args.active_experts}: not the model that "
                   "was trained; see the perplexities in mixtral-moe/README.md")
    return model, tokenizer


def use_experts(model, k: int):
    """Run k experts a token in every layer. Raises ValueError where there are not as many."""
    layers = experts.layers(model)
    if not layers:
        raise ValueError("--experts_per_token: this model has no experts")
    if k > model.args.n_experts:
        raise ValueError(f"--experts_per_token {k}: the model has {model.args.n_experts} experts a layer")
    for layer in layers:
        layer.active = k


def main(argv: list[str] | None = None) -> int:
    ranks.hush()
    p = parser()
    o = p.parse_args(argv)
    lone = [name for name in OFFLOAD if getattr(o, name) is not None and not o.offload_experts]
    if lone:
        p.error(f"--{lone[0]} belongs to --offload_experts")
    if o.vram_gb is not None and not o.vram_gb >= 0:
        p.error(f"--vram_gb is {o.vram_gb}; it must be 0 or more")
    kept = {}

    def load_and_keep(o, report):
        loaded = load(o, report)
        kept.update(traffic=getattr(o, "traffic", None))
        return loaded
    code = cli.main(argv, parser(), load_and_keep)
    traffic = kept.get("traffic")
    if traffic and code in (0, 130):
        r = traffic.report
        cli.say(o, f"of {r['wanted']:,} experts wanted, {r['resident']:,} had a copy on the device"
                   f" and {r['streamed']:,} streamed past")
        if o.expert_stats and ranks.rank() == 0:
            traffic.save(o.expert_stats)
    return code


if __name__ == "__main__":
    sys.exit(main())
