"""How a layer's experts run where the plain loop of model.py (`run_experts`) would be slow or cannot be compiled.

What it is: three other forms of the same sum, one of which `pack_model` gives to each layer of a model. `Stacked`: all
experts of a layer in one tensor and one call of the CPU kernel. `gathered`: a few tokens on an accelerator, by indexing,
without asking the device which experts they chose. `opaque`: the plain loop, which a compiled graph calls as one operator.
What it is not: routing, or the meaning of a mixture; that is `MoEFeedForward` in model.py. Experts that live on the
host beside an accelerator are in mixtral-moe/offload.py, which is what to read next.
"""
import copy
import weakref

import torch
import torch.nn as nn
from torch import Tensor

import quantize
from kernels import cpu
from model import ACTIVATIONS, MoEFeedForward, Transformer, run_experts
from quantize import QuantizedLinear

GATHER = 4                              # tokens a call, up to which an accelerator gathers


def layers(model: Transformer) -> list[MoEFeedForward]:
    return [block.feed_forward for block in model.layers if isinstance(block.feed_forward, MoEFeedForward)]


def pack_model(model: Transformer) -> Transformer:
    """quantize.pack_model, and every mixture in the fastest form that its weights and its device allow."""
    def finish(block: nn.Module):
        layer = getattr(block, "feed_forward", None)
        if not isinstance(layer, MoEFeedForward):
            return
        on_cpu = model.norm.weight.device.type == "cpu"
        layer.run = Stacked(layer) if Stacked.fits(layer) else Opaque(layer) if on_cpu else Gathered(layer)
    return quantize.pack_model(model, finish)


# ---- the CPU kernel ----------------------------------------------------------------------------------------

class Stacked:
    """All experts' packed weights in one tensor of each kind; the layers keep views, so that no memory is added."""

    def __init__(self, layer: MoEFeedForward):
        kinds = [[expert.w13 for expert in layer.experts], [expert.w2 for expert in layer.experts]]
        self.w = [self.stack(kind, "packed") for kind in kinds]
        self.more = [self.stack(kind, name) for kind in kinds for name in ("packed_scales", "packed_offsets", "bias")]
        self.sizes = [n for kind in kinds for n in self.form(kind[0])[1:4]]
        self.clamped = layer.experts[0].activation is ACTIVATIONS["silu_clamped"]

    def __call__(self, experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.cpu_kernels.experts(x, weights, ids, self.w, self.more, self.sizes, self.clamped)

    @staticmethod
    def stack(kind: list[nn.Module], name: str) -> Tensor | None:
        tensors = [getattr(module, name, None) for module in kind]
        if tensors[0] is None:
            return None
        whole = torch.stack(tensors)
        for module, part in zip(kind, whole):
            setattr(module, name, part)
        return whole

    @staticmethod
    def form(module: nn.Module) -> tuple | None:
        """What must be alike in all experts: class, outputs, bits, group, which tensors there are. None: not packed."""
        if isinstance(module, cpu.PackedLinear):
            return cpu.PackedLinear, module.out_features, 16, 0, module.bias is not None
        if isinstance(module, QuantizedLinear) and module.path == "kernel" and module.perm is None and not module.skip:
            kinds = tuple(t is not None and t.dtype for t in (module.packed_scales, module.packed_offsets, module.bias))
            return type(module), module.out_features, module.kernel_kind(), module.kernel_group(), kinds
        return None

    @classmethod
    def fits(cls, layer: MoEFeedForward) -> bool:
        forms = {(cls.form(expert.w13), cls.form(expert.w2)) for expert in layer.experts}
        known = layer.experts[0].activation in (ACTIVATIONS["silu"], ACTIVATIONS["silu_clamped"])
        return known and len(forms) == 1 and None not in forms.pop()


# ---- the plain loop as one operator ------------------------------------------------------------------------

KNOWN: weakref.WeakValueDictionary[int, nn.ModuleList] = weakref.WeakValueDictionary()


class Opaque:
    """The plain loop under a number: which experts run is known only when it does, and a graph cannot hold that."""

    def __init__(self, layer: MoEFeedForward):
        self.number = id(layer.experts)
        KNOWN[self.number] = layer.experts

    def __call__(self, experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return opaque(x, weights, ids, self.number)
        return run_experts(experts, x, weights, ids)


@torch.library.custom_op("mixture::run_experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def opaque(x: Tensor, weights: Tensor, ids: Tensor, number: int) -> Tensor:
    return run_experts(KNOWN[number], x, weights, ids)


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
        return (y.float() * weights[..., None]).sum(1).to(x.dtype)


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


def put(layer: nn.Module, name: str, value: Tensor):
    setattr(layer, name, nn.Parameter(value, requires_grad=False) if name in layer._parameters else value)


def product(stack: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """x [T, 1 or A, K] times the weights of experts ids [T, A] -> [T, A, N]; written out, so that it fuses."""
    w = stack.dequantize(ids) if isinstance(stack, QuantizedLinear) else stack.weight[ids]       # [T, A, N, K]
    y = (w.float() * x[:, :, None].float()).sum(-1)
    return (y if stack.bias is None else y + stack.bias[ids].float()).to(x.dtype)
