"""Linear layers with int8 or int4 weights, activations as they are. `python quantize.py --help` rewrites a
checkpoint with them.

What it is: how a weight is rounded (`quantize`), what the numbers mean (`dequantize`, the oracle of everything
else), how they lie on disk (the layer's buffers), and how a device multiplies them (`pack`, `forward`). A layer
owns its format: no other file knows what a nibble is. What it is not: the command, with its recipes, is in
quantize_cli.py; a better rounding, GPTQ, is in gptq.py; other people's files are read by foreign.py.

Letters: N outputs, K inputs, G groups of inputs that share a scale; w = (q - zero) * scale.
"""
import sys
import warnings
from collections import Counter
from collections.abc import Callable

warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # said when torch is imported; nothing here needs it

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, cpu_block, gpu, gpu_block
from ranks import notice

GROUPSIZES = (32, 64, 128, 256)
CHUNK = 1 << 20                         # weights rounded at a time: the float32 copies stay at some 20 MB
STOCK_ROWS = {8: 8, 4: 16}              # PyTorch's packed operators are slower than bfloat16 above so many rows


class QuantizedLinear(nn.Module):
    """y = x @ w.T + bias, and for ids instead of x: rows of w, which makes it a tied embedding table too.

    Buffers, as on disk: weight (see the kinds below), scales [N, G], and where they are needed zeros [N, G]
    (absent: `centre`), perm [K] (the order in which the inputs are stored: GPTQ's act-order) and bias [N].
    `pack` replaces them by what the device multiplies fastest.
    """
    mode: str                           # as recipes and files name it
    bits: int
    centre: int                         # of the stored values: 0 if signed, 8 for nibbles
    path, skinny = "plain", False       # how it is multiplied; whether kernels of ours serve on a GPU
    skip = 0                            # inputs before a rank's first one, in its first group: zeros stand for them

    def __init__(self, in_features: int, out_features: int, groupsize: int = 0, *, bias=False, zeros=False,
                 perm=False, scale_dtype=torch.bfloat16, dtype=torch.bfloat16, device=None):
        """groupsize 0: one scale for a whole row. dtype: of the rows that a table looks up."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.groupsize = min(groupsize or in_features, in_features)
        groups = -(-in_features // self.groupsize)

        def buffer(name, wanted, *shape, kind):
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device) if wanted else None)
        buffer("weight", True, out_features, self.stored_columns(in_features), kind=self.stored_dtype)
        buffer("scales", True, out_features, groups, kind=scale_dtype)
        buffer("zeros", zeros, out_features, groups, kind=self.stored_dtype)
        buffer("perm", perm, in_features, kind=torch.int32)
        buffer("bias", bias, out_features, kind=dtype)
        for name in ("packed", "packed_scales", "packed_offsets"):
            self.register_buffer(name, None, persistent=False)

    def spec(self) -> dict:
        """What a file must say of this layer, for `empty_layer` to make it again."""
        return {"mode": self.mode, "groupsize": 0 if self.groupsize == self.in_features else self.groupsize,
                "zeros": self.zeros is not None, "perm": self.perm is not None,
                "scale_dtype": str(self.scales.dtype).removeprefix("torch.")}

    # ---- meaning

    def numbers(self, ids: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the rows `ids`, packed or not: values less `centre`, int8 [..., K]; scales [..., G]; offsets, what is
        added to the values before scaling, int8 [..., G] or None."""
        if self.path == "kernel":
            index = torch.arange(self.out_features, device=self.packed.device)[ids] if isinstance(ids, slice) else ids
            packed = (self.packed, self.packed_scales, self.packed_offsets)
            codes, *groups = cpu.scaled_rows(packed, index, *self.kernel_shape())
        else:
            codes, groups = self.unpack(self.weight[ids]), [self.scales[ids], None]
            if self.zeros is not None:
                groups[1] = (self.centre - self.zeros[ids].to(torch.int16)).to(torch.int8)
        return self.value(codes[..., :self.in_features]), *groups

    def value(self, codes: Tensor) -> Tensor:
        """What is stored, unpacked, as int8 numbers."""
        return codes - self.centre

    def dequantize(self, ids: Tensor | slice = slice(None)) -> Tensor:
        """w, or its rows `ids`, float32 [..., K] and exact, with the inputs in the caller's order."""
        def each(t):                                                                 # [..., G] -> [..., K]
            return t.float().repeat_interleave(self.groupsize, -1)[..., :self.in_features]
        values, scales, offsets = self.numbers(ids)
        w = (values.float() if offsets is None else values.float() + each(offsets)) * each(scales)
        return w if self.perm is None else w[..., self.perm.argsort()]

    def cut(self, dim: int, ranges: list[tuple[int, int]]) -> dict[str, tuple[int, list[tuple[int, int]]]]:
        """Keep some outputs (dim 0), or one range of inputs (1), for a rank of several. Returns which columns or rows
        of each buffer that takes; the caller cuts them. A group may lie on two ranks: both have its scale."""
        if dim == 0:
            self.out_features = sum(b - a for a, b in ranges)
            return {leaf: (0, ranges) for leaf in ("weight", "scales", "zeros", "bias")}
        if self.perm is not None:
            raise ValueError("a layer quantized in another order of its inputs (act-order) cannot be cut for ranks")
        (start, stop), whole_row = ranges[0], self.kernel_group() == 0
        unit = 8 // self.bits if whole_row else self.groupsize
        first, self.skip = start // unit * unit, start % unit
        self.in_features = stop - first
        self.groupsize = self.in_features if whole_row else min(self.groupsize, self.in_features)
        groups = (0, 1) if whole_row else (first // unit, -(-stop // unit))
        columns = (self.stored_columns(first), self.stored_columns(stop))
        return {"weight": (1, [columns]), "scales": (1, [groups]), "zeros": (1, [groups])}

    # ---- packing and multiplying

    def pack(self) -> "QuantizedLinear":
        """Lay the weights out for the device they are on. The paths, best first: the CPU's kernel, or the GPU's, which reads
        them as they are; PyTorch's packed operators; dequantizing, which is the meaning itself and works anywhere."""
        whole_units = self.kernel_group() % cpu.UNIT == 0
        if self.path != "plain":
            return self
        if self.scales.device.type == "cpu" and whole_units and cpu.available(quantized=True):
            self.pack_for_kernel()
        elif self.scales.device.type in ("cpu", "cuda"):
            self.skinny = gpu.works(self)
            self.pack_for_stock()
        return self

    def kernel_group(self) -> int:
        return self.groupsize if self.groupsize < self.in_features else 0           # 0: a whole row, padded or not

    def kernel_kind(self) -> int:
        return self.bits

    def kernel_shape(self) -> tuple[int, int, int, int]:
        return self.out_features, self.in_features, self.bits, self.kernel_group()

    def pack_for_kernel(self):
        _, scales, offsets = self.numbers()
        self.packed, self.packed_scales, self.packed_offsets = cpu.pack_scaled(
            self.unpack(self.weight)[:, :self.in_features], scales, offsets, self.bits, self.kernel_group())
        self.weight = self.scales = self.zeros = None
        self.path = "kernel"

    def unpack_from_kernel(self):
        """Back to the buffers as on disk, so that another device can pack them."""
        if self.path == "kernel":
            packed = (self.packed, self.packed_scales, self.packed_offsets)
            codes, scales, offsets = cpu.scaled_rows(packed, torch.arange(self.out_features), *self.kernel_shape())
            self.weight, self.scales = self.store(codes[:, :self.in_features]), scales.contiguous()
            plain = self.packed_offsets is None and (offsets is None or not offsets.any())    # heads always have some
            self.zeros = None if plain else (self.centre - offsets.to(torch.int16)).to(self.stored_dtype)
            self.packed = self.packed_scales = self.packed_offsets = None
            self.path = "plain"

    def pack_for_stock(self):
        """Packed tensors beside the plain ones, which many rows and lookups use; a trial tells whether the
        operator is there and takes this shape."""
        try:
            self.packed, self.packed_scales = self.stock_pack()
            self.stock_multiply(torch.zeros(1, self.in_features, dtype=self.dtype, device=self.scales.device))
            self.path = "stock"
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            self.packed = self.packed_scales = None
            if not self.skinny:
                notice(f"{self.mode} weights are dequantized at every use: {str(error).splitlines()[0]}")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; ids [...] -> rows [..., K]."""
        if not x.is_floating_point():
            return self.dequantize(x).to(self.dtype)
        if self.skip:
            x = F.pad(x, (self.skip, 0))
        rows = x.numel() // x.shape[-1]
        elsewhere = self.path == "kernel" and x.device.type != "cpu"                 # a copy of a layer of the host's
        few = 4 if self.skinny else STOCK_ROWS[self.bits]
        if self.path in ("plain", "gpu") or elsewhere or self.path == "stock" and (rows > few or x.dtype != self.dtype):
            return gpu.multiply_layer(self, x) if self.skinny and x.dtype == torch.bfloat16 else self.plain_multiply(x)
        if self.perm is not None:
            x = x[..., self.perm]
        if self.path == "kernel":
            y = cpu.linear(x, self.packed, self.packed_scales, self.packed_offsets, self.out_features,
                           self.kernel_kind(), self.kernel_group())
        else:
            y = self.stock_multiply(x.reshape(rows, -1)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    head = forward                      # as TokenTable's

    def plain_multiply(self, x: Tensor) -> Tensor:
        """What all of this means."""
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)

    # ---- rounding

    @classmethod
    def quantize(cls, weight: Tensor, groupsize: int = 0, **options) -> "QuantizedLinear":
        """Round w [N, K] to the nearest value its group can hold: off by half a step at most."""
        layer = cls(weight.shape[1], weight.shape[0], groupsize, device=weight.device, **cls.options | options)
        for at in range(0, len(weight), step := max(1, CHUNK // weight.shape[1])):
            w = weight[at:at + step].float()
            layer.set_rows(slice(at, at + step), w, *cls.grid(by_group(w, layer.groupsize)))
        return layer

    def set_rows(self, rows: slice, w: Tensor, scales: Tensor, zeros: Tensor):
        """Store w's nearest values on a grid of scales and zeros [n, G]."""
        groups = by_group(w, self.groupsize)                                         # [n, G, g]
        q = (groups / scales.float()[..., None]).round_() + zeros[..., None]
        q = q.clamp_(self.centre - 2 ** (self.bits - 1), self.centre + 2 ** (self.bits - 1) - 1)
        self.weight[rows] = self.store(q.flatten(1)[:, :w.shape[1]])
        self.scales[rows] = scales
        if self.zeros is not None:
            self.zeros[rows] = zeros.to(self.zeros.dtype)


class Int8Linear(QuantizedLinear):
    """weight int8 [N, K], symmetric, by default one float32 scale per output."""
    mode, bits, centre, stored_dtype = "int8", 8, 0, torch.int8
    options = {"scale_dtype": torch.float32}

    @staticmethod
    def stored_columns(in_features: int) -> int:
        return in_features

    @staticmethod
    def unpack(weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def store(values: Tensor) -> Tensor:
        return values.to(torch.int8)

    @staticmethod
    def grid(groups: Tensor) -> tuple[Tensor, Tensor]:
        """[n, G, g] -> scales and zeros [n, G]: the largest magnitude becomes 127."""
        scales = groups.abs().amax(-1) / 127
        scales = torch.where(scales == 0, 1.0, scales)
        return scales, torch.zeros_like(scales)

    def stock_pack(self):
        if self.groupsize != self.in_features or self.zeros is not None or self.in_features % 16 or self.skinny:
            raise NotImplementedError("PyTorch's int8 operator takes one scale per output and rows of 16 n; on a GPU it is slow")
        return None, self.scales.flatten().to(self.dtype)      # the weight serves as it is

    def stock_multiply(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.packed_scales)


class Int4Linear(QuantizedLinear):
    """weight uint8 [N, K / 2], input 2i in the low nibble of byte i; a scale and a zero point per group."""
    mode, bits, centre, stored_dtype = "int4", 4, 8, torch.uint8
    options = {"zeros": True}

    @staticmethod
    def stored_columns(in_features: int) -> int:
        return -(-in_features // 2)

    @staticmethod
    def unpack(weight: Tensor) -> Tensor:
        return torch.stack([weight & 15, weight >> 4], -1).flatten(-2).to(torch.int8)

    @staticmethod
    def store(values: Tensor) -> Tensor:
        even_odd = F.pad(values, (0, values.shape[-1] % 2)).to(torch.uint8).unflatten(-1, (-1, 2))
        return even_odd[..., 0] | even_odd[..., 1] << 4

    @staticmethod
    def grid(groups: Tensor) -> tuple[Tensor, Tensor]:
        """[n, G, g] -> bfloat16 scales and zeros [n, G]: the range, zero included, becomes 0 ... 15. The scale is
        rounded up, since a smaller one would not reach the ends."""
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / 15 * (1 + 2 ** -8)).to(torch.bfloat16)
        scales = torch.where(scales == 0, 1.0, scales)
        return scales, (-low / scales.float()).round().clamp(0, 15)

    def stock_pack(self):
        scales = self.scales.to(self.dtype)
        offsets = torch.zeros_like(scales) if self.zeros is None else (self.numbers()[2] * self.scales).to(self.dtype)
        scales_and_zeros = torch.stack([scales, offsets], -1).transpose(0, 1).contiguous()       # [G, N, 2]
        if self.in_features % self.groupsize:
            raise NotImplementedError("PyTorch's int4 operator takes whole groups")
        if self.dtype == torch.float32:
            raise NotImplementedError("PyTorch's int4 operator crawls in float32")
        if scales.device.type == "cpu":
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.unpack(self.weight).int(), 1), \
                scales_and_zeros
        swapped = self.weight << 4 | self.weight >> 4                                # it wants even inputs high
        return torch.ops.aten._convert_weight_to_int4pack(swapped, 8), scales_and_zeros

    def stock_multiply(self, x: Tensor) -> Tensor:
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else \
            torch.ops.aten._weight_int4pack_mm
        return operator(x, self.packed, self.groupsize, self.packed_scales)


class Fp4Linear(Int4Linear):
    """weight uint8 [N, K / 2] as Int4Linear's, each nibble a float of 4 bits: sign, two of exponent, one of mantissa.
    gpt-oss's experts (mxfp4: a power of two for 32 of them). Twice these floats are small whole numbers."""
    mode, centre = "mxfp4", 0

    @staticmethod
    def value(codes: Tensor) -> Tensor:
        magnitude = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.int8, device=codes.device)[(codes & 7).long()]
        return torch.where(codes > 7, -magnitude, magnitude)

    @staticmethod
    def grid(groups: Tensor):
        raise NotImplementedError("mxfp4 weights are read, never made")

    def kernel_kind(self) -> int:
        return cpu.FP4

    def stock_pack(self):
        raise NotImplementedError("PyTorch has no operator for them")


class SplitLinear(nn.Module):
    """A fused layer whose parts (q, k and v; gate and up) somebody quantized in unlike ways."""

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], -1)


KINDS = {kind.mode: kind for kind in (Int8Linear, Int4Linear, Fp4Linear)}


def empty_layer(in_features: int, out_features: int, mode: str, **spec) -> QuantizedLinear:
    """The layer a file's `spec` describes, unfilled; raises ValueError for one this version does not know."""
    if mode not in KINDS:
        raise ValueError(f"unknown weight format '{mode}'; known are {', '.join(KINDS)}")
    spec["scale_dtype"] = getattr(torch, spec.get("scale_dtype", "bfloat16"))
    return KINDS[mode](in_features, out_features, **spec)


def by_group(w: Tensor, groupsize: int) -> Tensor:
    """[n, K] -> [n, G, g], the last group filled up with zeros."""
    return F.pad(w, (0, -w.shape[1] % groupsize)).unflatten(1, (-1, groupsize))


def pack_model(model: nn.Module, finish: Callable[[nn.Module], None] = lambda block: None) -> nn.Module:
    """Every layer as its device multiplies it fastest; for running, not for saving. finish: called with each block when
    it is packed; memory grows by one block at most."""
    for part in (*model.layers, model):
        pack_part(model, part)
        finish(part)
    return model


def pack_part(model: nn.Module, part: nn.Module):
    """The same for one block, or for what is left when all are packed: the model itself."""
    for module in part.modules():
        if isinstance(module, QuantizedLinear):
            module.pack()
    cpu.pack_part(model, part)
    gpu_block.pack_part(model, part)
    cpu_block.pack_part(model, part)


def describe(model: nn.Module) -> str | None:
    """'int4.g32', or with a recipe all there is: 'int4.g32 + int8'; None for a model of plain weights."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    kinds = Counter(m.mode + (f".g{m.groupsize}" if m.kernel_group() else "") for m in layers)
    return " + ".join(kind for kind, _ in kinds.most_common()) or None


if __name__ == "__main__":              # the command stands above checkpoint.py, which loads these layers
    from quantize_cli import main
    sys.exit(main())
