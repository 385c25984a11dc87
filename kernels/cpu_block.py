"""A Transformer's block in one call on a CPU, for steps of few tokens.

What it is: `OneCall`, the same layers run by step.cpp, which has the other kernels multiply and attend. A compiled step
spent an eighth of its time, and an eager one a quarter, between those: calls, loops of a microsecond, tensors. What it is
not: another model. TransformerBlock is what it means and what runs for prompts, without a cache, in another dtype than
bfloat16, and where something does not fit. Mixtures, and feed-forwards of another form, share the first half. The call
knows weights by their addresses: layers and norms that are put into a block later, and hooks on them, it does not see,
until the model is packed again. cpu.py lays the weights out.
"""
import struct

import torch
import torch.nn as nn
from torch import Tensor

import ranks
from kernels import cpu
from model import ACTIVATIONS, FEW, Attention, FeedForward, RMSNorm, Transformer, TransformerBlock

KNOWN = (None, ACTIVATIONS["silu"], ACTIVATIONS["gelu_tanh"])                        # by their numbers in step.cpp
SCALES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}                    # by theirs in c10/core/ScalarType.h


class OneCall(TransformerBlock):
    """form: what step.cpp reads, a Block there; held: the tensors whose addresses are in it; both_halves: or the first one."""

    def forward(self, x: Tensor, where: tuple[Tensor, Tensor, Tensor], rotation: tuple[Tensor, Tensor] | None,
                mask: Tensor) -> Tensor:
        cache = self.attention.cache
        if x.shape[1] > FEW or x.dtype != torch.bfloat16 or x.device.type != "cpu" or cache.k is None or cache.k.dtype != x.dtype:
            return super().forward(x, where, rotation, mask)
        x = torch.ops.cpu_step.block(x, self.form, cache.k, cache.v, where[2][:, 0], *(rotation or (None, None)), mask)
        if self.both_halves:
            return x
        return torch.add(x, self.post_ffn_norm(self.feed_forward(self.ffn_norm(x))), alpha=self.residual_scale)

    def _apply(self, fn, recurse=True):     # .to() and its kin: the weights go elsewhere
        super()._apply(fn, recurse)
        return take_apart(self)

    def __reduce_ex__(self, protocol):      # copies have weights of their own
        state = {name: value for name, value in self.__dict__.items() if name not in ("form", "held", "both_halves")}
        return TransformerBlock.__new__, (TransformerBlock,), state


def pack_part(model: Transformer, part: nn.Module):
    """Blocks that the kernels know run in one call, once everything is where it stays: `part` is the model itself."""
    for block in model.layers if part is model else ():
        if fits(take_apart(block)):
            block.both_halves = multiplies(block.feed_forward)
            block.form, block.held = form_of(block)
            block.__class__ = OneCall       # the same weights, another way through them


def take_apart(block: TransformerBlock) -> TransformerBlock:
    if type(block) is OneCall:
        block.__class__ = TransformerBlock
        del block.form, block.held, block.both_halves
    return block


def fits(block: TransformerBlock) -> bool:
    a = block.attention
    if type(block) is not TransformerBlock or type(a) is not Attention or type(a.cache) is not cpu.PackedCache or ranks.size() > 1:
        return False
    return a.attend is cpu.attend and a.sinks is None and a.head_dim % 16 == 0 and takes(a.wqkv) and takes(a.wo) \
        and all(type(norm) is nn.Identity or type(norm) in (RMSNorm, cpu.PackedNorm) and on_cpu(norm.weight)
                for norm in norms_of(block) if norm is not None)


def norms_of(block: TransformerBlock) -> list[nn.Module | None]:
    a = block.attention
    return [block.attention_norm, getattr(a, "q_norm", None), getattr(a, "k_norm", None), block.post_attention_norm,
            block.ffn_norm, block.post_ffn_norm]


def on_cpu(t: Tensor) -> bool:
    return t.dtype == torch.bfloat16 and t.device.type == "cpu"


def takes(layer: nn.Module) -> bool:
    """Whether a layer is one matrix as the kernel wants it, and maybe a bias."""
    if not isinstance(layer, cpu.PackedLinear):
        packed = getattr(layer, "path", "") == "kernel" and layer.perm is None and not layer.skip
        if not packed or layer.dtype != torch.bfloat16:
            return False
    return layer.in_features % cpu.UNIT == 0 and layer.packed.device.type == "cpu" and (layer.bias is None or on_cpu(layer.bias))


def multiplies(f: nn.Module) -> bool:
    """Whether the second half is among what runs in the call."""
    return type(f) is FeedForward and f.activation in KNOWN and f.width % 16 == 0 and takes(f.w13) and takes(f.w2)


def form_of(block: TransformerBlock) -> tuple[Tensor, list[Tensor]]:
    """A block as step.cpp's struct Block, int64; and the tensors it points to."""
    a, f = block.attention, block.feed_forward
    layers = [a.wqkv, a.wo] + ([f.w13, f.w2] if block.both_halves else [None, None])
    fields = [n for layer in layers for n in matrix(layer)] + [n for norm in norms_of(block) for n in normed(norm)]
    fields += [a.n_heads, a.n_kv_heads, a.head_dim, int(a.qk_norm == "full"),
               KNOWN.index(f.activation) if block.both_halves else 0, float(a.scale), float(a.softcap), float(block.residual_scale)]
    held = [n.detach() for n in fields if isinstance(n, Tensor)]
    numbers = [n.data_ptr() if isinstance(n, Tensor) else n or 0 for n in fields]
    kinds = "".join("d" if isinstance(n, float) else "q" for n in fields)
    return torch.frombuffer(bytearray(struct.pack(kinds, *numbers)), dtype=torch.int64), held


def matrix(layer: nn.Module | None) -> list:
    """struct Matrix of calls.h."""
    if layer is None:
        return [0] * 10
    N, K = layer.out_features, layer.in_features
    if isinstance(layer, cpu.PackedLinear):
        return [N, K, 16, 0, layer.packed, None, 0, None, 0, layer.bias]
    offsets = layer.packed_offsets
    return [N, K, layer.kernel_kind(), layer.kernel_group(), layer.packed, layer.packed_scales, SCALES[layer.packed_scales.dtype],
            offsets, int(offsets is not None and offsets.dtype == torch.uint8), layer.bias]


def normed(norm: nn.Module | None) -> list:
    """struct Norm of step.cpp."""
    if not isinstance(norm, RMSNorm):
        return [None, 0, 0, 0.0]
    return [norm.weight, int(norm.style == "llama"), int(norm.style == "gemma"), float(norm.eps)]
