"""What does a speculative step cost here? Times its parts on model shapes with random weights.

    python scripts/benchmark_speculate.py --compile
    python scripts/benchmark_speculate.py --compile --config scripts/shapes/llama-3.2-3b.json \\
        --draft_config scripts/shapes/llama-3.2-1b.json --draft_mode int4 --acceptance 0.8

Three things, each beside a plain step, in rounds that alternate because a shared machine's bandwidth drifts:
verify (k+1 rows in one forward) over decode (one row); the machinery, that is a whole speculative step whose
forwards are replaced by logits made before; and with --draft_config whole texts with the draft, plain and
speculative. Random weights agree on nothing, so there each guess is made right with probability
--acceptance, by moving the model's logits; all costs are the real ones.

What it is not: a measure of acceptance; that is a pair's own, and generate.py reports it. The modes int8 and
int4 need quantize.py. With --json the result is one object.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402

from benchmark import random_model, seconds  # noqa: E402
from figures import probe_bandwidth  # noqa: E402
from generate import (EAGER, Figures, Row, attended, compile_steps, decode_n_tokens, generate_rows,  # noqa: E402
                      make_room, pick_device)
from sampling import Sampler, Sampling  # noqa: E402
from speculate import Speculation, SpeculativeSteps, compile_speculation  # noqa: E402


class NoText:
    """A tokenizer for rows whose text nobody reads."""

    def detokenizer(self, prompt_ids=()):
        return self

    def push(self, token: int = 0) -> str:
        return ""

    flush = push


def row(prompt: int, new: int) -> Row:
    return Row(NoText(), list(range(1, prompt + 1)), new)


def forced(verify, rate: float):
    """verify, whose logits then make each guess right with probability `rate`, and wrong otherwise."""
    generator = torch.Generator().manual_seed(0)

    def verify_forced(model, tokens, input_pos, key_pos):
        logits = verify(model, tokens, input_pos, key_pos).clone()
        guesses = tokens[:, 1:]                                                      # [B, k]
        right = (torch.rand(guesses.shape, generator=generator) < rate).to(tokens.device)
        wanted = torch.where(right, guesses, (guesses + 1) % logits.shape[-1])
        logits[:, :-1].scatter_(2, wanted[:, :, None], 1e4)
        return logits
    return verify_forced


def time_verify(o, model, steps, speculative) -> dict:
    """Seconds of decode and of verify with each k, medians."""
    device, key_pos = model.norm.weight.device, attended(model, o.filled + 20)
    times = {k: [] for k in (0, *o.ks)}
    greedy = Sampler(Sampling(temperature=0), [[0]], model.args.vocab_size, device)
    token, position = (torch.full((1,), value, device=device) for value in (1, o.filled))

    def one(k: int):
        if k == 0:
            next(decode_n_tokens(model, steps._replace(blocks=None), token, position, o.filled + 1, 1, greedy)).tolist()
        else:
            block = torch.ones(1, k + 1, dtype=torch.long, device=device)
            at = position[:, None] + torch.arange(k + 1, device=device)
            torch._dynamo.mark_dynamic(block, 1), torch._dynamo.mark_dynamic(at, 1)
            speculative.verify(model, block, at, key_pos).argmax(-1).tolist()
    for n in range(o.rounds + 2):                       # the first two compile
        for k in times:
            times[k].append(seconds(lambda: one(k)))
    return {k: statistics.median(values[2:]) for k, values in times.items()}


def time_machinery(o, model, settings: Sampling, k: int) -> float:
    """Seconds of a speculative step without its forwards, median."""
    V, device = model.args.vocab_size, model.norm.weight.device
    of_draft, of_model = torch.randn(1, V, device=device), torch.randn(1, k + 1, V, device=device)
    steps = SpeculativeSteps(lambda *_: of_draft, lambda *_: of_model)
    speculation = Speculation(model, k, steps=steps)
    speculation.rows, speculation.drafted = [row(o.filled, 200)], 0
    sampler = Sampler(settings, [speculation.rows[0].prompt], V, device)
    blocks = speculation.decode(model, EAGER, torch.ones(1, dtype=torch.long, device=device),
                                torch.full((1,), o.filled, device=device), sampler)
    times = []
    for _ in range(3 * o.rounds + 3):
        times.append(seconds(lambda: next(blocks)))
    return statistics.median(times[3:])


def time_texts(o, model, draft, steps, speculative) -> dict:
    """Tokens a second of whole texts, plain and with the draft, alternating; medians."""
    rates, forced_steps = {"plain": [], "speculative": []}, speculative._replace(
        verify=forced(speculative.verify, o.acceptance))
    speculation, accepted = Speculation(draft, o.k, steps=forced_steps), []
    for n in range(o.text_rounds + 1):
        for name, given in (("plain", None), ("speculative", speculation)):
            figures = Figures()
            for _ in generate_rows(model, [row(o.filled, o.new_tokens)], Sampling(temperature=0), steps=steps,
                                   figures=figures, speculation=given):
                pass
            if n:                                       # the first round compiles
                rates[name].append(figures.decode_tokens / figures.decode_s)
        accepted.append(speculation.acceptance.figures())
    found = {name: statistics.median(values) for name, values in rates.items()}
    return {"k": o.k, "acceptance": o.acceptance,
            "tokens_per_step": statistics.mean(a["tokens_per_step"] for a in accepted),
            "plain_tok_s": found["plain"], "speculative_tok_s": found["speculative"],
            "speedup": found["speculative"] / found["plain"]}


def shape(path: str, device: torch.device, dtype: str, mode: str):
    try:
        return random_model(path, device, getattr(torch, dtype), *([mode] if mode else []))
    except TypeError:
        raise ValueError(f"mode '{mode}' needs quantize.py and a benchmark.py that knows it") from None


@torch.no_grad()
def measure(o: argparse.Namespace) -> dict:
    device = pick_device(o.device)
    model = shape(o.config, device, o.dtype, o.mode)
    steps = compile_steps(o.compile, model=model)
    draft = shape(o.draft_config, device, o.dtype, o.draft_mode) if o.draft_config else None
    speculative = compile_speculation(model, draft) if o.compile else SpeculativeSteps()
    make_room(model, 1, o.filled + 200)
    times = time_verify(o, model, steps, speculative)
    step = times.pop(0)
    found = {"config": o.config, "mode": o.mode or o.dtype, "device": str(device), "compile": o.compile,
             "threads": torch.get_num_threads(), "torch": torch.__version__,
             "bandwidth_probe_gbs": probe_bandwidth(device) / 1e9, "decode_ms": step * 1e3,
             "verify_over_decode": {k: seconds_ / step for k, seconds_ in times.items()}}
    for name, settings in (("greedy", Sampling(temperature=0)), ("sampled", Sampling())):
        found[f"machinery_{name}_ms"] = time_machinery(o, model, settings, o.k) * 1e3
    if o.draft_config:
        found |= {"draft_config": o.draft_config, "draft_mode": o.draft_mode or o.dtype}
        found |= time_texts(o, model, draft, steps, speculative)
    return found


def main():
    p = argparse.ArgumentParser(description="Time the parts of a speculative step, weights random.")
    p.add_argument("--config", default=str(ROOT / "scripts/shapes/llama-3.2-1b.json"), help="a config.json")
    p.add_argument("--draft_config", default="", help="also time whole texts with a draft of this shape")
    p.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--mode", default="", choices=["", "int8", "int4"],
                   help="of the model's weights; default: --dtype")
    p.add_argument("--draft_mode", default="", choices=["", "int8", "int4"], help="of the draft's")
    p.add_argument("--device", default="auto")
    p.add_argument("--k", type=int, default=4, help="guesses a step, for machinery and texts")
    p.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4, 8], help="guesses a step, for verify")
    p.add_argument("--acceptance", type=float, default=0.8, help="probability that a guess stands")
    p.add_argument("--filled", type=int, default=100, help="tokens in the cache")
    p.add_argument("--new_tokens", type=int, default=64, help="of each text")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--text_rounds", type=int, default=3)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--json", action="store_true")
    o = p.parse_args()
    began = time.perf_counter()
    try:
        found = measure(o)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if o.json:
        print(json.dumps(found))
        return
    print(f"{Path(o.config).stem}, {found['mode']} on {found['device']}, {found['threads']} threads, "
          f"torch {found['torch']}; {time.perf_counter() - began:.0f} s in all")
    print(f"decode, one row      {found['decode_ms']:8.2f} ms   "
          f"beside a probe of {found['bandwidth_probe_gbs']:.1f} GB/s")
    for k, ratio in found["verify_over_decode"].items():
        print(f"verify, {k + 1:2d} rows      {ratio:8.2f} x a one-row step")
    for name in ("greedy", "sampled"):
        ms = found[f"machinery_{name}_ms"]
        print(f"machinery, {name:8s}  {ms:8.2f} ms   {100 * ms / found['decode_ms']:.1f} % of decode, "
              f"k = {o.k}")
    if o.draft_config:
        print(f"with the draft       {found['speedup']:8.2f} x plain: {found['speculative_tok_s']:.1f} against "
              f"{found['plain_tok_s']:.1f} tok/s, k = {o.k}, {found['tokens_per_step']:.2f} a step")


if __name__ == "__main__":
    main()
