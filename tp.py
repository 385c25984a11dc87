"""One model on several ranks: tensor parallelism (Shoeybi et al. 2019, section 3) over torch.distributed.

What it is: which part of each weight a rank holds (`cut`: the whole table), and where ranks exchange what they
computed (`connect`: an all-reduce behind attention and one behind the feed-forward, a gather of the logits). Every
rank runs the same program on its part. What it is not: a launcher (ranks.py joins what torchrun started), or a store of
weights: checkpoint.py reads only the parts that `cut` names, and a layer knows how its own format is cut
(`QuantizedLinear.cut`). generate.py is what to read next.

Time per token on paper: bytes of a rank / its bandwidth + 2 * layers * latency of an all-reduce; README.md compares.
"""
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

import ranks
from kernels import cpu
from model import FEW, FeedForward, ModelArgs, Transformer
from quantize import QuantizedLinear, SplitLinear
from ranks import rank, size

Ranges = list[tuple[int, int]]          # first and last + 1, of the whole tensor


# ---- what a rank holds -------------------------------------------------------------------------------------

def cut(model: Transformer) -> dict[str, tuple[int, Ranges]]:
    """Make an empty model (on the meta device) this rank's part of itself. Returns for each tensor that shrank
    the dimension and the ranges of the whole tensor that are left. Raises ValueError where heads cannot be shared out.
    """
    a, E = model.args, model.args.head_dim
    q = share(a.n_heads * E)
    kv = [(head * E, head * E + E) for head in kv_heads(a, rank())]
    vocab = share(a.vocab_size)
    table = {                                                   # dimension 0: outputs, part by part; 1: inputs
        "attention.wqkv": (0, {"q": [q], "k": kv, "v": kv}, (a.n_heads * E, a.n_kv_heads * E, a.n_kv_heads * E)),
        "attention.wo": (1, {"": [q]}, (0,))}
    kept = {}
    for i, block in enumerate(model.layers):
        for name, (dim, parts, widths) in (table | feed_forwards(block)).items():
            layer, name = block.get_submodule(name), f"layers.{i}.{name}"
            if isinstance(layer, SplitLinear):
                for part, ranges in parts.items():
                    kept |= cut_layer(layer.get_submodule(part), f"{name}.{part}", dim, ranges)
                continue
            begins = [sum(widths[:n]) for n in range(len(widths))]              # fused: the parts lie one behind another
            ranges = [(at + a, at + b) for at, part in zip(begins, parts.values()) for a, b in part]
            kept |= cut_layer(layer, name, dim, ranges)
        if a.attention_sinks:
            kept |= cut_layer(block.attention, f"layers.{i}.attention", 0, [(q[0] // E, q[1] // E)], ("sinks",))
        attention = block.attention
        attention.n_heads, attention.n_kv_heads = (q[1] - q[0]) // E, len(kv)
        attention.cache.n_kv_heads = len(kv)
    kept |= cut_layer(model.tok_embeddings, "tok_embeddings", 0, [vocab])
    return kept | (cut_layer(model.output, "output", 0, [vocab]) if model.output is not None else {})


def feed_forwards(block: nn.Module) -> dict[str, tuple]:
    """Every feed-forward of a block, an expert too, gives each rank a share of its width; a router is everybody's."""
    found = {}
    for name, module in block.named_modules():
        if isinstance(module, FeedForward):
            mine = share(width := module.width)
            found[f"{name}.w13"] = 0, {"gate": [mine], "up": [mine]}, (width, width)
            found[f"{name}.w2"] = 1, {"": [mine]}, (0,)
    return found


def kv_heads(a: ModelArgs, r: int) -> list[int]:
    """The key/value heads that rank r needs for its query heads: several ranks may hold the same one. Where they do
    not come out as equal groups, one for each query head."""
    if a.n_heads % size():
        fitting = [str(n) for n in range(1, a.n_heads + 1) if a.n_heads % n == 0]
        raise ValueError(f"{a.n_heads} attention heads cannot be shared out to {size()} ranks; {', '.join(fitting)} "
                         "ranks would do")
    each = a.n_heads // size()
    wanted = [head * a.n_kv_heads // a.n_heads for head in range(r * each, (r + 1) * each)]
    heads = sorted(set(wanted))
    return heads if wanted == [h for h in heads for _ in range(each // len(heads))] else wanted


def share(whole: int) -> tuple[int, int]:
    """This rank's range of `whole`: equal ones, but for a smaller last."""
    each = -(-whole // size())
    return min(rank() * each, whole), min((rank() + 1) * each, whole)


def cut_layer(layer: nn.Module, name: str, dim: int, ranges: Ranges,
              leaves=("weight", "bias")) -> dict[str, tuple[int, Ranges]]:
    """A linear layer or an embedding keeps these outputs (dim 0) or inputs (1); a bias is added on one rank only."""
    if isinstance(layer, QuantizedLinear):
        kept = layer.cut(dim, ranges)
    else:
        kept = {leaf: (dim, ranges) for leaf in leaves if leaf != "bias" or dim == 0}
    if dim == 1 and rank() and getattr(layer, "bias", None) is not None:
        layer.bias = None
    for leaf, (d, spans) in kept.items():
        if (whole := getattr(layer, leaf, None)) is not None:
            shape = [*whole.shape[:d], sum(b - a for a, b in spans), *whole.shape[d + 1:]]
            small = whole.new_empty(shape)
            setattr(layer, leaf, nn.Parameter(small, False) if isinstance(whole, nn.Parameter) else small)
    return {f"{name}.{leaf}": spans for leaf, spans in kept.items() if getattr(layer, leaf, None) is not None}


# ---- where ranks meet --------------------------------------------------------------------------------------

def connect(model: Transformer):
    """Let the parts, filled and packed, work as one model."""
    a, all_sum = model.args, adder()
    bits = [layer.bits for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    ranks.same("their models", (a, str(model.norm.weight.dtype), bits))
    for block in model.layers:
        block.attention.wo.register_forward_hook(lambda layer, args, y: all_sum(y))
        block.feed_forward.register_forward_hook(lambda layer, args, y: all_sum(y))
        if a.qk_norm == "full":         # it looks at all heads at once
            each = a.n_heads // size()
            queries = [list(range(r * each, (r + 1) * each)) for r in range(size())]
            share_norm(block.attention.q_norm, queries)
            share_norm(block.attention.k_norm, [kv_heads(a, r) for r in range(size())])
    table, (first, last) = model.tok_embeddings, share(a.vocab_size)
    look_up, head = table.forward, table.head

    def rows(tokens: Tensor) -> Tensor:
        x = look_up((tokens - first).clamp(0, last - first - 1))                     # [B, T, D]
        return all_sum(x.masked_fill(((tokens < first) | (tokens >= last))[..., None], 0.0))
    table.forward = rows
    if model.output is None:
        table.head = lambda x: all_columns(head(x), a.vocab_size)
    else:
        model.output.register_forward_hook(lambda layer, args, y: all_columns(y, a.vocab_size))


def adder() -> Callable[[Tensor], Tensor]:
    """How this group sums x [B, T, D] over its ranks, by operators that a compiled graph takes in whole. A few tokens
    cost latency alone: on CPUs of one machine they go through shared memory; for CUDA see ranks.start."""
    group, shared = dist.group.WORLD.group_name, ranks.share_memory()

    def all_sum(x: Tensor) -> Tensor:
        if shared and x.shape[1] <= FEW and x.nbytes <= cpu.EXCHANGED:
            return torch.ops.cpu_exchange.all_sum(x)
        return torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))
    return all_sum


def all_columns(x: Tensor, width: int) -> Tensor:
    """Each rank's columns [..., share of width] -> [..., width]."""
    ops = torch.ops._c10d_functional
    x = nn.functional.pad(x, (0, -(-width // size()) - x.shape[-1]))[None].contiguous()
    x = ops.wait_tensor(ops.all_gather_into_tensor(x, size(), dist.group.WORLD.group_name))  # [N, ..., share]
    return x.movedim(0, -2).flatten(-2)[..., :width]


def share_norm(norm: nn.Module, held: list[list[int]]):
    """A norm over all heads, for ranks that have some of them: those in `held`."""
    whole, flat, mine = norm.forward, [head for heads in held for head in heads], held[rank()]
    places = [flat.index(head) for head in sorted(set(flat))]

    def forward(x: Tensor) -> Tensor:
        heads = all_columns(x, x.shape[-1] * size()).unflatten(-1, (len(flat), -1))  # [B, T, heads of all ranks, E]
        y = whole(heads[..., places, :].flatten(-2))
        return y.unflatten(-1, (len(places), -1))[..., mine, :].flatten(-2)
    norm.forward = forward
