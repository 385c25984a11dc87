"""How fast is it here? Times decode, prefill and compilation of a model shape beside the machine's read
bandwidth.

    python scripts/benchmark.py --config scripts/shapes/llama-3.2-1b.json --compile

The weights are random: speed does not depend on them, and any config.json of a dense Llama-like model will
do. Decode at batch 1 reads every weight once a token, so the ceiling is bandwidth / bytes per token. The
bandwidth of a shared machine drifts by a factor of two within minutes; hence everything is measured in rounds
that alternate with the probe, and medians and shares are what to compare. The last line of stdout is the
result, with --json as one object.

What it is not: a test of quality, or of sampling: decode here is greedy, forward and argmax and the host's
read of the id.
"""
import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # as in generate.py

import torch  # noqa: E402

import ranks  # noqa: E402
import tp  # noqa: E402
from checkpoint import args_from  # noqa: E402
from cli import not_negative, positive  # noqa: E402
from experts import pack_model  # noqa: E402
from figures import bytes_per_token, peak_memory, probe_bandwidth  # noqa: E402
from generate import compile_steps, decode_n_tokens, make_room, pick_device, run_prefill  # noqa: E402
from graphs import BLOCK  # noqa: E402
from model import Transformer  # noqa: E402
from quantize import GROUPSIZES, KINDS, describe  # noqa: E402
from peers import make_peers  # noqa: E402
from sampling import Sampler, Sampling  # noqa: E402
import tables  # noqa: E402


def tensor_names(config: dict) -> list[str]:
    """The names a Hugging Face folder of this config has: switches such as biases are read off them."""
    kind = config.get("model_type")
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if config.get("tie_word_embeddings") else ["lm_head.weight"]
    parts = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    parts += [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    X = config.get("num_local_experts") or config.get("num_experts") or 0
    parts += ["mlp.gate.weight"] if X else []
    parts += [f"mlp.{e}{p}_proj.weight" for e in ([f"experts.{e}." for e in range(X)] or [""]) for p in ("gate", "up", "down")]
    parts += [f"self_attn.{p}_proj.bias" for p in "qkv"] if kind == "qwen2" else []
    parts += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if kind in ("qwen3", "qwen3_moe", "olmoe") else []
    return names + [f"model.layers.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in parts]


def random_model(config_path: str, device: torch.device, dtype: torch.dtype, mode: str = "",
                 groupsize: int = 32, pack: Callable = pack_model) -> Transformer:
    """A model of this config with random weights, all of them (head too) in `mode`: "" (dtype), int8 or int4."""
    config = json.loads(Path(config_path).read_text())
    args, _ = args_from(config, dict.fromkeys(tensor_names(config)))
    with torch.device("meta"):
        model = Transformer(args)
    if ranks.size() > 1:
        tp.cut(model)
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):            # one by one: only what is kept has to fit the device
        for leaf, shape in [(leaf, p.shape) for leaf, p in module._parameters.items() if p is not None]:
            values = torch.empty(shape, dtype=dtype, device=device).uniform_(-0.03, 0.03)
            setattr(module, leaf, torch.nn.Parameter(values, requires_grad=False))
        if mode and (type(module) is torch.nn.Linear or module is model.tok_embeddings and model.output is None):
            parent, _, leaf = name.rpartition(".")
            layer = KINDS[mode].quantize(module.weight, groupsize if mode == "int4" else 0)
            layer.dtype, module.weight = dtype, None
            setattr(model.get_submodule(parent), leaf, layer)
    pack(model.eval().to(device))
    if ranks.size() > 1:
        tp.connect(model)
    return model


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def whole_blocks(o, steps):
    """Steps that are replayed as blocks run to a block's end: count all of them."""
    if steps.blocks:
        o.new_tokens = -(-o.new_tokens // BLOCK) * BLOCK


def decode_work(model: Transformer, steps, rows: int, filled: int, n: int, capacity: int):
    """n greedy steps of `rows` rows that have `filled` tokens behind them, ids read by the host as in real
    use."""
    device = model.norm.weight.device
    tokens, positions = (torch.full((rows,), value, device=device) for value in (1, filled))
    greedy = Sampler(Sampling(temperature=0), [[0]] * rows, model.args.vocab_size, device)
    make_room(model, rows, capacity)

    def work():
        for ids in decode_n_tokens(model, steps, tokens, positions, filled + 1, n, greedy):
            ids.tolist()
    return work


def exchange_work(model: Transformer, rows: int):
    """What the ranks exchange in one step, and nothing else: two sums a layer, the embedding's, the logits."""
    x = model.norm.weight.new_zeros(rows, 1, model.args.dim)
    logits, all_sum = x.new_zeros(rows, 1, -(-model.args.vocab_size // ranks.size())), tp.adder()

    def work():
        for _ in range(2 * model.args.n_layers + 1):
            all_sum(x)
        tp.all_columns(logits, model.args.vocab_size)[0, 0, 0].item()
    return work


@torch.no_grad()
def measure(o: argparse.Namespace) -> dict:
    device = pick_device(o.device)
    model = random_model(o.config, device, getattr(torch, o.dtype), o.mode, o.groupsize)
    steps = compile_steps(o.compile, o.compile_prefill, model)
    whole_blocks(o, steps)
    prompt = torch.randint(model.args.vocab_size, (o.prompt_tokens,)).tolist()
    rows = [prompt] * o.batch_size

    def prefill():
        run_prefill(model, steps, rows)[0, 0].item()
    make_room(model, o.batch_size, o.prompt_tokens)
    first_prefill = seconds(prefill) if o.prompt_tokens else 0.0
    small = decode_work(model, steps, o.batch_size, o.filled, o.new_tokens, o.filled + o.new_tokens)
    first_decode = seconds(small)
    exchange = exchange_work(model, o.batch_size) if ranks.size() > 1 else None
    peers = make_peers(o.against, model.args, o.mode, max(o.prompt_tokens, o.filled + o.new_tokens) + 16)
    for peer in peers:
        warm_up(peer, o)
    times = {"probe": [], "decode": [], "prefill": [], "large_cache": [], "exchange": []}
    theirs = [{"decode": [], "prefill": []} for _ in peers]
    for _ in range(o.rounds):                       # alternating: all see the same drift
        times["probe"].append(probe_bandwidth(device, repeats=3))
        times["decode"].append(seconds(small) / o.new_tokens)
        if o.prompt_tokens:
            times["prefill"].append(seconds(prefill))
        if ranks.size() > 1:
            times["exchange"].append(seconds(exchange))
        for peer, found in zip(peers, theirs):
            found["decode"].append(seconds(lambda peer=peer: peer.decode(o.filled, o.new_tokens)) / o.new_tokens)
            if o.prompt_tokens:
                found["prefill"].append(seconds(lambda peer=peer: peer.prefill(o.prompt_tokens)))
                peer.prefill(o.filled)
    if o.capacity:                                  # the same step with a large cache around the same tokens
        large = decode_work(model, steps, o.batch_size, o.filled, o.new_tokens, o.capacity - 16)
        seconds(large)
        for _ in range(o.rounds):
            times["large_cache"].append(seconds(large) / o.new_tokens)
    if o.profile:
        with torch.profiler.profile() as profile:
            small()
        profile.export_chrome_trace(o.profile)
        print(f"trace of {o.new_tokens} steps: {o.profile}; https://ui.perfetto.dev or chrome://tracing shows it", file=sys.stderr)
    found = result(o, model, device, times, first_prefill, first_decode)
    found["peers"] = [against(o, peer, found, peer_times) for peer, peer_times in zip(peers, theirs)]
    return found


def warm_up(peer, o):
    peer.prefill(o.filled)
    peer.decode(o.filled, 2)


def against(o, peer, ours: dict, times: dict) -> dict:
    """A peer's medians, and ours over them."""
    decode, prefill = (statistics.median(times[name]) if times[name] else None for name in ("decode", "prefill"))
    return {"name": peer.name, "version": peer.version, "kind": peer.kind, "decode_tok_s": 1 / decode,
            "decode_ratio": ours["decode_tok_s"] * decode,
            "prefill_tok_s": o.prompt_tokens / prefill if prefill else None,
            "prefill_ratio": ours["prefill_tok_s"] * prefill / o.prompt_tokens if prefill else None}


def result(o, model: Transformer, device, times: dict, first_prefill: float, first_decode: float) -> dict:
    median = {name: statistics.median(values) for name, values in times.items() if values}
    read = bytes_per_token(model)
    found = {
        "config": o.config, "dtype": o.dtype, "device": str(device), "batch_size": o.batch_size,
        "stock": o.stock, "compile": o.compile, "compile_prefill": o.compile_prefill,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": tables.commit(),
        "quant": describe(model), "bytes_per_token": read,
        "bandwidth_probe_gbs": median["probe"] / 1e9, "decode_ms": median["decode"] * 1e3,
        "decode_tok_s": o.batch_size / median["decode"], "bandwidth_gbs": read / median["decode"] / 1e9,
        "share_of_bandwidth": read / median["decode"] / median["probe"],
        "prefill_tokens": o.prompt_tokens, "prefill_s": median.get("prefill", 0.0),
        "prefill_tok_s": o.batch_size * o.prompt_tokens / median["prefill"] if o.prompt_tokens else 0.0,
        "ttft_s": median.get("prefill", 0.0) + median["decode"], "first_prefill_s": first_prefill,
        "compile_s": max(first_decode - o.new_tokens * median["decode"], 0.0) if o.compile else 0.0,
        "peak_mem_bytes": peak_memory(device), "ranks": ranks.size()}
    if "exchange" in median:
        peaks = [None] * ranks.size()
        torch.distributed.all_gather_object(peaks, found["peak_mem_bytes"])
        found |= {"communication_share": median["exchange"] / median["decode"], "peak_mem_bytes_of_ranks": peaks}
    if "large_cache" in median:
        found |= {"capacity": o.capacity, "large_cache_ratio": median["large_cache"] / median["decode"]}
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Time a model shape with random weights, beside the bandwidth.")
    p.add_argument("--config", default=str(ROOT / "scripts/shapes/llama-3.2-1b.json"), help="a config.json")
    p.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--mode", default="", choices=["", "int8", "int4"], help="of the weights; default: --dtype")
    p.add_argument("--groupsize", type=int, default=32, choices=GROUPSIZES, help="of int4")
    p.add_argument("--device", default="auto")
    p.add_argument("--batch_size", type=positive, default=1)
    p.add_argument("--prompt_tokens", type=not_negative, default=512)
    p.add_argument("--new_tokens", type=positive, default=20, help="decode steps per round")
    p.add_argument("--filled", type=not_negative, default=100, help="tokens in the cache when decode starts")
    p.add_argument("--capacity", type=not_negative, default=0, help="also time decode in a cache of this many slots")
    p.add_argument("--rounds", type=positive, default=7)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--compile_prefill", action="store_true")
    p.add_argument("--stock", action="store_true",
                   help="without kernels of our own and, on a GPU, with a graph for each step: the baseline")
    p.add_argument("--against", type=lambda text: text.split(","), default=[], metavar="PEERS",
                   help="llama.cpp,transformers: time them in the same rounds, where installed (see peers.py)")
    p.add_argument("--profile", metavar="FILE", help="also write a trace of a round of decode steps")
    p.add_argument("--tables", type=Path, metavar="PAGE",
                   help="measure every row of tables.py and write the tables into a page, between its marks")
    p.add_argument("--json", action="store_true")
    return p


def report(o, found: dict):
    read_mb = found["bytes_per_token"] / 1e6
    print(f"{Path(o.config).stem}, {read_mb:.1f} MB a token, {found['quant'] or o.dtype}, {tables.steps(found)}, on {found['device']}, "
          f"{found['threads']} threads, torch {found['torch']}, commit {found['commit']}")
    print(f"bandwidth probe  {found['bandwidth_probe_gbs']:8.1f} GB/s")
    print(f"decode           {found['decode_tok_s']:8.1f} tok/s   {found['bandwidth_gbs']:.1f} GB/s, "
          f"{100 * found['share_of_bandwidth']:.0f} % of the probe")
    print(f"prefill of {o.prompt_tokens:<5d} {found['prefill_tok_s']:8.1f} tok/s   "
          f"first token after {found['ttft_s']:.3f} s")
    for peer in found["peers"]:
        print(f"{peer['name']:<16s} {peer['decode_tok_s']:8.1f} tok/s, ours {peer['decode_ratio']:.2f} x"
              + (f"; prefill {peer['prefill_tok_s']:.1f} tok/s, ours {peer['prefill_ratio']:.2f} x" if peer["prefill_tok_s"] else "")
              + f"   ({peer['kind']}, version {peer['version']})")
    if "communication_share" in found:
        print(f"{found['ranks']} ranks          {100 * found['communication_share']:8.1f} % of a step is their "
              f"exchange; peak memory {', '.join(f'{n / 1e9:.2f}' for n in found['peak_mem_bytes_of_ranks'])} GB")
    if "capacity" in found:
        print(f"{o.capacity} slots      {found['large_cache_ratio']:8.2f} x a step's time in a small cache")
    print(f"compilation      {found['compile_s']:8.1f} s; peak memory {found['peak_mem_bytes'] / 1e9:.2f} GB")


def main():
    ranks.hush()
    o = parser().parse_args()
    if o.stock:
        os.environ |= {"CPU_KERNELS": "0", "GPU_KERNELS": "0", "GPU_BLOCKS": "0"}
    try:
        if o.tables and o.stock:
            raise ValueError("--tables has rows with and without --stock; leave it out")
        if o.tables:
            return tables.write(o.tables, o.against, ["--device", o.device, "--rounds", str(o.rounds)],
                                on_gpu=pick_device(o.device).type == "cuda")
        ranks.start(o.device)
        if not o.json:
            print(f"timing {Path(o.config).stem} with random weights, {o.rounds} rounds ...", file=sys.stderr)
        found = measure(o)
    except (ValueError, OSError) as error:
        ranks.fail(error)
        sys.exit(1)
    print(json.dumps(found)) if o.json else report(o, found)


if __name__ == "__main__":
    main()
