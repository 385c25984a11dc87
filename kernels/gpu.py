"""A GPU kernel for few rows and int8 or int4 weights: y = x @ w.T, in Triton.

What it is: one product that reads its weights once, as they lie on disk (quantize.py), and turns them into numbers on
the way, for 1 to 32 rows: steps of a batch and of speculation, where PyTorch's int4 operator is made for 1 to 4 rows and
dequantizing writes four times what it reads. What it is not: needed. Without Triton the layers of quantize.py
multiply as PyTorch can; many rows are dequantized and multiplied by cuBLAS. The CPU's kernels are in cpu.py.

With TRITON_INTERPRET=1 the kernel runs on a CPU, slowly; so the tests run it. It has been compiled for sm_90, but not
run on a GPU yet: its speed there is not known.
"""
import os
import sys
from functools import cache

import torch
from torch import Tensor

try:                                    # where it cannot run it is not loaded: it brings the compiler, which takes 2 s
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS = 32                               # at most; tensor cores multiply 16 anyway
BLOCK_N = 64                            # outputs of a program
TILE = 128                              # inputs it looks at at a time, if a group is not smaller
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"                           # it cannot multiply bfloat16
PROGRAMS = 264                          # wanted, two for each multiprocessor of a large GPU


def works(layer) -> bool:
    """Whether the kernel serves a QuantizedLinear where it is: tried, once for each of its forms. GPU_KERNELS=0: never."""
    tile = min(layer.groupsize, TILE)
    whole = layer.in_features % tile == 0 and layer.groupsize % tile == 0 and tile >= 32 and tile & (tile - 1) == 0
    there = triton is not None and os.environ.get("GPU_KERNELS") != "0" and (layer.scales.is_cuda or INTERPRETED)
    return there and whole and layer.mode in ("int8", "int4") and \
        tried(layer.bits, layer.zeros is not None, tile, layer.scales.dtype, layer.scales.device)


@cache
def tried(bits: int, zeros: bool, tile: int, scale_dtype: torch.dtype, device: torch.device) -> bool:
    def some(*shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=device)
    stored = torch.int8 if bits == 8 else torch.uint8
    try:
        linear(some(1, tile, dtype=torch.bfloat16), some(64, tile * bits // 8, dtype=stored), some(64, 1, dtype=scale_dtype),
               some(64, 1, dtype=stored) if zeros else None, bits, tile)
    except Exception as error:          # whatever a compiler for another machine may raise: PyTorch's operators serve
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"note: the GPU kernel does not run here ({reason}); PyTorch's own operators serve", file=sys.stderr)
        return False
    return True


def few(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() // x.shape[-1] <= ROWS


def multiply_layer(layer, x: Tensor) -> Tensor:
    """x [..., K], few rows -> [..., N]."""
    rows = (x if layer.perm is None else x[..., layer.perm]).reshape(-1, x.shape[-1])
    y = linear(rows, layer.weight, layer.scales, layer.zeros, layer.bits, layer.groupsize).view(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


if triton is not None:
    @triton.jit
    def multiply(x, w, scales, zeros, y, M, N, K, G, groupsize, BITS: tl.constexpr, ZEROS: tl.constexpr, TILE: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr):
        """Part s of y [SPLIT, M, N], float32: outputs n of program (n, s), over its share of the inputs.

        A nibble v, or'ed into the bits of 128.0 in bfloat16, is 128 + v: converted by one instruction. What that adds
        comes off once a tile, with the zero point: sum (v - z) x = sum (128 + v) x - (128 + z) sum x. Weights are the
        left operand: 64 outputs fill a tensor core's rows, which so few rows of x could not.
        """
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        part = tl.program_id(1)
        m = tl.arange(0, BLOCK_M)
        tiles = K // TILE
        share = (tiles + SPLIT - 1) // SPLIT
        there, wanted = n < N, m < M
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for t in range(part * share, tl.minimum(part * share + share, tiles)):
            g = t * TILE // groupsize
            scale = tl.load(scales + n * G + g, there, 0.0).to(tl.float32)
            if BITS == 4:
                byte = tl.arange(0, TILE // 2)
                pairs = tl.load(w + n[:, None].to(tl.int64) * (K // 2) + t * (TILE // 2) + byte[None, :], there[:, None], 0)
                inputs = tl.load(x + m[:, None] * K + t * TILE + tl.arange(0, TILE)[None, :], wanted[:, None], 0.0)
                even, odd = tl.split(tl.reshape(inputs, (BLOCK_M, TILE // 2, 2)))
                even, odd = tl.trans(even), tl.trans(odd)                            # [TILE / 2, M]
                low = ((pairs & 15).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
                high = ((pairs >> 4).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
                dots = tl.dot(high.to(DOT), odd.to(DOT), tl.dot(low.to(DOT), even.to(DOT)))          # [BLOCK_N, M]
                sums = tl.sum(even.to(tl.float32) + odd.to(tl.float32), 0)
                zero = tl.full((BLOCK_N,), 136.0, tl.float32)
                if ZEROS:
                    zero = 128.0 + tl.load(zeros + n * G + g, there, 0).to(tl.float32)
                dots -= zero[:, None] * sums[None, :]
            else:
                k = tl.arange(0, TILE)
                values = tl.load(w + n[:, None].to(tl.int64) * K + t * TILE + k[None, :], there[:, None], 0)
                inputs = tl.load(x + m[None, :] * K + t * TILE + k[:, None], wanted[None, :], 0.0)
                dots = tl.dot(values.to(DOT), inputs.to(DOT))
                if ZEROS:
                    zero = tl.load(zeros + n * G + g, there, 0).to(tl.float32)
                    dots -= zero[:, None] * tl.sum(inputs.to(tl.float32), 0)[None, :]
            total += scale[:, None] * dots
        at = y + (part * M + m[None, :]).to(tl.int64) * N + n[:, None]
        tl.store(at, total, there[:, None] & wanted[None, :])

    @torch.library.triton_op("gpu_kernels::linear", mutates_args={})
    def linear(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, groupsize: int) -> Tensor:
        """x [M, K] bfloat16, M <= 32, times ((weight - zeros) * scales).T -> [M, N]; the layer's buffers as on disk, zeros
        None: 0, or 8 of nibbles."""
        M, K, N, G = *x.shape, *scales.shape
        x = x.contiguous()
        tile = min(groupsize, TILE)
        split = max(1, min(PROGRAMS // triton.cdiv(N, BLOCK_N), K // tile // 4))     # few outputs: share the inputs too
        y = torch.empty(split, M, N, dtype=torch.float32, device=x.device)
        kernel = torch.library.wrap_triton(multiply)
        kernel[(triton.cdiv(N, BLOCK_N), split)](
            x, weight, scales, scales if zeros is None else zeros, y, M, N, K, G, groupsize, BITS=bits,
            ZEROS=zeros is not None, TILE=tile, BLOCK_N=BLOCK_N, BLOCK_M=16 if M <= 16 else 32, SPLIT=split,
            DOT=tl.float32 if INTERPRETED else tl.bfloat16)
        return y.sum(0).to(x.dtype)
