"""GPTQ: int4 weights rounded one input at a time, each error made good in the inputs that follow (Frantar et al.
2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

What it is: `round_weight`, the algorithm on one matrix; `quantize_blocks`, which walks a model block by block and
shows each layer the inputs that its already quantized predecessors produce; `calibration`, the text it sees.
What it is not: the meaning of the numbers (quantize.py) or the command (quantize_cli.py). At any time one layer's
Hessian is in memory (of experts, a gigabyte's), and of the unquantized weights one block.

Letters: N outputs, K inputs, H = sum of x x^T over all inputs x [K], in float32; the error of a rounding Q of W is
tr((W - Q) H (W - Q)^T).
"""
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from model import Transformer, attention_mask
from quantize import Int4Linear, by_group
from ranks import notice

SHRINK = [1.0 - 0.03 * i for i in range(16)]    # a group's range is clipped to the best of these: 1.0 ... 0.55


HESSIANS = 1 << 30                      # bytes of them at a time


@dataclass
class Settings:
    percdamp: float = 0.01              # added to H's diagonal, as a share of its mean
    blocksize: int = 128                # inputs between two updates of all that follow
    act_order: bool = False             # inputs with the largest diagonal first
    clip: bool = True                   # search the range of each group


# ---- one matrix --------------------------------------------------------------------------------------------

def round_weight(weight: Tensor, H: Tensor, groupsize: int, s: Settings = Settings()) -> Int4Linear:
    """The layer whose values make W [N, K] x on H's inputs least wrong. With the clip search every row keeps
    the better of the two roundings, so that it never adds to the error."""
    N, K = weight.shape
    H, W = H.float().clone(), weight.float().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    perm = H.diagonal().argsort(descending=True) if s.act_order else None
    if perm is not None:
        W, H = W[:, perm], H[perm][:, perm]
    layer = Int4Linear(K, N, groupsize, device=weight.device, perm=perm is not None, **Int4Linear.options)
    if perm is not None:
        layer.perm.copy_(perm)
    Q, scales, zeros = rounded(W, H, layer.groupsize, s, SHRINK if s.clip else [1.0])
    if s.clip:
        plain = rounded(W, H, layer.groupsize, s, [1.0])
        worse = (row_errors(W - plain[0], H) < row_errors(W - Q, H))[:, None]
        Q, scales, zeros = (torch.where(worse, a, b) for a, b in zip(plain, (Q, scales, zeros)))
    layer.set_rows(slice(0, N), Q, scales, zeros)
    return layer


def row_errors(D: Tensor, H: Tensor) -> Tensor:
    """d H d^T for each row d of D [N, K]: [N]."""
    return ((D @ H) * D).sum(-1)


def inverse_factor(H: Tensor, percdamp: float) -> Tensor:
    """The upper Cholesky factor of (H + damping)^-1; more damping where rounding leaves H indefinite."""
    mean, eye = H.diagonal().mean(), torch.eye(len(H), device=H.device)
    for damp in (percdamp, 10 * percdamp + 1e-4, 1.0):
        factor, info = torch.linalg.cholesky_ex(H + damp * mean * eye)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if info == 0:
                return upper
    raise ValueError("the calibration's Hessian is not positive definite: use more or other text, or raise --percdamp")


def rounded(W: Tensor, H: Tensor, groupsize: int, s: Settings, shrink: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Section 3.3, steps 1 to 3: Q [N, K] dequantized, and the grid, scales and zeros [N, G]."""
    W, Q, K = W.clone(), torch.empty_like(W), W.shape[1]
    U = inverse_factor(H, s.percdamp)
    scales, zeros = [], []
    for first in range(0, K, s.blocksize):
        last = min(first + s.blocksize, K)
        errors = torch.zeros_like(W[:, first:last])
        for k in range(first, last):
            if k % groupsize == 0:      # the group's range is known only now: earlier errors have moved it
                end = min(k + groupsize, K)
                now = W[:, k:end].clone()
                if end > last:          # the part beyond this block still waits for its update
                    now[:, last - k:] -= errors[:, :k - first] @ U[first:k, last:end]
                scale, zero = best_grid(now, H[k:end, k:end], groupsize, shrink)
                scales.append(scale)
                zeros.append(zero)
            step = scale.float()
            q = ((W[:, k] / step).round() + zero).clamp(0, 15)
            Q[:, k] = (q - zero) * step
            error = (W[:, k] - Q[:, k]) / U[k, k]
            W[:, k:last] -= error[:, None] * U[k, k:last]
            errors[:, k - first] = error
        W[:, last:] -= errors @ U[first:last, last:]
    return Q, torch.stack(scales, 1), torch.stack(zeros, 1)


def best_grid(w: Tensor, H: Tensor, groupsize: int, shrink: list[float]) -> tuple[Tensor, Tensor]:
    """For each row of w [N, g] the scale and zero [N], out of clipped ranges, with the least error under H."""
    best = None
    for factor in shrink:
        scale, zero = (t[:, 0] for t in Int4Linear.grid(by_group(w * factor, groupsize)))
        step = scale.float()[:, None]
        q = ((w / step).round() + zero[:, None]).clamp(0, 15)
        error = row_errors(w - (q - zero[:, None]) * step, H)
        if best is None:
            best = (error, scale, zero)
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best))
    return best[1], best[2]


# ---- a model -----------------------------------------------------------------------------------------------

@torch.no_grad()
def quantize_blocks(model: Transformer, samples: list[Tensor], fill: Callable[[str], None],
                    quantize: Callable[[str, Tensor | None], nn.Module], wants: Callable[[str], bool],
                    batch_size: int = 1) -> Iterator[str]:
    """Quantize a model's layers in the order in which a token meets them; yields each name when it is done.

    samples: ids [T] each, of any lengths. fill(prefix) puts the weights of a module in place;
    quantize(name, H) makes the layer that replaces it; wants(name): does it need a Hessian?
    """
    batch_size = 1 if model.args.n_experts else batch_size      # experts see rows, which do not tell what is padding
    batches = [pad(samples[i:i + batch_size]) for i in range(0, len(samples), batch_size)]
    starved = []
    if model.output is not None:
        fill("tok_embeddings")
        replace(model, "tok_embeddings", quantize("tok_embeddings", None))
    else:
        fill("tok_embeddings")          # tied: the head comes last, and until then lookups are exact
    yield "tok_embeddings"
    states = []
    for tokens, valid in batches:
        x = model.tok_embeddings(tokens)
        if model.args.embedding_scale != 1.0:
            x = x * torch.full((), model.args.embedding_scale, dtype=x.dtype)
        states.append(x)
    for i, block in enumerate(model.layers):
        fill(f"layers.{i}")

        def run(x, tokens, block=block, i=i):
            position = torch.arange(tokens.shape[1]).expand(tokens.shape)
            rope = model.args.layer_ropes[i]
            return block(x, position, model.ropes[rope](position) if rope >= 0 else None,
                         attention_mask(position, position, model.args.layer_windows[i]))
        for names in stages(model, i):
            wanted = {name: model.get_submodule(name) for name in names if wants(name)}
            H = hessians(wanted, [lambda x=x, b=b: run(x, b[0]) for x, b in zip(states, batches)],
                         [valid for _, valid in batches]) if wanted else {}
            starved += [name for name in wanted if name not in H]
            for name in names:
                replace(model, name, quantize(name, H.pop(name, None)))
                yield name
        states = [run(x, tokens) for x, (tokens, _) in zip(states, batches)]
    fill("norm")
    head = "tok_embeddings" if model.output is None else "output"
    if model.output is not None:
        fill("output")
    H = None
    if wants(head):
        inputs = [model.norm(x)[valid].float() for x, (_, valid) in zip(states, batches)]
        H = sum(x.t() @ x for x in inputs)
    replace(model, head, quantize(head, H))
    yield head
    if starved:
        notice(f"{len(starved)} layers of experts saw too few tokens for GPTQ and were rounded to the nearest: "
               + ", ".join(starved[:4]) + (", ..." if len(starved) > 4 else ""))


def stages(model: Transformer, i: int) -> Iterator[list[str]]:
    """The layers of block i, those that need not wait for each other together: experts by the gigabyte of Hessians."""
    layers = {f"layers.{i}.{name}": m for name, m in model.layers[i].named_modules() if type(m) is nn.Linear}
    for leaf in ("wqkv", "wo", "w13", "w2"):
        names = [name for name in layers if name.endswith(f".{leaf}")]
        many = max(1, HESSIANS // max(4 * layers[name].in_features ** 2 for name in names))
        yield from (names[at:at + many] for at in range(0, len(names), many))


def hessians(layers: dict[str, nn.Module], runs: list[Callable], valid: list[Tensor]) -> dict[str, Tensor]:
    """For each layer the sum of x x^T over the real tokens that reach it, [K, K] float32. An expert that fewer than
    K / 8 tokens reach has none: their sum would say little of the others."""
    found = {name: torch.zeros(m.in_features, m.in_features) for name, m in layers.items()}
    count = dict.fromkeys(layers, 0)
    for run, real in zip(runs, valid):
        def add(module, args, name, real=real):
            x = args[0].float()
            x = x[real] if x.dim() == 3 else x                                       # [tokens, K]
            found[name].addmm_(x.t(), x)
            count[name] += len(x)
        hooks = [m.register_forward_pre_hook(partial(add, name=name)) for name, m in layers.items()]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
    return {name: H for name, H in found.items() if ".experts." not in name or 8 * count[name] >= len(H)}


def replace(model: nn.Module, name: str, layer: nn.Module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def pad(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids [B, T] filled up to the right, where no real token looks, and which of them are real."""
    longest = max(map(len, samples))
    tokens = torch.stack([torch.nn.functional.pad(s, (0, longest - len(s))) for s in samples])
    valid = torch.stack([torch.arange(longest) < len(s) for s in samples])
    return tokens, valid


# ---- calibration text --------------------------------------------------------------------------------------

def calibration(path: str | Path, tokenizer, length: int, limit: int, seed: int) -> list[Tensor]:
    """Samples of at most `length` ids: windows drawn from a text file, or the documents ("text" of each line)
    of a .jsonl file. Raises ValueError for a file that holds too little."""
    text = Path(path).read_text(encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    if str(path).endswith(".jsonl"):
        documents = [document(line, path, i) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        samples = [torch.tensor(ids[:length]) for ids in map(tokenizer.encode, documents) if len(ids) > 1]
        if not samples:
            raise ValueError(f"calibration_file '{path}' holds no documents")
        return [samples[i] for i in torch.randperm(len(samples), generator=generator)[:limit].tolist()]
    ids = torch.tensor(tokenizer.encode(text))
    if len(ids) < length:
        raise ValueError(f"calibration_file '{path}' has {len(ids)} tokens, fewer than one sample of {length}; give "
                         "more text or a smaller --calibration_seq_length")
    windows = torch.randperm(len(ids) // length, generator=generator)[:limit].sort().values
    return [ids[i * length:(i + 1) * length] for i in windows.tolist()]


def document(line: str, path, number: int) -> str:
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"'{path}', line {number}: not an object with a \"text\"") from None
