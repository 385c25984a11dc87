"""A Transformer's step in one call on a CPU, from ids to logits; or a block of it.

What it is: `WholeStep`, a model that step.cpp runs, which has the other kernels multiply and attend, and `OneCall`, a block that
it runs: calls, loops of a microsecond and tensors between the products took an eighth of a compiled step and a quarter of an
eager one. Prompts go the same way where the processor multiplies bfloat16. What it is not: another model. Transformer and
TransformerBlock are what they mean and what runs without a cache, in another dtype than bfloat16, and where something does not
fit. Mixtures, and feed-forwards of another form, share the first half of a block. The call knows weights and caches by their
addresses and has read the model's args: parts that are put into the model later, hooks on any of them or on the model, and other
args it does not see until the model is packed again. cpu.py lays the weights out.
"""
import struct

import torch
import torch.nn as nn
from torch import Tensor

import ranks
from kernels import cpu
from model import ACTIVATIONS, Attention, FeedForward, RMSNorm, TokenTable, Transformer, TransformerBlock
from sampling import Sampler

KNOWN = (None, ACTIVATIONS["silu"], ACTIVATIONS["gelu_tanh"])                        # by their numbers in step.cpp
SCALES = {torch.int32: 3, torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}    # by theirs in c10/core/ScalarType.h
PLACE = 4                                                                            # the last numbers of a form: where its cache lies


class WholeStep:
    """Transformer.step. forms: its blocks', one behind another; ends: what step.cpp reads of the rest, struct Ends there; held:
    the tensors whose addresses are in it; most: tokens a row. A copy of the model has layers of its own, and none of this."""

    def __init__(self, model: Transformer):
        self.blocks, self.forms = list(model.layers), torch.cat([block.form for block in model.layers])
        for i, block in enumerate(self.blocks):
            block.form = self.forms[i:i + 1]
        args, table, head = model.args, model.tok_embeddings, head_of(model)
        self.most, self.vocabulary = most_tokens(self.blocks[0]), head.out_features
        self.ends, self.held = written([*matrix(table), *matrix(head), *normed(model.norm), float(args.embedding_scale),
                                        float(args.output_scale), float(args.output_softcap)])

    def whole(self) -> bool:
        """Whether no block was taken apart, as all are when a model is moved."""
        return all(type(block) is OneCall for block in self.blocks)

    def takes(self, tokens: Tensor) -> bool:
        k = self.blocks[0].attention.cache.k
        return tokens.shape[1] <= self.most and tokens.dtype == torch.long and tokens.device.type == "cpu" and self.whole() \
            and k is not None and k.dtype == torch.bfloat16

    def __call__(self, tokens: Tensor, input_pos: Tensor, slots: int, logits_at: Tensor | None) -> Tensor:
        """Transformer.forward with caches: tokens, input_pos [B, T], logits_at [B, n] -> logits [B, T or n, V]."""
        return torch.ops.cpu_step.step(tokens, input_pos, self.forms, self.ends, slots, logits_at, self.vocabulary)

    def next(self, tokens: Tensor, input_pos: Tensor, ahead: int, slots: int, sampler: Sampler) -> Tensor:
        """A step of one token a row, and the draw: tokens [B] at input_pos [B] + ahead -> ids [B]. What Python and PyTorch do
        between two steps has left the caches by the time it is needed again: each operator there takes 30 microseconds."""
        return torch.ops.cpu_step.next.default(tokens, input_pos, ahead, self.forms, self.ends, slots, self.vocabulary, *sampler.orders())

    def __reduce_ex__(self, protocol):
        return type(None), ()


def one_call(model: Transformer | None, tokens: int = 1) -> bool:
    """Whether steps of so many tokens a row are."""
    return model is not None and model.step is not None and model.step.whole() and tokens <= model.step.most


def draws(model: Transformer, tokens: Tensor, sampler: Sampler) -> bool:
    """Whether model.step.next serves."""
    return model.step is not None and model.step.takes(tokens[:, None]) and sampler.known


class OneCall(TransformerBlock):
    """form: what step.cpp reads, a Block there; held: the tensors whose addresses are in it; both_halves: or the first one."""

    def takes(self, x: Tensor) -> bool:
        k = self.attention.cache.k
        return x.shape[1] <= most_tokens(self) and x.dtype == torch.bfloat16 and x.device.type == "cpu" and k is not None and k.dtype == x.dtype

    def forward(self, x: Tensor, where: tuple[Tensor, Tensor, Tensor], rotation: tuple[Tensor, Tensor] | None,
                mask: Tensor) -> Tensor:
        if not self.takes(x):
            return super().forward(x, where, rotation, mask)
        x = torch.ops.cpu_step.block(x, self.form, where[2][:, 0], *(rotation or (None, None)), mask)
        if self.both_halves:
            return x
        return torch.add(x, self.post_ffn_norm(self.feed_forward(self.ffn_norm(x))), alpha=self.residual_scale)

    def _apply(self, fn, recurse=True):     # .to() and its kin: the weights go elsewhere
        super()._apply(fn, recurse)
        return take_apart(self)

    def __reduce_ex__(self, protocol):      # copies have weights of their own
        state = {name: value for name, value in self.__dict__.items() if name not in ("form", "held", "both_halves")}
        return TransformerBlock.__new__, (TransformerBlock,), state


@torch.inference_mode(False)                # forms are written to when caches move
def pack_part(model: Transformer, part: nn.Module):
    """Blocks that the kernels know run in one call, once everything is where it stays: `part` is the model itself. And all of
    it, if they know all."""
    if part is not model:
        return
    fitting = [i for i, block in enumerate(model.layers) if fits(take_apart(block))]
    for i in fitting:
        block = model.layers[i]
        block.both_halves = multiplies(block.feed_forward)
        block.form, block.held = form_of(block, model.ropes, model.args.layer_ropes[i], model.args.layer_windows[i])
        block.__class__ = OneCall               # the same weights, another way through them
    whole = 0 < len(fitting) == len(model.layers) and all(block.both_halves for block in model.layers) and known_ends(model)
    model.step = WholeStep(model) if whole else None
    for i in fitting:
        model.layers[i].attention.cache.place = model.layers[i].form[0, -PLACE:]


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


def known(block: TransformerBlock, tokens: int = 1) -> bool:
    """Whether a whole step of so many tokens a row may have it."""
    return fits(block) and multiplies(block.feed_forward) and tokens <= most_tokens(block)


def most_tokens(block: TransformerBlock) -> float:
    """A row, in a call."""
    return cpu.most_queries(block.attention.head_dim, torch.bfloat16)


def multiplies(f: nn.Module) -> bool:
    """Whether the second half is among what runs in the call."""
    return type(f) is FeedForward and f.activation in KNOWN and f.width % 16 == 0 and takes(f.w13) and takes(f.w2)


def known_ends(model: Transformer) -> bool:
    """Whether embedding, last norm and head are what step.cpp knows."""
    table, head, D = model.tok_embeddings, head_of(model), model.args.dim
    return (on_cpu(table.weight) and table.weight.is_contiguous() and table.weight.shape[1] == D if type(table) is TokenTable else
            takes(table) and table.in_features == D) and takes(head) and head.in_features == D \
        and type(model.norm) in (RMSNorm, cpu.PackedNorm) and on_cpu(model.norm.weight)


def head_of(model: Transformer) -> nn.Module:
    return model.tok_embeddings if model.output is None else model.output


def form_of(block: TransformerBlock, ropes: nn.ModuleList, rope: int, window: int) -> tuple[Tensor, list[Tensor]]:
    """A block as step.cpp's struct Block, int64 [1, fields]; and the tensors it points to."""
    a, f = block.attention, block.feed_forward
    layers = [a.wqkv, a.wo] + ([f.w13, f.w2] if block.both_halves else [None, None])
    fields = [n for layer in layers for n in matrix(layer)] + [n for norm in norms_of(block) for n in normed(norm)]
    fields += [a.n_heads, a.n_kv_heads, a.head_dim, int(a.qk_norm == "full"),
               KNOWN.index(f.activation) if block.both_halves else 0, float(a.scale), float(a.softcap), float(block.residual_scale)]
    turned = ropes[rope].frequencies if rope >= 0 else torch.empty(0)
    fields += [turned, turned.numel(), ropes[rope].amplitude if rope >= 0 else 0.0, window] + [0] * PLACE
    form, held = written(fields)
    return form[None], held


def written(fields: list) -> tuple[Tensor, list[Tensor]]:
    """A struct whose fields take 8 bytes, int64 [fields], with tensors as their addresses; and these tensors."""
    held = [n.detach() for n in fields if isinstance(n, Tensor)]
    numbers = [n.data_ptr() if isinstance(n, Tensor) else n or 0 for n in fields]
    kinds = "".join("d" if isinstance(n, float) else "q" for n in fields)
    return torch.frombuffer(bytearray(struct.pack(kinds, *numbers)), dtype=torch.int64), held


def matrix(layer: nn.Module | None) -> list:
    """struct Matrix of calls.h."""
    if layer is None:
        return [0] * 10
    if isinstance(layer, TokenTable):
        return [*layer.weight.shape, 0, 0, layer.weight] + [None] * 5
    N, K = layer.out_features, layer.in_features
    if isinstance(layer, cpu.PackedLinear):
        return [N, K, 16, 0, layer.packed, None, 0, None, -1, layer.bias]
    scales, offsets = layer.packed_scales, layer.packed_offsets
    least = -1 if layer.bits == 8 or offsets is not None else int(scales) if scales.dtype == torch.int32 else 0
    return [N, K, layer.kernel_kind(), layer.kernel_group(), layer.packed, scales, SCALES[scales.dtype], offsets, least, layer.bias]


def normed(norm: nn.Module | None) -> list:
    """struct Norm of step.cpp."""
    if not isinstance(norm, RMSNorm):
        return [None, 0, 0, 0.0]
    return [norm.weight, int(norm.style == "llama"), int(norm.style == "gemma"), float(norm.eps)]
