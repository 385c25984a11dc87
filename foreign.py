"""Checkpoints that others have quantized: GPTQ, AWQ, compressed-tensors and Marlin to Int4Linear and Int8Linear.

What it is: for each format the names of its tensors and the exact unpacking, bit for bit, into the layout of
quantize.py; and which layers of our fused model they become. What it is not: our own quantized files, which
checkpoint.py reads as they are. Nothing is read here but small tensors; weights are unpacked when their turn
comes.

Letters: N outputs, K inputs, G groups; w = (q - zero) * scale. A word is an int32 that holds 8 nibbles or 4
bytes, the lowest bits first.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from architecture import QUANTIZED, CheckpointError, Stored, place
from model import ModelArgs
from quantize import KINDS
from ranks import notice


@dataclass
class Quantized(Stored):
    """A weight [N, K] that is stored as integers: `leaves` are the tensors of our layer, `spec` makes it."""
    leaves: dict[str, Stored] = field(default_factory=dict)
    spec: dict = field(default_factory=dict)


@dataclass
class Packed:
    """What a format's reader found of one layer, unread: q() unsigned [N, K]; scales() [N, G]; the rest small."""
    shape: tuple[int, int]
    bits: int
    groupsize: int                      # of K inputs, K for one group a row
    q: Callable[[], Tensor]
    scales: Stored
    zeros: Tensor | None = None         # unsigned [N, G]; None: the middle
    g_idx: Tensor | None = None         # the group of each input, if they are not in order


# ---- from a folder's tensors to layers ---------------------------------------------------------------------

def read_quantized(config: dict, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors with each quantized layer's several as one `Quantized` weight; others as they are."""
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") not in QUANTIZED:
        return tensors                                          # nothing, or architecture.py refuses it by name
    if settings["quant_method"] == "mxfp4":
        return mxfp4(tensors)
    reader = pick_reader(settings)
    marker, *others = TENSORS[reader]
    modules = [name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")]
    if not modules:
        raise CheckpointError(f"config.json says method '{settings['quant_method']}' has quantized the weights, but "
                              f"there is no tensor '*.{marker}'")
    found = {}
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == marker:
            try:
                found[f"{module}.weight"] = our_layer(reader(Tensors(tensors, module), settings))
            except (KeyError, RuntimeError, IndexError) as error:
                raise CheckpointError(f"the quantized layer '{module}' lacks or garbles {error}") from None
        elif module not in modules or leaf not in others:      # a stranger stays, and will find no place
            found[name] = stored
    return found


class Tensors:
    """The tensors of one module, by their last name; reading one that is absent raises KeyError."""

    def __init__(self, tensors: dict[str, Stored], module: str):
        self.tensors, self.module = tensors, module

    def __contains__(self, leaf: str) -> bool:
        return f"{self.module}.{leaf}" in self.tensors

    def stored(self, leaf: str) -> Stored:
        return self.tensors[f"{self.module}.{leaf}"]

    def read(self, leaf: str) -> Tensor:
        return self.stored(leaf).pieces[0]()


def our_layer(p: Packed) -> Quantized:
    """A format's numbers as the buffers of our layer."""
    N, K = p.shape
    kind = KINDS[f"int{p.bits}"]
    shift = 2 ** (p.bits - 1) - kind.centre                     # int8 is signed with us, nibbles are not
    G = -(-K // p.groupsize)
    perm = order = None
    if p.g_idx is not None and not torch.equal(p.g_idx.int(), torch.arange(K, dtype=torch.int32) // p.groupsize):
        perm = order = p.g_idx.argsort(stable=True).int()
        if not torch.equal(p.g_idx[perm].int(), torch.arange(K, dtype=torch.int32) // p.groupsize):
            raise CheckpointError("a quantized layer has groups of unequal size in its 'g_idx', which is not supported")

    def weight():
        q = p.q()
        q = q if order is None else q[:, order]
        return kind.store(q.to(torch.int16) - shift)
    leaves = {"weight": Stored((N, kind.stored_columns(K)), kind.stored_dtype, [weight]), "scales": p.scales}
    if p.scales.shape != (N, G):
        raise RuntimeError(f"its scales: {list(p.scales.shape)} where {[N, G]} is needed")
    if p.zeros is not None and not (p.zeros == 2 ** (p.bits - 1)).all():
        zeros = (p.zeros.to(torch.int16) - shift).to(kind.stored_dtype)
        leaves["zeros"] = Stored((N, G), kind.stored_dtype, [lambda: zeros])
    if perm is not None:
        leaves["perm"] = Stored((K,), torch.int32, [lambda: perm])
    spec = {"mode": f"int{p.bits}", "groupsize": 0 if p.groupsize == K else p.groupsize, "zeros": "zeros" in leaves,
            "perm": perm is not None, "scale_dtype": str(p.scales.dtype).removeprefix("torch.")}
    return Quantized(p.shape, torch.float16, [], leaves=leaves, spec=spec)


def split_layers(tensors: dict[str, Stored]) -> tuple[dict[str, Stored], dict[str, Quantized]]:
    """Each Quantized weight replaced by its leaves; and those weights by name."""
    flat, found = {}, {}
    for name, stored in tensors.items():
        if isinstance(stored, Quantized):
            found[name] = stored
            flat |= {f"{name.removesuffix('.weight')}.{leaf}": t for leaf, t in stored.leaves.items()}
        else:
            flat[name] = stored
    return flat, found


def by_place(found: dict[str, Quantized], tensors: dict[str, Stored], args: ModelArgs) -> dict[str, dict]:
    """Our layer's name -> its spec. Parts that are fused with us (q, k and v; gate and up) share one layer if
    they were quantized alike, with the same order of inputs; else the spec lists them under "parts"."""
    layers: dict[str, dict[str, str]] = {}
    names = [*found, *(n for n in tensors if n.endswith(".weight") and n not in found)]
    for name in names:
        where = place(name, tensors) if found else None
        if where and where[0].endswith(".weight"):
            module = where[0].removesuffix(".weight")
            module = "tok_embeddings" if args.tied and module == "output" else module
            layers.setdefault(module, {})[where[1]] = name
    specs = {}
    for module, parts in layers.items():
        if not any(name in found for name in parts.values()):
            continue
        of = {part: found[name].spec if name in found else {} for part, name in parts.items()}
        perms = [found[name].leaves["perm"].pieces[0]() for name in parts.values()
                 if name in found and "perm" in found[name].leaves]
        alike = all(spec == next(iter(of.values())) for spec in of.values()) \
            and all(torch.equal(perm, perms[0]) for perm in perms)
        if alike:
            specs[module] = next(iter(of.values()))
        else:
            order = [part for part in ("q", "k", "v", "gate", "up") if part in parts]
            specs[module] = {"parts": {part: (
                (found[parts[part]] if parts[part] in found else tensors[parts[part]]).shape[0],
                parts[part].removesuffix("weight") + "bias" in tensors, of[part]) for part in order}}
    return specs


# ---- the formats -------------------------------------------------------------------------------------------

def pick_reader(settings: dict) -> Callable:
    """The reader of a format; raises CheckpointError for one that has none."""
    method = settings.get("quant_method")
    if method == "gptq":
        form = "marlin" if settings.get("is_marlin_format") else settings.get("checkpoint_format") or "gptq"
        readers = {"gptq": gptq, "gptq_v2": gptq, "marlin": marlin}
        if form in readers and settings.get("bits", 4) in (4, 8):
            return readers[form]
        raise unsupported(f"gptq with {settings.get('bits')} bits in format '{form}'")
    if method == "awq":
        version = str(settings.get("version", "gemm")).lower()
        if version == "gemm" and settings.get("bits", settings.get("w_bit", 4)) == 4:
            return awq
        raise unsupported(f"awq with {settings.get('bits')} bits in version '{version}'")
    groups = [g.get("weights") or {} for g in (settings.get("config_groups") or {}).values()]
    form = settings.get("format")
    if any(g.get("input_activations") for g in (settings.get("config_groups") or {}).values()):
        notice("the checkpoint asks for quantized activations, which are left as they are")
    for weights in groups:
        if weights.get("num_bits") not in (4, 8) or weights.get("type", "int") != "int" \
                or weights.get("strategy") not in ("group", "channel"):
            raise unsupported(f"compressed-tensors with {weights.get('num_bits')} bits of type "
                              f"'{weights.get('type')}' by {weights.get('strategy')}")
    readers = {"pack-quantized": compressed, "int-quantized": int_quantized}
    if form not in readers or not groups:
        raise unsupported(f"compressed-tensors in format '{form}'")
    return readers[form]


def unsupported(what: str) -> CheckpointError:
    return CheckpointError(f"quantized checkpoints of kind '{what}' cannot be loaded: use the repository with the "
                           "bfloat16 weights, or a 4-bit GPTQ or AWQ one")


def fields(words: Tensor, bits: int) -> Tensor:
    """Words [..., n] -> their unsigned fields [..., n * 32 / bits], uint8."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(-2)


def mxfp4(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """gpt-oss: all experts of a layer in *_blocks [X, N, K / 32, 16], nibbles, and *_scales [X, N, K / 32], exponents.
    Rows of gate and up alternate."""
    found = {}
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition("_")
        if leaf == "blocks":
            X, N, G, _ = stored.shape
            scales = tensors.get(f"{module}_scales")
            if scales is None or scales.shape != (X, N, G):
                raise CheckpointError(f"the quantized layer '{module}' lacks or garbles its scales")
            for e in range(X):
                found[module.replace("experts.", f"experts.{e}.") + ".weight"] = mxfp4_expert(
                    stored, scales, e, "gate_up" in module)
        elif leaf != "scales" or f"{module}_blocks" not in tensors:
            found[name] = stored
    if len(found) == len(tensors):
        raise CheckpointError("config.json says method 'mxfp4' has quantized the weights, but there is no tensor '*_blocks'")
    return found


def mxfp4_expert(blocks: Stored, scales: Stored, e: int, mixed: bool) -> Quantized:
    _, N, G, _ = blocks.shape

    def in_order(t: Tensor) -> Tensor:
        return torch.cat([t[0::2], t[1::2]]) if mixed else t

    def scale() -> Tensor:              # ours multiply twice the floats
        return in_order(torch.exp2(scales.pieces[0]()[e].float() - 128)).bfloat16()
    leaves = {"weight": Stored((N, 16 * G), torch.uint8, [lambda: in_order(blocks.pieces[0]()[e].flatten(1))]),
              "scales": Stored((N, G), torch.bfloat16, [scale])}
    spec = {"mode": "mxfp4", "groupsize": 32, "zeros": False, "perm": False, "scale_dtype": "bfloat16"}
    return Quantized((N, 32 * G), torch.bfloat16, [], leaves=leaves, spec=spec)


def turned(stored: Stored) -> Stored:
    """[G, N] -> [N, G]."""
    return Stored(stored.shape[::-1], stored.dtype, [lambda: stored.pieces[0]().t()])


def group_of(K: int, G: int, wanted: int) -> int:
    """The group size: what the config says if it fits the scales, else what they say."""
    return wanted if wanted > 0 and -(-K // wanted) == G else -(-K // G)


def gptq(t: Tensors, settings: dict) -> Packed:
    """AutoGPTQ and GPTQModel: qweight [K / 8, N] packed along K, qzeros [G, N / 8] along N, scales [G, N].
    Version 1 stores zeros less one."""
    rows, N = t.stored("qweight").shape
    g_idx = t.read("g_idx") if "g_idx" in t else None
    bits = settings.get("bits", 4) if g_idx is None else 32 * rows // len(g_idx)     # `dynamic` may differ by layer
    if bits not in (4, 8):
        raise unsupported(f"gptq with {bits} bits")
    K = rows * 32 // bits
    zeros = fields(t.read("qzeros"), bits).t()[:N]
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros = zeros + 1 & (1 << bits) - 1
    return Packed((N, K), bits, group_of(K, t.stored("scales").shape[0], settings.get("group_size", -1)),
                  lambda: fields(t.read("qweight").t(), bits), turned(t.stored("scales")), zeros, g_idx)


AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]    # where output i of eight lies in a word


def awq(t: Tensors, settings: dict) -> Packed:
    """AutoAWQ's gemm: qweight [K, N / 8] and qzeros [G, N / 8], both packed along N, interleaved; scales [G, N]."""
    K, N = t.stored("qweight").shape[0], t.stored("qweight").shape[1] * 8

    def outputs(words):                                                              # [n, N / 8] -> [N, n]
        return fields(words, 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2).t()
    wanted = settings.get("group_size", settings.get("q_group_size", -1))
    return Packed((N, K), 4, group_of(K, t.stored("scales").shape[0], wanted), lambda: outputs(t.read("qweight")),
                  turned(t.stored("scales")), outputs(t.read("qzeros")))


def compressed(t: Tensors, settings: dict) -> Packed:
    """compressed-tensors, pack-quantized: weight_packed [N, K / 8] along K, offset by the middle; zero points
    [N / 8, G] along N; weight_shape tells the padding."""
    N, K = t.read("weight_shape").tolist()
    bits = 32 * t.stored("weight_packed").shape[1] // K                              # K / 8 or K / 4 words
    bits = 8 if bits >= 8 else 4
    scales = t.stored("weight_scale")
    zeros = fields(t.read("weight_zero_point").t(), bits).t()[:N] if "weight_zero_point" in t else None
    group = next(g["weights"].get("group_size") or -1 for g in settings["config_groups"].values())
    return Packed((N, K), bits, group_of(K, scales.shape[1], group),
                  lambda: fields(t.read("weight_packed"), bits)[:, :K], scales, zeros,
                  t.read("weight_g_idx") if "weight_g_idx" in t else None)


def int_quantized(t: Tensors, settings: dict) -> Packed:
    """compressed-tensors, int-quantized: weight int8 [N, K], weight_scale [N, 1]."""
    N, K = t.stored("weight").shape
    if t.stored("weight").dtype != torch.int8 or "weight_zero_point" in t and t.read("weight_zero_point").any():
        raise unsupported("int-quantized compressed-tensors with zero points or other than 8 bits")
    return Packed((N, K), 8, group_of(K, t.stored("weight_scale").shape[1], -1),
                  lambda: t.read("weight").to(torch.int16) + 128, t.stored("weight_scale"))


def marlin(t: Tensors, settings: dict) -> Packed:
    """Marlin's own layout: B [K / 16, 2 N] in the order of tensor-core tiles, s [G, N] shuffled; symmetric."""
    K, N = t.stored("B").shape[0] * 16, t.stored("B").shape[1] // 2
    G = t.stored("s").shape[0]
    tiles = marlin_order()

    def q():
        stored = fields(t.read("B"), 4).view(-1, 1024)
        q = torch.empty_like(stored)
        q[:, tiles] = stored
        return q.view(K // 16, N // 16, 16, 16).permute(0, 2, 1, 3).reshape(K, N).t()
    across = [i + 8 * j for i in range(8) for j in range(8)] if G > 1 else \
        [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]

    def scales():
        stored = t.read("s").reshape(-1, len(across))
        natural = torch.empty_like(stored)
        natural[:, across] = stored
        return natural.view(G, N).t()
    return Packed((N, K), 4, group_of(K, G, settings.get("group_size", -1)), q,
                  Stored((N, G), t.stored("s").dtype, [scales]))


def marlin_order() -> Tensor:
    """Where each of a tile row's 1024 nibbles belongs."""
    order = [16 * r + i // 4 + 8 * b + 256 * j for i in range(32) for j in range(4) for b in range(2)
             for r in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1)]
    return torch.tensor(order).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()


TENSORS = {         # of each format: the tensor that marks a layer, then the others
    gptq: ("qweight", "qzeros", "scales", "g_idx"),
    awq: ("qweight", "qzeros", "scales"),
    compressed: ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    int_quantized: ("weight_scale", "weight", "weight_zero_point"),
    marlin: ("B", "s", "workspace"),
}
