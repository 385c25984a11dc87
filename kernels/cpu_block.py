"""A Transformer's blocks in one call on a CPU, for steps of few tokens.

What it is: `OneCall`, a block whose layers step.cpp runs, which has the other kernels multiply and attend, and `Blocks`,
consecutive ones in one call: calls, loops of a microsecond and tensors between the products took an eighth of a compiled step
and a quarter of an eager one. What it is not: another model. TransformerBlock is what it means and what runs for prompts,
without a cache, in another dtype than bfloat16, and where something does not fit. Mixtures, and feed-forwards of another
form, share the first half. The call knows weights and caches by their addresses: blocks that are put into the model later,
layers and norms that are put into a block, and hooks on any of them, it does not see until the model is packed again. cpu.py
lays the weights out.
"""
import struct
from itertools import groupby

import torch
import torch.nn as nn
from torch import Tensor

import ranks
from kernels import cpu
from model import ACTIVATIONS, FEW, Attention, FeedForward, RMSNorm, Transformer, TransformerBlock

KNOWN = (None, ACTIVATIONS["silu"], ACTIVATIONS["gelu_tanh"])                        # by their numbers in step.cpp
SCALES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}                    # by theirs in c10/core/ScalarType.h
PLACE = 4                                                                            # the last numbers of a form: where its cache lies


class OneCall(TransformerBlock):
    """form: what step.cpp reads, a Block there; held: the tensors whose addresses are in it; both_halves: or the first one."""

    def takes(self, x: Tensor) -> bool:
        k = self.attention.cache.k
        return x.shape[1] <= FEW and x.dtype == torch.bfloat16 and x.device.type == "cpu" and k is not None and k.dtype == x.dtype

    def forward(self, x: Tensor, where: tuple[Tensor, Tensor, Tensor], rotation: tuple[Tensor, Tensor] | None,
                mask: Tensor) -> Tensor:
        if not self.takes(x):
            return super().forward(x, where, rotation, mask)
        x = torch.ops.cpu_step.blocks(x, self.form, where[2][:, 0], *(rotation or (None, None)), mask)
        if self.both_halves:
            return x
        return torch.add(x, self.post_ffn_norm(self.feed_forward(self.ffn_norm(x))), alpha=self.residual_scale)

    def _apply(self, fn, recurse=True):     # .to() and its kin: the weights go elsewhere
        super()._apply(fn, recurse)
        return take_apart(self)

    def __reduce_ex__(self, protocol):      # copies have weights of their own
        state = {name: value for name, value in self.__dict__.items() if name not in ("form", "held", "both_halves")}
        return TransformerBlock.__new__, (TransformerBlock,), state


class Blocks:
    """Consecutive blocks with the same rotation and mask, called as one. forms: theirs, one behind another."""

    def __init__(self, blocks: list[OneCall]):
        self.blocks, self.forms = blocks, torch.cat([block.form for block in blocks])
        for i, block in enumerate(blocks):
            block.form = self.forms[i:i + 1]

    def __call__(self, x: Tensor, where: tuple[Tensor, Tensor, Tensor], rotation: tuple[Tensor, Tensor] | None,
                 mask: Tensor) -> Tensor:
        if all(type(block) is OneCall for block in self.blocks) and self.blocks[0].takes(x):
            return torch.ops.cpu_step.blocks(x, self.forms, where[2][:, 0], *(rotation or (None, None)), mask)
        for block in self.blocks:
            x = block(x, where, rotation, mask)
        return x


class Calls(list):
    """Transformer.calls. A copy of the model has layers of its own, and none of these."""

    def __reduce_ex__(self, protocol):
        return type(None), ()


@torch.inference_mode(False)                # forms are written to when caches move
def pack_part(model: Transformer, part: nn.Module):
    """Blocks that the kernels know run in one call, once everything is where it stays: `part` is the model itself."""
    if part is not model:
        return
    fitting = [block for block in model.layers if fits(take_apart(block))]
    for block in fitting:
        block.both_halves = multiplies(block.feed_forward)
        block.form, block.held = form_of(block)
        block.__class__ = OneCall               # the same weights, another way through them
    model.calls = calls_of(model) if fitting else None


def calls_of(model: Transformer) -> Calls:
    """Transformer.calls: what `forward` calls in place of the layers one by one."""
    def alike(layer: tuple[TransformerBlock, int, int]) -> tuple:
        return type(layer[0]) is OneCall and layer[0].both_halves, *layer[1:]
    calls = Calls()
    for (joined, rope, window), group in groupby(zip(model.layers, model.args.layer_ropes, model.args.layer_windows), alike):
        blocks = [block for block, *_ in group]
        calls += [(call, rope, window) for call in ([Blocks(blocks)] if joined else blocks)]
    for block in model.layers:
        if type(block) is OneCall:
            block.attention.cache.place = block.form[0, -PLACE:]
    return calls


def take_apart(block: TransformerBlock) -> TransformerBlock:
    if type(block) is OneCall:
        block.__class__ = TransformerBlock
        block.attention.cache.place = None
        block.form.zero_()                  # who still has it is told
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
    """A block as step.cpp's struct Block, int64 [1, fields]; and the tensors it points to."""
    a, f = block.attention, block.feed_forward
    layers = [a.wqkv, a.wo] + ([f.w13, f.w2] if block.both_halves else [None, None])
    fields = [n for layer in layers for n in matrix(layer)] + [n for norm in norms_of(block) for n in normed(norm)]
    fields += [a.n_heads, a.n_kv_heads, a.head_dim, int(a.qk_norm == "full"),
               KNOWN.index(f.activation) if block.both_halves else 0, float(a.scale), float(a.softcap), float(block.residual_scale)]
    fields += [0] * PLACE
    held = [n.detach() for n in fields if isinstance(n, Tensor)]
    numbers = [n.data_ptr() if isinstance(n, Tensor) else n or 0 for n in fields]
    kinds = "".join("d" if isinstance(n, float) else "q" for n in fields)
    return torch.frombuffer(bytearray(struct.pack(kinds, *numbers)), dtype=torch.int64)[None], held


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
