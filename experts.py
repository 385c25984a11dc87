"""How a layer's experts run where the plain loop of model.py (`run_experts`) would be slow or cannot be compiled.

What it is: three other forms of the same sum, one of which `pack_part` gives to each layer of a model. `Stacked`: all
experts of a layer behind one another, one call of the CPU kernel. `Opaque`: the plain loop, which a compiled graph calls as
one operator. `Gathered`: for a few tokens on an accelerator, by indexing, without asking the device what they chose.
What it is not: routing, or the meaning of a mixture; that is `MoEFeedForward` in model.py. Experts that live on the
host beside an accelerator are in mixtral-moe/offload.py, which is what to read next.
"""
import copy
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import quantize
from kernels import cpu
from model import ACTIVATIONS, FeedForward, MoEFeedForward, Transformer, run_experts
from quantize import QuantizedLinear

GATHER = 4                              # tokens a call, up to which an accelerator gathers


def layers(model: Transformer) -> list[MoEFeedForward]:
    return [block.feed_forward for block in model.layers if isinstance(block.feed_forward, MoEFeedForward)]


def pack_model(model: Transformer) -> Transformer:
    """quantize.pack_model, and every mixture in the fastest form that its weights and its device allow."""
    for part in (*model.layers, model):
        pack_part(model, part)
    return model


def pack_part(model: Transformer, part: nn.Module):
    """The same for one block, or for what is left when all are packed: the model itself."""
    quantize.pack_part(model, part)
    layer = getattr(part, "feed_forward", None)
    if isinstance(layer, MoEFeedForward):
        make_alike(layer.experts)
        on_cpu = model.norm.weight.device.type == "cpu"
        layer.run = Stacked(layer) if Stacked.fits(layer) else Opaque(layer) if on_cpu else Gathered(layer)


def make_alike(experts: nn.ModuleList):
    """Where one expert's scales do not lie among its weights of 4 bits (cpu.pack_scaled), let no expert's do."""
    for same in zip(*(expert.modules() for expert in experts)):
        packed = [m for m in same if isinstance(m, QuantizedLinear) and m.path == "kernel" and m.bits == 4]
        beside = any(m.packed_scales.dtype != torch.int32 for m in packed)
        for m in packed:
            if beside and m.packed_scales.dtype == torch.int32:
                m.packed_scales = cpu.pack_groups(m.numbers()[1])


# ---- the CPU kernel ----------------------------------------------------------------------------------------

class Records:
    """All experts of a layer, each as one run of bytes: `bytes` [X, n]. The layers keep views, so that no memory is
    added. written: such bytes, whose layers are but a pattern. Raises ValueError where experts are not of one form."""

    def __init__(self, experts: nn.ModuleList, written: Tensor | None = None):
        forms = [[(name, t.dtype, t.shape) for name, t in tensors_of(expert)] for expert in experts]
        if any(form != forms[0] for form in forms):
            raise ValueError("the experts of a layer were quantized in unlike ways")
        self.parts, n = [], 0           # name, dtype, shape, first byte; each begins at a multiple of 64
        for name, dtype, shape in forms[0]:
            self.parts.append((name, dtype, shape, n))
            n += -(-shape.numel() * dtype.itemsize // 64) * 64
        self.bytes = cpu.in_large_pages(len(forms) * n).view(len(forms), n) if written is None else written
        for record, expert in zip(self.bytes, experts):
            for (_, old), view in zip(tensors_of(expert), self.views(record)) if written is None else ():
                view.copy_(old)
            self.point(expert, record)

    def views(self, record: Tensor) -> list[Tensor]:
        """The parts of one record [n], or of all [X, n]."""
        return [record[..., at:at + shape.numel() * dtype.itemsize].view(dtype).view(*record.shape[:-1], *shape)
                for _, dtype, shape, at in self.parts]

    def point(self, expert: FeedForward, record: Tensor):
        """Let an expert's tensors be those of a record."""
        for (name, *_), view in zip(self.parts, self.views(record)):
            owner, _, leaf = name.rpartition(".")
            put(expert.get_submodule(owner), leaf, view)


def tensors_of(expert: FeedForward) -> list[tuple[str, Tensor]]:
    return [*expert.named_parameters(), *expert.named_buffers()]


def put(layer: nn.Module, name: str, value: Tensor):
    setattr(layer, name, nn.Parameter(value, requires_grad=False) if name in layer._parameters else value)


def combine(outputs: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over its experts of what they made of each token: [T, A, D], [T, A] -> [T, D]."""
    return (outputs.float() * weights[..., None]).sum(1).to(outputs.dtype)


class Stacked:
    """The kernel, which takes all experts of a layer and picks the rows of each itself."""

    def __init__(self, layer: MoEFeedForward, written: Tensor | None = None):
        self.records = Records(layer.experts, written)
        found = dict(zip((name for name, *_ in self.records.parts), self.records.views(self.records.bytes)))
        kinds = [layer.experts[0].w13, layer.experts[0].w2]
        self.w = [found["w13.packed"], found["w2.packed"]]
        self.more = [found.get(f"{kind}.{name}") for kind in ("w13", "w2")
                     for name in ("packed_scales", "packed_offsets", "bias")]
        self.sizes = [n for kind in kinds for n in self.form(kind)]
        self.clamped = layer.experts[0].activation is ACTIVATIONS["silu_clamped"]

    def __call__(self, experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return combine(self.outputs(x, ids), weights)

    def outputs(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [T, D], ids [T, A] -> [T, A, D]; zeros for an id of -1."""
        return cpu.experts(x, ids, self.w, self.more, self.sizes, self.clamped)

    @staticmethod
    def form(module: nn.Module) -> tuple[int, int, int] | None:
        """Outputs, bits and group for the kernel; None for what it does not multiply."""
        if isinstance(module, cpu.PackedLinear):
            return module.out_features, 16, 0
        if isinstance(module, QuantizedLinear) and module.path == "kernel" and module.perm is None and not module.skip:
            return module.out_features, module.kernel_kind(), module.kernel_group()
        return None

    @classmethod
    def fits(cls, layer: MoEFeedForward) -> bool:
        forms = {(cls.form(expert.w13), cls.form(expert.w2), *((name, t.dtype) for name, t in tensors_of(expert)))
                 for expert in layer.experts}
        known = layer.experts[0].activation in (ACTIVATIONS["silu"], ACTIVATIONS["silu_clamped"])
        return known and len(forms) == 1 and None not in forms.pop()


# ---- the plain loop as one operator ------------------------------------------------------------------------

KNOWN: weakref.WeakValueDictionary[int, "Opaque"] = weakref.WeakValueDictionary()


class Opaque:
    """The plain loop under a number: which experts run is known only when it does, and a graph cannot hold that."""

    def __init__(self, layer: MoEFeedForward):
        self.experts, self.number = layer.experts, id(self)
        KNOWN[self.number] = self

    def __call__(self, experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return opaque(x, weights, ids, self.number)
        return self.plain(x, weights, ids)

    def plain(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return run_experts(self.experts, x, weights, ids)


@torch.library.custom_op("mixture::run_experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def opaque(x: Tensor, weights: Tensor, ids: Tensor, number: int) -> Tensor:
    return KNOWN[number].plain(x, weights, ids)


@opaque.register_fake
def _(x, weights, ids, number):
    return torch.empty_like(x)


# ---- accelerators ------------------------------------------------------------------------------------------

class Gathered(Opaque):
    """Few tokens in a compiled graph: their experts' weights by indexing, which the compiler fuses with the product,
    so that only they are read and nobody waits for the device. Otherwise the plain loop."""

    def __init__(self, layer: MoEFeedForward):
        super().__init__(layer)
        self.up, self.down = (stacked([getattr(expert, name) for expert in layer.experts]) for name in ("w13", "w2"))
        self.activation = layer.experts[0].activation

    def __call__(self, experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and len(x) <= GATHER and None not in (self.up, self.down):
            return self.gather(x, weights, ids)
        return super().__call__(experts, x, weights, ids)

    def gather(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up = product(self.up, x[:, None], ids).chunk(2, dim=-1)                # [T, A, F] each
        y = product(self.down, self.activation(gate, up), ids)                       # [T, A, D]
        return combine(y, weights)


def stacked(layers: list[nn.Module]) -> nn.Module | None:
    """One layer whose tensors are those of `layers` behind one another, [X, ...]; they keep views of it. None where
    the layers are not of one form."""
    known = all(isinstance(layer, nn.Linear | QuantizedLinear) and getattr(layer, "perm", None) is None for layer in layers)
    if not known or len({str(layer.spec()) if isinstance(layer, QuantizedLinear) else "" for layer in layers}) > 1:
        return None
    whole = copy.copy(layers[0])
    whole._parameters, whole._buffers = dict(whole._parameters), dict(whole._buffers)
    for name in ("weight", "scales", "zeros", "bias"):
        tensors = [getattr(layer, name, None) for layer in layers]
        if tensors[0] is not None:
            put(whole, name, together := torch.stack([t.data for t in tensors]))
            for layer, part in zip(layers, together):
                put(layer, name, part)
    return whole


def product(stack: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """x [T, 1 or A, K] times the weights of experts ids [T, A] -> [T, A, N]; written out, so that it fuses."""
    if isinstance(stack, QuantizedLinear):
        x, w = F.pad(x, (stack.skip, 0)), stack.dequantize(ids)                      # [T, A, N, K]
    else:
        w = stack.weight[ids]
    y = (w.float() * x[:, :, None].float()).sum(-1)
    return (y if stack.bias is None else y + stack.bias[ids].float()).to(x.dtype)
