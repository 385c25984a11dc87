"""GPU attention of a step in Triton: few queries against a long cache, and what comes between the first product and it.

What it is: `attend`, which shares the slots of a key head out over the whole GPU and reads those that a query sees; and
`rotate_and_keep`, which norms and turns queries and keys and writes keys and values into the cache, in one launch. What
it is not: attention over prompts; many queries go, with keys and values repeated for their heads, through PyTorch's fused operator (model.attend, which is also what both
are checked against). gpu_block.py calls them and is what to read next; gpu.py tells where they run.
"""
from functools import cache

import torch
from torch import Tensor

from kernels.gpu import COUNTERS, INTERPRETED, PROGRAMS, ROWS, counters, runs_on, succeeds, triton
from model import FEW
from model import attend as plain_attend

SLOTS = 64                              # of the cache that a program looks at at a time
PARTS = 32                              # programs, at most, that share the slots of a key head
FLEXIBLE = (torch.Tag.flexible_layout,)  # else a compiled step copies mask, cos and sin for each layer, to be sure of strides
WIDTHS = (16, 32, 64, 128, 256)         # of a head: powers of two


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float = 0.0,
           sinks: Tensor | None = None) -> Tensor:
    """model.attend with few queries in the kernel."""
    B, H, T, E = q.shape
    if T > FEW and H > k.shape[1] and not cap and sinks is None:
        # PyTorch's operator has no fast form for a mask and shared key heads together
        k, v = (t.repeat_interleave(H // k.shape[1], 1) for t in (k, v))
    too_many = T > FEW or H // k.shape[1] * T > ROWS or B * k.shape[1] > COUNTERS
    if too_many or E not in WIDTHS or q.dtype == torch.float32 and not INTERPRETED:
        return plain_attend(q, k, v, mask, scale, cap, sinks)
    return attend_few(q, k, v, mask, scale, cap, sinks).transpose(1, 2)


@cache
def attends(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention's kernel serves there: tried, once."""
    if not runs_on(device):
        return False
    q = torch.zeros(1, 2, 1, 64, dtype=dtype, device=device)
    return succeeds(lambda: attend(q, q, q, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), 1.0))


if triton is not None:
    import triton.language as tl

    @triton.jit
    def attend_part(q, k, v, mask, sinks, y, parts, most_of, total_of, counters, S, T, R, H, KEYS, k_row, k_head, k_slot, v_row,
                    v_head, v_slot, scale, cap, CAPPED: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
                    SLOTS: tl.constexpr, DOT: tl.constexpr):
        """Attention of the R queries of one key head to every PARTS-th run of SLOTS slots (Dao et al. 2023, Flash-Decoding):
        their weighted sum of values [R, E], the highest score and the sum of weights [R]. Runs that nobody sees, behind
        the filled part or before a window, are not read, and so many parts are busy however much is filled. The last
        part to finish puts all together, and one more score, the sink, whose share goes nowhere."""
        head, part, many = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        r, e = tl.arange(0, ROWS), tl.arange(0, E)
        row, wanted = head // KEYS, r < R
        keys_at = k + row.to(tl.int64) * k_row + (head % KEYS) * k_head
        values_at = v + row.to(tl.int64) * v_row + (head % KEYS) * v_head
        queries = tl.load(q + (head * R + r[:, None]) * E + e[None, :], wanted[:, None], 0.0).to(DOT)
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        out = tl.zeros((ROWS, E), tl.float32)
        for run in range(part, tl.cdiv(S, SLOTS), many):
            s = run * SLOTS + tl.arange(0, SLOTS)
            seen = tl.load(mask + (row * T + r[:, None] % T) * S + s[None, :], wanted[:, None] & (s < S)[None, :], 0) != 0
            if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
                keys = tl.load(keys_at + s[None, :] * k_slot + e[:, None], (s < S)[None, :], 0.0)    # [E, SLOTS]
                values = tl.load(values_at + s[:, None] * v_slot + e[None, :], (s < S)[:, None], 0.0)    # both on the way
                scores = tl.dot(queries, keys.to(DOT)) * scale
                if CAPPED:              # cap * tanh
                    scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
                scores = tl.where(seen, scores, float("-inf"))
                higher = tl.maximum(most, tl.max(scores, 1))
                base = tl.where(higher == float("-inf"), 0.0, higher)                # a query that has seen nothing yet
                p = tl.exp(scores - base[:, None])
                keep = tl.exp(most - base)
                out = out * keep[:, None] + tl.dot(p.to(values.dtype).to(DOT), values.to(DOT))
                total = total * keep + tl.sum(p, 1)
                most = higher
        at = head * R + r
        step = tl.num_programs(0) * R                                                # from one part to the next
        tl.store(parts + (part * step + at[:, None]) * E + e[None, :], out, wanted[:, None])
        tl.store(most_of + part * step + at, most, wanted)
        tl.store(total_of + part * step + at, total, wanted)
        tl.debug_barrier()              # all threads have stored
        if tl.atomic_add(counters + head, 1, sem="acq_rel") == many - 1:
            h = head % KEYS * (R // T) + r // T                                      # query heads
            if SINKS:
                most = tl.load(sinks + h, wanted, 0.0).to(tl.float32)
                total = tl.full((ROWS,), 1.0, tl.float32)
            else:
                most = tl.full((ROWS,), float("-inf"), tl.float32)
                total = tl.zeros((ROWS,), tl.float32)
            out = tl.zeros((ROWS, E), tl.float32)
            for p in range(many):
                other = tl.load(most_of + p * step + at, wanted, 0.0, cache_modifier=".cg")
                higher = tl.maximum(most, other)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                keep, weight = tl.exp(most - base), tl.exp(other - base)
                out = out * keep[:, None] + weight[:, None] * tl.load(
                    parts + (p * step + at[:, None]) * E + e[None, :], wanted[:, None], 0.0, cache_modifier=".cg")
                total = total * keep + weight * tl.load(total_of + p * step + at, wanted, 1.0, cache_modifier=".cg")
                most = higher
            to = y + ((row * T + r % T) * H + h)[:, None] * E + e[None, :]           # [B, T, H, E]
            tl.store(to, (out / total[:, None]).to(y.dtype.element_ty), wanted[:, None])
            tl.store(counters + head, 0)

    @torch.library.custom_op("gpu_kernels::attend", mutates_args=(), tags=FLEXIBLE)
    def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float, sinks: Tensor | None) -> Tensor:
        """q [B, H, T, E]; k and v [B, K, S, E], rows of E in one piece; mask [B, 1, T, S]; sinks [H] -> [B, T, H, E]."""
        B, H, T, E = q.shape
        K, S = k.shape[1:3]
        R, heads = H // K * T, B * K
        parts = max(1, min(PARTS, PROGRAMS // heads))
        y = torch.empty(B, T, H, E, dtype=torch.float32 if INTERPRETED else q.dtype, device=q.device)
        out = torch.empty(parts, heads, R, E, dtype=torch.float32, device=q.device)
        most, total = (torch.empty(parts, heads, R, dtype=torch.float32, device=q.device) for _ in range(2))
        dot = tl.float32 if INTERPRETED else tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float16
        attend_part[(heads, parts)](
            q.contiguous(), k, v, mask.contiguous().view(torch.uint8), q if sinks is None else sinks, y, out, most, total,
            counters(q.device), S, T, R, H, K, *k.stride()[:3], *v.stride()[:3], scale, cap, CAPPED=cap > 0,
            SINKS=sinks is not None, ROWS=max(16, triton.next_power_of_2(R)), E=E, SLOTS=SLOTS, DOT=dot)
        return y.to(q.dtype)

    @attend_few.register_fake
    def _(q, k, v, mask, scale, cap, sinks):
        B, H, T, E = q.shape
        return q.new_empty(B, T, H, E)

    @triton.jit
    def rotate_and_keep_one(qkv, cos, sin, positions, q_gain, k_gain, q, k, v, T, H, KEYS, k_row, k_head, k_slot, v_row, v_head,
                            v_slot, eps, half, NORM: tl.constexpr, ROPE: tl.constexpr, E: tl.constexpr):
        """One head of one token: of the queries to q [B, H, T, E], of keys and values to the token's slot."""
        token, head, e = tl.program_id(0), tl.program_id(1), tl.arange(0, E)
        row, t = token // T, token % T
        at = qkv + (token * (H + 2 * KEYS) + head) * E
        x = tl.load(at + e).to(tl.float32)
        j = tl.where(e < half, e, e - half)                                          # the pair (j, j + half) turns
        partner = tl.where(e < half, e + half, j)
        inside = e < 2 * half
        other = tl.load(at + tl.where(inside, partner, e)).to(tl.float32)
        if head < H + KEYS:
            if NORM != "":
                factor = tl.rsqrt(tl.sum(x * x, 0) / E + eps)
                gain = k_gain
                if head < H:
                    gain = q_gain
                mine, its = tl.load(gain + e).to(tl.float32), tl.load(gain + tl.where(inside, partner, e)).to(tl.float32)
                if NORM == "gemma":
                    mine, its = mine + 1.0, its + 1.0
                x, other = x * factor * mine, other * factor * its
            if ROPE:
                c = tl.load(cos + token * half + j, inside, 1.0)
                s = tl.load(sin + token * half + j, inside, 0.0)
                x = x * c + tl.where(e < half, -other, other) * s
        slot = tl.load(positions + token).to(tl.int64)
        to = q + ((row * H + head) * T + t) * E
        if head >= H + KEYS:
            to = v + row.to(tl.int64) * v_row + (head - H - KEYS) * v_head + slot * v_slot
        elif head >= H:
            to = k + row.to(tl.int64) * k_row + (head - H) * k_head + slot * k_slot
        tl.store(to + e, x.to(q.dtype.element_ty))

    @torch.library.custom_op("gpu_kernels::rotate_and_keep", mutates_args=("k", "v"), tags=FLEXIBLE)
    def rotate_and_keep(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor, k: Tensor, v: Tensor,
                        q_gain: Tensor | None, k_gain: Tensor | None, norm: str, eps: float) -> Tensor:
        """qkv [B, T, (H + 2K) E] -> queries [B, H, T, E]; keys and values go to `positions` [B, T] of the caches
        [B', K, S, E]. cos and sin [B, 1, T, r/2], or None: not turned. Gains [E] of the norm over each head, or None."""
        (B, T, width), (_, K, _, E) = qkv.shape, k.shape
        H = width // E - 2 * K
        q = qkv.new_empty(B, H, T, E)
        qkv, positions = qkv.contiguous(), positions.contiguous()
        turned = (qkv, qkv) if cos is None else (cos.contiguous(), sin.contiguous())
        rotate_and_keep_one[(B * T, H + 2 * K)](
            qkv, *turned, positions, *(qkv if g is None else g for g in (q_gain, k_gain)), q, k, v, T, H, K, *k.stride()[:3],
            *v.stride()[:3], eps, 0 if cos is None else cos.shape[-1], NORM=norm, ROPE=cos is not None, E=E)
        return q

    @rotate_and_keep.register_fake
    def _(qkv, cos, sin, positions, k, v, q_gain, k_gain, norm, eps):
        B, T, width = qkv.shape
        E, K = k.shape[3], k.shape[1]
        return qkv.new_empty(B, width // E - 2 * K, T, E)
