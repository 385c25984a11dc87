"""A Transformer's block in six launches on a GPU, for steps of few tokens; and what puts a model on the GPU's kernels.

What it is: `FusedBlock`, the same layers in another grouping: (norm, q k v) (rotation, cache write) (attention)
(output, residual) (norm, gate and up, activation) (down, residual). At batch 1 a GPU reads a layer of 8B in tens of
microseconds and spends two on every launch, so that their number counts. What it is not: another model. TransformerBlock
is what it means and what runs for prompts, without a cache, and where something does not fit: a block among ranks,
inputs in another order (act-order), heads of unusual widths, norms over all heads. Mixtures share the first half.
graphs.py, which replays several such steps in one go, is what to read next.
"""
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

import ranks
from kernels import gpu
from kernels.gpu_attention import WIDTHS, attend, attends
from model import ACTIVATIONS, FeedForward, RMSNorm, TransformerBlock

if gpu.triton is not None:
    from kernels.gpu_attention import rotate_and_keep

TRIED: dict[str, bool] = {}             # forms of blocks: whether they run


class FusedBlock(TransformerBlock):
    def forward(self, x: Tensor, where: tuple[Tensor, Tensor, Tensor], rotation: tuple[Tensor, Tensor] | None,
                mask: Tensor) -> Tensor:
        cache = self.attention.cache.k
        if not gpu.few(x) or cache is None or cache.dtype != x.dtype:
            return super().forward(x, where, rotation, mask)
        x = self.first_half(x, where[2][:, 0], rotation, mask)
        if type(self.feed_forward) is FeedForward:
            return self.second_half(x)
        return torch.add(x, self.post_ffn_norm(self.feed_forward(self.ffn_norm(x))), alpha=self.residual_scale)

    def first_half(self, x: Tensor, input_pos: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor) -> Tensor:
        """x [B, T, D] and what attention adds to it. input_pos [B, T]; rotation: cos and sin [B, 1, T, r/2]."""
        (B, T, D), a = x.shape, self.attention
        rows = x.reshape(B * T, D)
        qkv = product(a.wqkv, rows, self.attention_norm).view(B, T, -1)              # [B, T, (H + 2K) E]
        gains, style, eps = (None, None), "", 0.0
        if a.qk_norm:
            gains, style, eps = (a.q_norm.weight, a.k_norm.weight), a.q_norm.style, a.q_norm.eps
        q = rotate_and_keep(qkv, *(rotation or (None, None)), input_pos, a.cache.k, a.cache.v, *gains, style, eps)
        k, v = (cache[:B, :, :mask.shape[-1]] for cache in (a.cache.k, a.cache.v))   # [B, K, S, E]
        y = attend(q, k, v, mask, a.scale, a.softcap, a.sinks)                       # [B, H, T, E]
        return add(self, rows, a.wo, y.transpose(1, 2).reshape(B * T, -1), self.post_attention_norm).view(B, T, D)

    def second_half(self, x: Tensor) -> Tensor:
        """x [B, T, D] and what the feed-forward adds to it."""
        rows, f = x.reshape(-1, x.shape[-1]), self.feed_forward
        h = product(f.w13, rows, self.ffn_norm, name_of(f.activation))               # [B*T, F]
        return add(self, rows, f.w2, h, self.post_ffn_norm).view(x.shape)


def add(block: TransformerBlock, rows: Tensor, layer: nn.Module, x: Tensor, norm: nn.Module) -> Tensor:
    """What both halves end with: rows + residual_scale * norm(layer(x))."""
    if isinstance(norm, RMSNorm):
        return torch.add(rows, norm(product(layer, x)), alpha=block.residual_scale)
    return product(layer, x, residual=rows, alpha=block.residual_scale)


def product(layer: nn.Module, x: Tensor, norm: nn.Module | None = None, activation: str = "",
            residual: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """residual + alpha * activation(layer(norm(x))) of rows x [M, K]; each part where it is given."""
    is_norm = isinstance(norm, RMSNorm)
    gain, style, eps = (norm.weight, norm.style, norm.eps) if is_norm else (None, "", 0.0)
    bits, group, scales, zeros = (16, 0, None, None) if type(layer) is nn.Linear else \
        (layer.bits, layer.groupsize, layer.scales, layer.zeros)
    return gpu.linear(x, layer.weight, bits, group, scales, zeros, layer.bias, gain, style, eps, activation, residual, alpha)


def name_of(activation: Callable) -> str:
    return next(name for name, function in ACTIVATIONS.items() if function is activation)


# ---- models ------------------------------------------------------------------------------------------------

def pack_part(model: nn.Module, part: nn.Module):
    """As cpu.pack_part: a block of the model, or the rest of it, on the kernels, where they work."""
    weight = model.norm.weight
    for module in part.modules():
        if hasattr(module, "attend") and attends(weight.device, weight.dtype):
            module.attend = attend
    if type(part) is TransformerBlock and fits(part):
        part.__class__ = FusedBlock     # the same weights, another way through them
        for layer in layers_of(part):
            if type(layer) is not nn.Linear:            # PyTorch's operator is not called any more
                layer.packed, layer.packed_scales, layer.path = None, None, "gpu"


def layers_of(block: TransformerBlock) -> list[nn.Module]:
    """Those that a fused block multiplies itself."""
    a, f = block.attention, block.feed_forward
    return [a.wqkv, a.wo] + ([f.w13, f.w2] if type(f) is FeedForward else [])


def fits(block: TransformerBlock) -> bool:
    """Whether all that the block holds is what the kernels know, and runs: blocks of one form are tried once."""
    a, layers = block.attention, layers_of(block)
    if ranks.size() > 1 or a.head_dim not in WIDTHS or a.qk_norm not in ("", "head") or not all(map(multiplies, layers)):
        return False
    norms = [norm.style for norm in block.children() if isinstance(norm, RMSNorm)]
    form = str([(form_of(layer), layer.in_features, layer.out_features) for layer in layers]) + \
        str([block, norms, a.n_heads, a.softcap, layers[0].weight.device])
    if form not in TRIED:
        TRIED[form] = gpu.succeeds(lambda: try_halves(block))
    return TRIED[form]


def multiplies(layer: nn.Module) -> bool:
    """Whether the kernel takes a layer's product: bfloat16 weights or such as `gpu.works` knows."""
    if type(layer) is nn.Linear:
        weight = layer.weight
        return gpu.runs_on(weight.device) and weight.dtype == torch.bfloat16 and gpu.tile_of(layer.in_features) >= 32
    return getattr(layer, "skinny", False) and layer.perm is None and not layer.skip


def form_of(layer: nn.Module) -> dict:
    return {} if type(layer) is nn.Linear else layer.spec()


@torch.no_grad()
def try_halves(block: TransformerBlock):
    """One token through all that a fused block launches, with a cache that is thrown away."""
    a, device = block.attention, layers_of(block)[0].weight.device
    x = torch.zeros(1, 1, a.wqkv.in_features, dtype=torch.bfloat16, device=device)
    zero, angles = torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(1, 1, 1, a.head_dim // 2, device=device)
    a.cache.allocate(1, 16, x)
    try:
        x = FusedBlock.first_half(block, x, zero, (angles, angles), torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device))
        if type(block.feed_forward) is FeedForward:
            FusedBlock.second_half(block, x)
    finally:
        a.cache.k = a.cache.v = None
