"""GPU products in Triton: a few rows times bfloat16, int8 or int4 weights, with what stands around a product in a layer.

What it is: a kernel that reads its weights once, as they lie on disk (quantize.py), and turns them into numbers on the
way, for 1 to 32 rows: steps of a batch and of speculation, where PyTorch's int4 operator is made for 1 to 4 rows and
dequantizing writes four times what it reads. Launching a kernel costs as much as reading some megabytes, so that it takes
along the norm before a product, and the activation or the residual behind it. What it is not: needed. Without Triton the
layers of quantize.py multiply as PyTorch can; for many rows another kernel writes the weights out for cuBLAS. gpu_block.py makes a
layer of it and is what to read next; the CPU's kernels are in cpu.py.

With TRITON_INTERPRET=1 the kernels run on a CPU, slowly; so the tests run them. They have been compiled for sm_90, but
not run on a GPU yet: their speed there is not known.
"""
import os
import sys
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

try:                                    # where it cannot run it is not loaded: it brings the compiler, which takes 2 s
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS = 32                               # at most; tensor cores multiply 16 anyway
TILE = 128                              # inputs that a program looks at at a time
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"                           # it can neither multiply nor round bfloat16
COUNTERS = 1 << 14                      # groups of programs that may be counted at a time
PROGRAMS = 528                          # wanted, four for each multiprocessor of a large GPU


# ---- what works here ---------------------------------------------------------------------------------------

def runs_on(device: torch.device) -> bool:
    """Whether Triton compiles kernels for this device. GPU_KERNELS=0: as if there were none."""
    return triton is not None and os.environ.get("GPU_KERNELS") != "0" and (device.type == "cuda" or INTERPRETED)


def succeeds(trial: Callable) -> bool:
    """A kernel works where a trial of it does: what it is called for is tried once, and told if it fails."""
    try:
        trial()
    except Exception as error:          # whatever a compiler for another machine may raise: PyTorch's operators serve
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"note: a GPU kernel does not run here ({reason}); PyTorch's own operators serve", file=sys.stderr)
        return False
    return True


def works(layer) -> bool:
    """Whether the kernel serves a QuantizedLinear where it is: once for each of its forms, it is tried."""
    tile, group = tile_of(layer.in_features), layer.groupsize
    return runs_on(layer.scales.device) and layer.dtype == torch.bfloat16 and layer.mode in ("int8", "int4") and tile >= 32 \
        and (group % tile == 0 or tile % group == 0 and group >= 32 and group & (group - 1) == 0) \
        and tried(layer.bits, layer.zeros is not None, tile, min(group, tile), layer.scales.dtype, layer.scales.device)


@cache
def tried(bits: int, zeros: bool, tile: int, group: int, scale_dtype: torch.dtype, device: torch.device) -> bool:
    def some(*shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=device)
    stored = torch.int8 if bits == 8 else torch.uint8
    return succeeds(lambda: linear(
        some(1, tile, dtype=torch.bfloat16), some(64, tile * bits // 8, dtype=stored), bits, group,
        some(64, tile // group, dtype=scale_dtype), some(64, tile // group, dtype=stored) if zeros else None))


def tile_of(in_features: int) -> int:
    """The largest power of two up to TILE that divides a row."""
    return min(TILE, in_features & -in_features)


def few(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() // x.shape[-1] <= ROWS


def multiply_layer(layer, x: Tensor) -> Tensor:
    """A QuantizedLinear's product: x [..., K] bfloat16 -> [..., N]. Many rows are worth writing the weights out."""
    x = x if layer.perm is None else x[..., layer.perm]
    if not few(x):
        return F.linear(x, expand(layer.weight, layer.bits, layer.groupsize, layer.scales, layer.zeros, x.shape[-1]), layer.bias)
    y = linear(x.reshape(-1, x.shape[-1]), layer.weight, layer.bits, layer.groupsize, layer.scales, layer.zeros, layer.bias)
    return y.view(*x.shape[:-1], -1)


@cache
def counters(device: torch.device) -> Tensor:
    """How many programs of a group have finished. Each kernel leaves zeros behind, so that all share these; kernels of
    one stream run one after another."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


# ---- the kernel ----------------------------------------------------------------------------------------------

if triton is not None:
    SHAPES = [triton.Config({"BLOCK_N": n}, num_warps=warps, num_stages=stages)      # tried at a shape's first product, and kept on disk
              for n, warps, stages in ((16, 4, 5), (16, 4, 8), (32, 4, 4), (32, 4, 8), (64, 4, 4), (64, 8, 3))]

    def seconds(call: Callable, quantiles: tuple) -> list[float]:
        """How autotune times a shape, in milliseconds: briefly."""
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    @triton.jit
    def dot_tile(t, w, scales, zeros, n, there, first, second, sums, K, G, BITS: tl.constexpr, ZEROS: tl.constexpr,
                 GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, MATH: tl.constexpr):
        """[N, M]: outputs n from tile t of the inputs. first [TILE, M], or of nibbles the even inputs and second the odd
        ones; sums [M] of all of them.

        A nibble v, or'ed into the bits of 128.0 in bfloat16, is 128 + v: converted by one instruction. Where a group
        covers the tile, what that adds comes off with the zero point, and the scale multiplies, once a tile:
        sum (v - z) s x = s (sum (128 + v) x - (128 + z) sum x). Else each weight becomes a bfloat16 first.
        """
        WIDTH: tl.constexpr = TILE * BITS // 8 if BITS < 16 else TILE                # of what is stored
        at = w + n[:, None].to(tl.int64) * (K // TILE * WIDTH) + t * WIDTH + tl.arange(0, WIDTH)[None, :]
        stored = tl.load(at, there[:, None], 0, eviction_policy="evict_first")
        if BITS == 16:
            dots = tl.dot(stored.to(DOT), first.to(DOT))
        else:
            plus: tl.constexpr = 128.0 + 8.0 if BITS == 4 else 0.0                   # what is stored for a weight of 0
            less: tl.constexpr = 8.0 if BITS == 4 else 0.0                           # if no zero point tells
            if GROUP >= TILE:
                scale = tl.load(scales + n * G + t * TILE // GROUP, there, 0.0).to(tl.float32)[:, None]
                zero = tl.full((BLOCK_N, 1), plus, tl.float32)
                if ZEROS:
                    zero += tl.load(zeros + n * G + t * TILE // GROUP, there, 0).to(tl.float32)[:, None] - less
            else:
                PER: tl.constexpr = TILE // GROUP
                g = t * PER + tl.arange(0, PER)[None, :]
                scale = tl.load(scales + n[:, None] * G + g, there[:, None], 0.0).to(MATH)[:, :, None]
                zero = tl.full((BLOCK_N, PER, 1), plus, tl.float32)
                if ZEROS:
                    zero += tl.load(zeros + n[:, None] * G + g, there[:, None], 0).to(tl.float32)[:, :, None] - less
                scale = tl.reshape(tl.broadcast_to(scale, (BLOCK_N, PER, WIDTH // PER)), (BLOCK_N, WIDTH))
                zero = tl.reshape(tl.broadcast_to(zero.to(MATH), (BLOCK_N, PER, WIDTH // PER)), (BLOCK_N, WIDTH))
            if BITS == 4:
                low = ((stored & 15).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
                high = ((stored >> 4).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
                if GROUP < TILE:
                    low, high = (low.to(MATH) - zero) * scale, (high.to(MATH) - zero) * scale
                dots = tl.dot(high.to(DOT), second.to(DOT), tl.dot(low.to(DOT), first.to(DOT)))
            else:
                values = stored.to(MATH)
                if GROUP < TILE:
                    values = (values - zero) * scale
                dots = tl.dot(values.to(DOT), first.to(DOT))
            if GROUP >= TILE:
                dots = scale * (dots - zero * sums[None, :])
        return dots

    @triton.jit
    def activate(gate, up, ACT: tl.constexpr):
        """model.ACTIVATIONS"""
        if ACT == "silu":
            y = gate * tl.sigmoid(gate) * up
        elif ACT == "gelu":
            y = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
        elif ACT == "gelu_tanh":
            y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
        else:
            gate, up = tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0)
            y = gate * tl.sigmoid(1.702 * gate) * (up + 1)
        return y

    @triton.autotune(SHAPES[:1] if INTERPRETED else SHAPES, key=["N", "K", "BITS", "GROUP", "ACT", "BLOCK_M"], do_bench=seconds,
                     cache_results=True)
    @triton.jit
    def multiply(x, w, scales, zeros, bias, gain, residual, y, parts, counters, M, N, K, G, eps, alpha, BITS: tl.constexpr,
                 ZEROS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
                 GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
                 DOT: tl.constexpr, MATH: tl.constexpr):
        """y [M, N]: the outputs n of program (n, s), from its share of the inputs. Weights are the left operand: outputs
        fill a tensor core's rows, which so few rows of x could not. Of SPLIT programs the last to finish adds up their
        parts [SPLIT, M, N]. A norm's root mean square is a factor on the outputs, and so found on the way."""
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        part, m, k = tl.program_id(1), tl.arange(0, BLOCK_M), tl.arange(0, TILE)
        tiles = K // TILE
        share = (tiles + SPLIT - 1) // SPLIT
        there, wanted = n < N, m < M
        both = there[:, None] & wanted[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for t in range(part * share, tl.minimum(part * share + share, tiles)):
            inputs = tl.load(x + m[:, None] * K + t * TILE + k[None, :], wanted[:, None], 0.0)           # [M, TILE]
            if NORM != "":
                numbers = inputs.to(tl.float32)
                squares += tl.sum(numbers * numbers, 1)
                factor = tl.load(gain + t * TILE + k).to(tl.float32)
                if NORM == "gemma":
                    factor += 1.0
                inputs = (numbers * factor[None, :]).to(DOT)
            sums = tl.sum(inputs.to(tl.float32), 1)
            if BITS == 4:
                first, second = tl.split(tl.reshape(inputs, (BLOCK_M, TILE // 2, 2)))
                first, second = tl.trans(first), tl.trans(second)                    # [TILE / 2, M]
            else:
                first = tl.trans(inputs)
                second = first
            total += dot_tile(t, w, scales, zeros, n, there, first, second, sums, K, G, BITS, ZEROS, GROUP, TILE, BLOCK_N,
                              DOT, MATH)
            if ACT != "":               # the gates are followed by as many other outputs
                up += dot_tile(t, w, scales, zeros, n + N, there, first, second, sums, K, G, BITS, ZEROS, GROUP, TILE,
                               BLOCK_N, DOT, MATH)
        finished = True
        if SPLIT > 1:
            mine = parts + m[None, :] * N + n[:, None]
            tl.store(mine + part * M * N, total, both)
            tl.debug_barrier()          # all threads have stored
            finished = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1
            if finished:
                total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for s in range(SPLIT):  # in this order, whoever is last
                    total += tl.load(mine + s * M * N, both, 0.0, cache_modifier=".cg")
                tl.store(counters + tl.program_id(0), 0)
        if finished:
            if NORM != "":
                factor = tl.rsqrt(squares / K + eps)[None, :]
                total, up = total * factor, up * factor
            if BIAS:
                total += tl.load(bias + n, there, 0.0).to(tl.float32)[:, None]
                if ACT != "":
                    up += tl.load(bias + N + n, there, 0.0).to(tl.float32)[:, None]
            if ACT != "":
                total = activate(total, up, ACT)
            at = m[None, :] * N + n[:, None]
            if ADD:
                total = tl.load(residual + at, both, 0.0).to(tl.float32) + alpha * total
            tl.store(y + at, total.to(y.dtype.element_ty), both)

    @torch.library.custom_op("gpu_kernels::linear", mutates_args=())
    def linear(x: Tensor, weight: Tensor, bits: int, group: int, scales: Tensor | None = None, zeros: Tensor | None = None,
               bias: Tensor | None = None, gain: Tensor | None = None, norm: str = "", eps: float = 0.0,
               activation: str = "", residual: Tensor | None = None, alpha: float = 1.0) -> Tensor:
        """residual + alpha * activation(norm(x) @ w.T + bias) -> [M, N]; each part where it is given.

        x [M, K] bfloat16, M <= 32. weight: as on disk, ((weight - zeros) * scales) or for bits 16 itself; zeros None: 0,
        or 8 of nibbles. gain [K], norm (model's norm_style) and eps: RMSNorm. activation: of the first half of the
        outputs with the second.
        """
        x = x.contiguous()
        (M, K), N, tile = x.shape, weight.shape[0] // (2 if activation else 1), tile_of(x.shape[1])
        split = 1                       # few outputs: programs share the inputs too
        if not norm and not activation:
            split = max(1, min(PROGRAMS // triton.cdiv(N, 32), K // tile // 4))
        y = torch.empty(M, N, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
        parts = torch.empty(split, M, N, dtype=torch.float32, device=x.device) if split > 1 else y
        plain = scales is None or scales.dtype == torch.bfloat16
        multiply[lambda shape: (triton.cdiv(N, shape["BLOCK_N"]), split)](
            x, weight, *(y if t is None else t for t in (scales, zeros, bias, gain, residual)), y, parts, counters(x.device),
            M, N, K, 0 if scales is None else scales.shape[1], eps, alpha, BITS=bits, ZEROS=zeros is not None,
            BIAS=bias is not None, NORM=norm, ACT=activation, ADD=residual is not None, GROUP=group, TILE=tile,
            BLOCK_M=16 if M <= 16 else 32, SPLIT=split, DOT=tl.float32 if INTERPRETED else tl.bfloat16,
            MATH=tl.bfloat16 if plain and not INTERPRETED else tl.float32)
        return y.to(x.dtype)

    @linear.register_fake
    def _(x, weight, bits, group, scales=None, zeros=None, bias=None, gain=None, norm="", eps=0.0, activation="",
          residual=None, alpha=1.0):
        return x.new_empty(x.shape[0], weight.shape[0] // (2 if activation else 1))

    @triton.jit
    def write_out(w, scales, zeros, out, N, K, G, BITS: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr,
                  TILE: tl.constexpr, BLOCK_N: tl.constexpr):
        """Weights [N, K] in the type of `out`."""
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.program_id(1) * TILE + tl.arange(0, TILE)
        there = (n < N)[:, None]
        if BITS == 4:
            half = tl.program_id(1) * (TILE // 2) + tl.arange(0, TILE // 2)
            pairs = tl.load(w + n[:, None].to(tl.int64) * (K // 2) + half[None, :], there, 0)
            values = tl.interleave(pairs & 15, pairs >> 4).to(tl.float32)
        else:
            values = tl.load(w + n[:, None].to(tl.int64) * K + k[None, :], there, 0).to(tl.float32)
        at = n[:, None] * G + k[None, :] // GROUP
        if ZEROS:
            values -= tl.load(zeros + at, there, 0).to(tl.float32)
        elif BITS == 4:
            values -= 8.0
        values *= tl.load(scales + at, there, 0.0).to(tl.float32)
        tl.store(out + n[:, None].to(tl.int64) * K + k[None, :], values.to(out.dtype.element_ty), there)

    @torch.library.custom_op("gpu_kernels::expand", mutates_args=())
    def expand(weight: Tensor, bits: int, group: int, scales: Tensor, zeros: Tensor | None, K: int) -> Tensor:
        """The weights of a layer as on disk -> [N, K] bfloat16, in the order of its stored inputs."""
        N, tile = weight.shape[0], tile_of(K)
        out = torch.empty(N, K, dtype=torch.float32 if INTERPRETED else torch.bfloat16, device=weight.device)
        write_out[(triton.cdiv(N, 32), K // tile)](
            weight, scales, scales if zeros is None else zeros, out, N, K, scales.shape[1], BITS=bits, ZEROS=zeros is not None,
            GROUP=group, TILE=tile, BLOCK_N=32)
        return out.to(torch.bfloat16)

    @expand.register_fake
    def _(weight, bits, group, scales, zeros, K):
        return torch.empty(weight.shape[0], K, dtype=torch.bfloat16, device=weight.device)
