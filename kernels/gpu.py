"""GPU kernels in Triton: a product of few rows with int8 or int4 weights, and attention of few queries.

What it is: a product that reads its weights once, as they lie on disk (quantize.py), and turns them into numbers on
the way, for 1 to 32 rows: steps of a batch and of speculation, where PyTorch's int4 operator is made for 1 to 4 rows and
dequantizing writes four times what it reads. And attention that shares the slots out over the whole GPU and reads those
that a query sees. What it is not: needed. Without Triton the layers of quantize.py multiply as PyTorch can and
model.attend attends; many rows are dequantized and multiplied by cuBLAS. The CPU's kernels are in cpu.py.

With TRITON_INTERPRET=1 the kernels run on a CPU, slowly; so the tests run them. They have been compiled for sm_90, but
not run on a GPU yet: their speed there is not known.
"""
import os
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from model import FEW
from model import attend as plain_attend

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
SLOTS = 64                              # of the cache that attention looks at at a time
PARTS = 32                              # programs, at most, that share the slots of a key head


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
    return succeeds(lambda: linear(
        some(1, tile, dtype=torch.bfloat16), some(64, tile * bits // 8, dtype=stored), some(64, 1, dtype=scale_dtype),
        some(64, 1, dtype=stored) if zeros else None, bits, tile))


def succeeds(trial: Callable) -> bool:
    try:
        trial()
    except Exception as error:          # whatever a compiler for another machine may raise: PyTorch's operators serve
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"note: a GPU kernel does not run here ({reason}); PyTorch's own operators serve", file=sys.stderr)
        return False
    return True


def few(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() // x.shape[-1] <= ROWS


def multiply_layer(layer, x: Tensor) -> Tensor:
    """x [..., K], few rows -> [..., N]."""
    rows = (x if layer.perm is None else x[..., layer.perm]).reshape(-1, x.shape[-1])
    y = linear(rows, layer.weight, layer.scales, layer.zeros, layer.bits, layer.groupsize).view(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float = 0.0,
           sinks: Tensor | None = None) -> Tensor:
    """model.attend with few queries in the kernel."""
    B, H, T, E = q.shape
    K = k.shape[1]
    if T > FEW or H // K * T > ROWS or E not in (16, 32, 64, 128, 256) or q.dtype == torch.float32 and not INTERPRETED:
        return plain_attend(q, k, v, mask, scale, cap, sinks)
    parts, most, total = attend_in_parts(q.reshape(B * K, H // K * T, E), k, v, mask, scale, cap)
    highest = most.amax(0)                                                           # [B*K, R]
    if sinks is not None:
        sinks = sinks.float().view(1, K, H // K, 1).expand(B, -1, -1, T).reshape(B * K, -1)
        highest = torch.maximum(highest, sinks)
    weights = torch.exp(most - highest)                                              # of a part; 0 where it saw nothing
    total = (total * weights).sum(0)
    if sinks is not None:
        total = total + torch.exp(sinks - highest)
    y = (parts * weights[..., None]).sum(0) / total[..., None]
    return y.to(v.dtype).view(B, H, T, E)


def pack_part(model: torch.nn.Module, part: torch.nn.Module):
    """As cpu.pack_part: attention in the kernel, where that works."""
    weight = model.norm.weight
    for module in part.modules():
        if hasattr(module, "attend") and attends(weight.device, weight.dtype):
            module.attend = attend


def attends(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention's kernel serves there: tried, as `works` does."""
    there = triton is not None and os.environ.get("GPU_KERNELS") != "0" and (device.type == "cuda" or INTERPRETED)
    return there and tried_attend(device, dtype)


@cache
def tried_attend(device: torch.device, dtype: torch.dtype) -> bool:
    q = torch.zeros(1, 2, 1, 64, dtype=dtype, device=device)
    return succeeds(lambda: attend(q, q, q, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), 1.0))


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

    @triton.jit
    def attend_part(q, k, v, mask, out, most_out, total_out, S, T, R, KEYS, k_row, k_head, k_slot, v_row, v_head, v_slot,
                    scale, cap, CAPPED: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr,
                    DOT: tl.constexpr):
        """Attention of the R queries of one key head to every PARTS-th run of SLOTS slots (Dao et al. 2023, Flash-Decoding):
        their weighted sum of values [R, E], the highest score and the sum of weights [R]. Runs that nobody sees, behind
        the filled part or before a window, are not read, and so many parts are busy however much is filled."""
        head, part = tl.program_id(0), tl.program_id(1)
        r, e = tl.arange(0, ROWS), tl.arange(0, E)
        row, wanted = head // KEYS, r < R
        keys_at = k + row.to(tl.int64) * k_row + (head % KEYS) * k_head
        values_at = v + row.to(tl.int64) * v_row + (head % KEYS) * v_head
        queries = tl.load(q + (head * R + r[:, None]) * E + e[None, :], wanted[:, None], 0.0).to(DOT)
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        y = tl.zeros((ROWS, E), tl.float32)
        for run in range(part, tl.cdiv(S, SLOTS), tl.num_programs(1)):
            s = run * SLOTS + tl.arange(0, SLOTS)
            seen = tl.load(mask + (row * T + r[:, None] % T) * S + s[None, :], wanted[:, None] & (s < S)[None, :], 0) != 0
            if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
                keys = tl.load(keys_at + s[None, :] * k_slot + e[:, None], (s < S)[None, :], 0.0)    # [E, SLOTS]
                scores = tl.dot(queries, keys.to(DOT)) * scale
                if CAPPED:              # cap * tanh
                    scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
                scores = tl.where(seen, scores, float("-inf"))
                higher = tl.maximum(most, tl.max(scores, 1))
                base = tl.where(higher == float("-inf"), 0.0, higher)                # a query that has seen nothing yet
                p = tl.exp(scores - base[:, None])
                keep = tl.exp(most - base)
                values = tl.load(values_at + s[:, None] * v_slot + e[None, :], (s < S)[:, None], 0.0)
                y = y * keep[:, None] + tl.dot(p.to(values.dtype).to(DOT), values.to(DOT))
                total = total * keep + tl.sum(p, 1)
                most = higher
        at = (part * tl.num_programs(0) + head) * R + r
        tl.store(out + at[:, None] * E + e[None, :], y, wanted[:, None])
        tl.store(most_out + at, most, wanted)
        tl.store(total_out + at, total, wanted)

    @torch.library.triton_op("gpu_kernels::attend_in_parts", mutates_args={})
    def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float,
                        cap: float) -> tuple[Tensor, Tensor, Tensor]:
        """q [B*K, R, E], R = H/K*T; k and v [B, K, S, E], rows of E in one piece; mask [B, 1, T, S] -> each part's values
        [PARTS, B*K, R, E], highest scores and sums [PARTS, B*K, R], float32."""
        heads, R, E = q.shape
        K, S = k.shape[1:3]
        parts = max(1, min(PARTS, PROGRAMS // heads))
        out = torch.empty(parts, heads, R, E, dtype=torch.float32, device=q.device)
        most, total = (torch.empty(parts, heads, R, dtype=torch.float32, device=q.device) for _ in range(2))
        seen = mask.contiguous().view(torch.uint8)
        dot = tl.float32 if INTERPRETED else tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float16
        torch.library.wrap_triton(attend_part)[(heads, parts)](
            q.contiguous(), k, v, seen, out, most, total, S, mask.shape[2], R, K, *k.stride()[:3], *v.stride()[:3], scale, cap,
            CAPPED=cap > 0, ROWS=max(16, triton.next_power_of_2(R)), E=E, SLOTS=SLOTS, DOT=dot)
        return out, most, total
