"""The Transformer: one decoder-only model whose switches cover Llama, Mistral, Qwen, Gemma, Phi, OLMo,
Granite, gpt-oss, ..., with dense layers or mixtures of experts.

What it is: the mathematics of a token's way from id to logits, with a static key/value cache that is
addressed by position. What it is not: nothing here knows a device, a dtype policy, a rank, torch.compile or a
file.

Reading order: `ModelArgs` (every switch), `Transformer.forward`, `TransformerBlock`, `Attention`, `KVCache`,
`FeedForward`, `MoEFeedForward`, `RMSNorm`, the rotary embeddings. Then generate.py, which turns the forward into text.

Shapes, here and everywhere: B batch, T tokens in this call, S cache slots, D model width, H query heads, K
key/value heads, E head width, F feed-forward width, V vocabulary, X experts, A active ones.
"""
import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ---- configuration -----------------------------------------------------------------------------------------

@dataclass
class RopeArgs:
    """One kind of rotary embedding; a model may mix two, by layer. `scaling` holds the kind's own numbers
    under the names config.json gives them (factor, low_freq_factor, short_factor, ...); see
    `rope_frequencies`."""
    theta: float = 10000.0
    kind: str = "default"                   # default, linear, dynamic, llama3, yarn, longrope
    dim: int = 0                            # rotated dimensions of a head, its first ones; 0: the whole head
    scaling: dict = field(default_factory=dict)


@dataclass
class ModelArgs:
    """Everything the Transformer must know; all of it can be written as JSON. The defaults are Llama's
    block."""
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = 0                     # 0: as many as query heads
    head_dim: int = 0                       # 0: dim / n_heads
    ffn_dim: int = 0                        # 0: Llama's rule, 8/3 dim rounded up to a multiple of 256
    max_position: int = 2048                # what the model was trained for: a limit to warn at, not a shape
    tied: bool = False                      # the output head is the embedding table

    norm_eps: float = 1e-5
    norm_style: str = "llama"   # llama: cast, then scale; float32: scale, then cast; gemma: float32 and 1 + w
    attention_norm: bool = True             # norms before ...
    ffn_norm: bool = True
    post_attention_norm: bool = False       # ... and after each half of a block
    post_ffn_norm: bool = False

    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    output_bias: bool = False
    qk_norm: str = ""                      # head: over each head's E; full: over all heads together; "": none
    activation: str = "silu"                # silu, gelu, gelu_tanh, silu_clamped

    n_experts: int = 0                      # in each layer but the dense ones; 0: all are dense
    active_experts: int = 0                 # of them, for each token
    expert_dim: int = 0                     # F of an expert; 0: ffn_dim
    shared_dim: int = 0                     # F of one more that every token passes; 0: there is none
    shared_gate: bool = False               # each token weighs it
    renormalize: bool = True                # the active experts' weights add up to 1
    router_bias: bool = False
    dense_layers: list[int] = field(default_factory=list)

    attention_scale: float = 0.0            # of q @ k.T; 0: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0          # 0: none; c: scores become c tanh(scores / c), before the mask
    attention_sinks: bool = False           # a learned score per head that takes its share of attention to nowhere
    output_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    output_scale: float = 1.0               # multiplies the logits

    ropes: list[RopeArgs] = field(default_factory=lambda: [RopeArgs()])
    # per layer: an index into ropes, -1 for no rope ([]: all 0); the keys a query sees, itself included (0: all)
    layer_ropes: list[int] = field(default_factory=list)
    layer_windows: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.ffn_dim = self.ffn_dim or -(-8 * self.dim // 3 // 256) * 256
        self.expert_dim = self.expert_dim or self.ffn_dim
        self.attention_scale = self.attention_scale or self.head_dim ** -0.5
        self.ropes = [r if isinstance(r, RopeArgs) else RopeArgs(**r) for r in self.ropes]
        self.layer_ropes = self.layer_ropes or [0] * self.n_layers
        self.layer_windows = self.layer_windows or [0] * self.n_layers
        for rope in self.ropes:
            rope.dim = rope.dim or self.head_dim
            if rope.kind not in ROPE_KINDS:
                raise ValueError(f"unsupported rope kind '{rope.kind}'; known are {', '.join(ROPE_KINDS)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} attention heads cannot share {self.n_kv_heads} key/value heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unsupported activation '{self.activation}'; "
                             f"known are {', '.join(ACTIVATIONS)}")
        if self.n_experts and not 0 < self.active_experts <= self.n_experts:
            raise ValueError(f"{self.active_experts} active experts a token, but there are {self.n_experts}")
        if not len(self.layer_ropes) == len(self.layer_windows) == self.n_layers:
            raise ValueError(f"{self.n_layers} layers, but a rope for {len(self.layer_ropes)} "
                             f"and a window for {len(self.layer_windows)}")

    def to_dict(self) -> dict:
        """Plain types, for a file; `ModelArgs(**d)` reads it back, and a name it does not know raises
        TypeError."""
        return asdict(self)


# ---- the model ---------------------------------------------------------------------------------------------

class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = TokenTable(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args)
        self.output = None if args.tied else nn.Linear(args.dim, args.vocab_size, bias=args.output_bias)
        self.ropes = nn.ModuleList(RotaryEmbedding(rope, args.max_position) for rope in args.ropes)
        self.max_batch_size = self.max_seq_length = self.cache_slots = 0
        self.step = None                        # a device may have one call for all of it: see kernels/

    def setup_caches(self, max_batch_size: int, max_seq_length: int, slots: int = 0) -> bool:
        """Make room for `max_batch_size` rows of `max_seq_length` tokens; True if that took a new allocation.

        A cache that is large enough stays where it is: its address is part of compiled graphs, and what is
        left in it is masked by position. A larger one keeps the old one's contents. `slots` >=
        max_seq_length rounds the allocation up. Length-dependent ropes (dynamic, longrope) are settled
        here, for max_seq_length.
        """
        for rope in self.ropes:
            rope.set_length(max_seq_length)
        fits = max_batch_size <= self.max_batch_size and max(slots, max_seq_length) <= self.cache_slots
        self.max_seq_length = max_seq_length
        if fits:
            return False
        self.max_batch_size = max(max_batch_size, self.max_batch_size)
        self.cache_slots = max(slots, max_seq_length, self.cache_slots)
        for layer in self.layers:
            layer.attention.cache.allocate(self.max_batch_size, self.cache_slots, self.norm.weight)
        return True

    def drop_caches(self):
        """Give the memory back; the model then attends within each call."""
        for layer in self.layers:
            layer.attention.cache.k = layer.attention.cache.v = None
        self.max_batch_size = self.max_seq_length = self.cache_slots = 0

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None, *, slots: int = 0,
                logits_at: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] in float32 of tokens [B, T] that stand at positions input_pos [B, T], [T], or 0
        ... T-1.

        With caches set up, keys and values are stored at their positions and a query sees every slot up to
        its own, looking only at the first `slots` (0: all; at least the largest position + 1). Without, it
        sees this call. logits_at [B, n]: indices into T; the head runs on these alone and the logits are
        [B, n, V].
        """
        B, T = tokens.shape
        input_pos = (torch.arange(T, device=tokens.device) if input_pos is None else input_pos).expand(B, T)
        if self.step is not None and self.step.takes(tokens):
            return self.step(tokens, input_pos, slots or self.cache_slots, logits_at)
        if self.cache_slots:
            key_pos = torch.arange(slots or self.cache_slots, device=tokens.device)  # slot s holds position s
            key_pos = key_pos.expand(B, -1)
        else:
            key_pos = input_pos
            for rope in self.ropes:
                rope.set_length(T)
        masks = {window: attention_mask(input_pos, key_pos, window) for window in set(self.args.layer_windows)}
        rotations = [rope(input_pos) for rope in self.ropes] + [None]                # index -1: no rotation
        row, head = (torch.arange(n, device=tokens.device) for n in (B, self.layers[0].attention.n_kv_heads))
        where = (row[:, None, None], head[:, None], input_pos[:, None])              # of keys, broadcast to [B, K, T]

        x = self.tok_embeddings(tokens)                                              # [B, T, D]
        if self.args.embedding_scale != 1.0:        # rounded to x's dtype first, as Gemma was trained
            x = x * torch.full((), self.args.embedding_scale, dtype=x.dtype, device=x.device)
        for layer, rope, window in zip(self.layers, self.args.layer_ropes, self.args.layer_windows):
            x = layer(x, where, rotations[rope], masks[window])
        if logits_at is not None:
            x = x.gather(1, logits_at[:, :, None].expand(-1, -1, x.shape[-1]))       # [B, n, D]
        return self.head(self.norm(x))

    def head(self, x: Tensor) -> Tensor:
        """[B, n, D] -> logits [B, n, V], float32."""
        logits, scale = (self.tok_embeddings.head(x) if self.output is None else self.output(x)).float(), self.args.output_scale
        return softcap(logits if scale == 1.0 else logits * scale, self.args.output_softcap)


class TokenTable(nn.Embedding):
    """Ids to vectors; where the head is tied to it, vectors to logits as well."""

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        def norm(wanted):
            return RMSNorm(args.dim, args) if wanted else nn.Identity()
        self.attention = Attention(args)
        sparse = args.n_experts and layer not in args.dense_layers
        self.feed_forward = MoEFeedForward(args) if sparse else FeedForward(args, args.ffn_dim)
        self.attention_norm = norm(args.attention_norm)
        self.ffn_norm = norm(args.ffn_norm)
        self.post_attention_norm = norm(args.post_attention_norm)
        self.post_ffn_norm = norm(args.post_ffn_norm)
        self.residual_scale = args.residual_scale

    def forward(self, x: Tensor, where: tuple[Tensor, Tensor, Tensor], rotation: tuple[Tensor, Tensor] | None,
                mask: Tensor) -> Tensor:
        h = self.attention(self.attention_norm(x), where, rotation, mask)
        x = torch.add(x, self.post_attention_norm(h), alpha=self.residual_scale)
        h = self.feed_forward(self.ffn_norm(x))
        return torch.add(x, self.post_ffn_norm(h), alpha=self.residual_scale)        # [B, T, D]


# ---- attention ---------------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wqkv = nn.Linear(args.dim, q_dim + 2 * kv_dim, bias=args.qkv_bias)      # rows: q | k | v
        self.wo = nn.Linear(q_dim, args.dim, bias=args.o_bias)
        self.qk_norm = args.qk_norm
        if args.qk_norm:
            self.q_norm = RMSNorm(args.head_dim if args.qk_norm == "head" else q_dim, args)
            self.k_norm = RMSNorm(args.head_dim if args.qk_norm == "head" else kv_dim, args)
        self.scale, self.softcap = args.attention_scale, args.attention_softcap
        self.sinks = nn.Parameter(torch.zeros(args.n_heads)) if args.attention_sinks else None       # [H]
        self.cache = KVCache(args)
        self.attend, self.rotate = attend, rotate                # a device may bring its own: see kernels/

    def forward(self, x: Tensor, where: tuple[Tensor, Tensor, Tensor], rotation: tuple[Tensor, Tensor] | None,
                mask: Tensor) -> Tensor:
        B, T, _ = x.shape
        H, K, E = self.n_heads, self.n_kv_heads, self.head_dim
        # [B, T, H*E] and twice [B, T, K*E]; what `split` makes of it, PyTorch's cache of traced graphs does not keep
        q, k, v = self.wqkv(x).split_with_sizes([H * E, K * E, K * E], dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, T, -1, E).transpose(1, 2) for t in (q, k, v))           # [B, H|K, T, E]
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = self.rotate(torch.cat([q, k], 1), *rotation).split_with_sizes([H, K], 1)       # both at once: half the calls
        k, v = self.cache(where, k, v, mask.shape[-1])                               # [B, K, S, E]
        y = self.attend(q, k, v, mask, self.scale, self.softcap, self.sinks)         # [B, H, T, E]
        return self.wo(y.transpose(1, 2).reshape(B, T, H * E))                       # [B, T, D]


class KVCache(nn.Module):
    """Keys and values [B, K, S, E], slot s holding position s of its row. Until `allocate`, it passes both
    through.

    Padding needs no care: it stands to the right of a row, so that its slots are beyond every real query's
    position, and the row's next tokens overwrite them.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_kv_heads, self.head_dim = args.n_kv_heads, args.head_dim
        self.register_buffer("k", None, persistent=False)
        self.register_buffer("v", None, persistent=False)

    def allocate(self, batch_size: int, slots: int, like: Tensor):
        """Zeros, because a masked slot still takes part in 0 * value; old contents are kept. One slot more
        than is ever attended: a slice that cannot be the whole keeps its length symbolic in a compiled
        graph."""
        for name, old in (("k", self.k), ("v", self.v)):
            new = like.new_zeros(batch_size, self.n_kv_heads, slots + 1, self.head_dim)
            if old is not None:
                new[:old.shape[0], :, :old.shape[2]] = old
            setattr(self, name, new)

    def forward(self, where: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        if self.k is None:
            return k, v
        self.k[where], self.v[where] = k, v
        return self.k[:len(k), :, :slots], self.v[:len(k), :, :slots]                # [B, K, S, E]


def attention_mask(query_pos: Tensor, key_pos: Tensor, window: int) -> Tensor:
    """bool [B, 1, T, S]: may query t see key s? query_pos [B, T], key_pos [B, S]. A window counts the
    query itself."""
    distance = query_pos[:, None, :, None] - key_pos[:, None, None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float = 0.0,
           sinks: Tensor | None = None) -> Tensor:
    """softmax(q @ k.T * scale) @ v under a mask. q [B, H, T, E], k and v [B, K, S, E], mask [B, 1, T, S] ->
    q's shape.

    Many queries go through the fused operator, whose memory does not grow with T * S. Few, where the cost is
    reading k and v once, are written out, each head's keys times all its queries. Soft caps and sinks, [H], have no
    fused operator.
    """
    B, H, T, E = q.shape
    K = k.shape[1]
    if T > FEW and not cap and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=H != K)
    q = q.reshape(B, K, H // K * T, E)          # the queries that share a key head become rows of one product
    scores = torch.matmul(q, k.transpose(-2, -1)).float() * scale                    # [B, K, H/K*T, S]
    scores = softcap(scores, cap).view(B, K, H // K, T, -1)
    scores = scores.masked_fill(~mask[:, :, None], -math.inf)
    if sinks is not None:                       # one more score, whose share is dropped
        sinks = sinks.float().view(1, K, H // K, 1, 1).expand(B, -1, -1, T, 1)
        scores = torch.cat([scores, sinks], -1)
    p = scores.softmax(-1)[..., :k.shape[2]].to(v.dtype).view(B, K, H // K * T, -1)
    return torch.matmul(p, v).view(B, H, T, E)


FEW = 15        # queries a row: one-token steps, and blocks that speculation verifies; compiled prompts begin at 16


def softcap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


# ---- feed-forward and norm ---------------------------------------------------------------------------------

def silu_clamped(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's: the gate goes up to 7, the other from -7 to 7 and one is added."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS = {"silu": lambda gate, up: F.silu(gate) * up, "gelu": lambda gate, up: F.gelu(gate) * up,
               "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up, "silu_clamped": silu_clamped}


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs, width: int):
        super().__init__()
        self.width = width
        self.w13 = nn.Linear(args.dim, 2 * width, bias=args.ffn_bias)                # rows: gate | up
        self.w2 = nn.Linear(width, args.dim, bias=args.ffn_bias)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)                                      # [..., F] each
        return self.w2(self.activation(gate, up))


class Router(nn.Linear):
    """Small and sensitive: the one kind of linear layer that is never quantized."""


class MoEFeedForward(nn.Module):
    """A mixture of experts (Shazeer et al. 2017; as in Mixtral, Jiang et al. 2024): a router sends each token to A
    of X small feed-forwards, whose outputs are added by weight. Memory holds all; a token reads its own."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.router = Router(args.dim, args.n_experts, bias=args.router_bias)
        self.experts = nn.ModuleList(FeedForward(args, args.expert_dim) for _ in range(args.n_experts))
        self.shared = FeedForward(args, args.shared_dim) if args.shared_dim else None
        self.shared_gate = Router(args.dim, 1, bias=False) if args.shared_gate else None
        self.active, self.renormalize = args.active_experts, args.renormalize
        self.run = run_experts          # a device may bring its own: see experts.py

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)                                                      # [B*T, D]
        shared = None if self.shared is None else self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(x)) * shared
        y = self.run(self.experts, rows, *self.route(rows)).view_as(x)
        return y if shared is None else y + shared

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> the chosen experts' weights, float32, and ids, both [T, A]."""
        logits = self.router(x).float()                                              # [T, X]
        if self.renormalize:            # a softmax over all, its largest made to add up to 1, is the same
            top, ids = logits.topk(self.active)
            return top.softmax(-1), ids
        return logits.softmax(-1).topk(self.active)


def run_experts(experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The weighted sum over its experts of each row of x [T, D]; weights and ids [T, A]. Each expert that is wanted
    runs once, on the rows that want it: its weights are read once, and memory grows with T * A * D."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        row, place = (ids == expert).nonzero(as_tuple=True)                          # [n]
        y.index_add_(0, row, experts[expert](x[row]).float() * weights[row, place, None])
    return y.to(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019), statistics in float32.
    Whether the scale multiplies before or after the cast is only rounding, but it is the rounding a family
    was trained with."""

    def __init__(self, dim: int, args: ModelArgs):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.style = args.norm_eps, args.norm_style

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        if self.style == "llama":
            return self.weight * y.to(x.dtype)
        weight = self.weight.float() + 1.0 if self.style == "gemma" else self.weight.float()
        return (y * weight).to(x.dtype)


# ---- rotary embeddings -------------------------------------------------------------------------------------

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + r/2) of a head's first r dimensions. x [B, H, T, E]; cos and sin [B, 1, T,
    r/2] float32."""
    r = 2 * cos.shape[-1]
    x1, x2 = x[..., :r].float().chunk(2, -1)
    turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
    return turned if r == x.shape[-1] else torch.cat([turned, x[..., r:]], dim=-1)


class RotaryEmbedding(nn.Module):
    """Positions to cos and sin (Su et al. 2021), in float32 whatever the model's dtype: bfloat16 is wrong
    by 2e-3."""

    def __init__(self, rope: RopeArgs, max_position: int):
        super().__init__()
        self.rope, self.max_position = rope, max_position
        self.length = 0
        self.register_buffer("frequencies", None, persistent=False)                  # [r/2] float32
        self.set_length(max_position if rope.kind == "dynamic" else 1)

    def set_length(self, length: int):
        """Fit the frequencies to sequences of `length` tokens. Only dynamic and longrope depend on it."""
        if self.frequencies is None or self.rope.kind in ("dynamic", "longrope") and length != self.length:
            frequencies, self.amplitude = rope_frequencies(self.rope, self.max_position, length)
            self.frequencies = frequencies if self.frequencies is None else self.frequencies.copy_(frequencies)  # graphs hold it
            self.length = length

    def _apply(self, fn, recurse=True):     # .to(dtype) and .to_empty() move the numbers, and change nothing else
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = frequencies.to(self.frequencies.device)
        return self

    def forward(self, input_pos: Tensor) -> tuple[Tensor, Tensor]:
        """input_pos [B, T] -> cos, sin, each [B, 1, T, r/2]."""
        angles = input_pos[:, None, :, None].float() * self.frequencies
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude


def rope_frequencies(rope: RopeArgs, max_position: int, length: int) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, [r/2] float32, and the factor on cos and sin, for sequences of
    `length`.

    default: Su et al. 2021. linear: Chen et al. 2023. dynamic: NTK-aware, by length. llama3: long
    wavelengths slowed. yarn: Peng et al. 2023. longrope: Ding et al. 2024, one factor per pair.
    """
    r = rope.dim
    pair = torch.arange(0, r, 2, dtype=torch.float32, device="cpu") / r              # explicit: not on meta
    plain = 1.0 / rope.theta ** pair
    return ROPE_KINDS[rope.kind](plain, rope, max_position, length)


def linear_rope(plain, rope, max_position, length):
    return plain / rope.scaling["factor"], 1.0


def dynamic_rope(plain, rope, max_position, length):
    if length <= max_position:
        return plain, 1.0
    factor, r = rope.scaling["factor"], rope.dim
    theta = rope.theta * (factor * length / max_position - (factor - 1)) ** (r / (r - 2))
    return 1.0 / theta ** (torch.arange(0, r, 2, dtype=torch.float32, device="cpu") / r), 1.0


def llama3_rope(plain, rope, max_position, length):
    s = rope.scaling
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * plain / (2 * math.pi)            # in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / s["factor"] + keep * plain, 1.0


def yarn_rope(plain, rope, max_position, length):
    s, r = rope.scaling, rope.dim
    original = s.get("original_max_position_embeddings") or max_position
    factor = s.get("factor") or max_position / original

    def mscale(k: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * k * math.log(factor) + 1.0

    def pair_that_turns(times: float) -> float:
        return r * math.log(original / (2 * math.pi * times)) / (2 * math.log(rope.theta))

    amplitude = s.get("attention_factor")
    if amplitude is None:
        both = s.get("mscale") and s.get("mscale_all_dim")
        amplitude = mscale(s["mscale"]) / mscale(s["mscale_all_dim"]) if both else mscale(1.0)
    low, high = pair_that_turns(s.get("beta_fast") or 32), pair_that_turns(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    ramp = (torch.arange(r // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 1e-3)
    ramp = ramp.clamp(0, 1)                       # 0: fast pairs stay as they are; 1: slow ones are stretched
    return plain / factor * ramp + plain * (1 - ramp), amplitude


def longrope(plain, rope, max_position, length):
    s = rope.scaling
    original = s.get("original_max_position_embeddings") or max_position
    factor = s.get("factor") or max_position / original
    amplitude = s.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    per_pair = s["long_factor" if length > original else "short_factor"]
    per_pair = torch.tensor(per_pair, dtype=torch.float32, device="cpu")
    pair = torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu") / rope.dim
    return 1.0 / (per_pair * rope.theta ** pair), amplitude  # plain / per_pair is an ulp off: 2e-3 at 100,000


ROPE_KINDS = {"default": lambda plain, *_: (plain, 1.0), "linear": linear_rope, "dynamic": dynamic_rope, "llama3": llama3_rope,
              "yarn": yarn_rope, "longrope": longrope}
