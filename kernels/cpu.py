"""The CPU kernels, linear.cpp, attention.cpp and step.cpp: built once, called as operators, and the layout they read.

What it is: `available` builds and loads the operators, `pack` lays weights out, `linear`, `attend` and others call them, and
`rows` reads the layout back (a tied embedding's lookups, and the tests). `pack_part` puts a model on
them, block by block. What it is not: a quantizer; int8 and int4 values come from quantize.py. Without a C++ compiler nothing
breaks: PyTorch's own operators serve, with one notice. CPU_KERNELS=0 asks for that; CPU_KERNELS=weight_only leaves
activations in bfloat16 where they would be rounded to int8, and CPU_KERNELS=vectors leaves an Intel processor's tiles alone.
cpu_block.py, which runs a whole step in one call, is what to read next.
"""
import hashlib
import math
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import FEW, KVCache, RMSNorm
from model import attend as plain_attend
from model import rotate as plain_rotate

PLAIN = (("linear.cpp", "-DBFLOAT16_ONLY", "-DLIBRARY=cpu_bfloat16"), ("attention.cpp",), ("step.cpp",))
QUANTIZED = (("linear.cpp",),)          # the same and more; it takes twice as long to build
LOADED = {}                             # of these: whether it can be called
ABLE = {}                               # what they do on this processor: "prompts", attention of many queries
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-w"]
EXCHANGED = 1 << 20                     # bytes that ranks may exchange at once, as in exchange.cpp
FP4 = 40                                # `bits` of 4-bit floats, which lie as int4 does
LARGE_PAGE = 2 << 20
HURRY = {}                              # not empty: a program in a hurry, and what it has seen
PANEL, UNIT = 32, 8                     # outputs and inputs that lie together, as in weights.h


# ---- building ----------------------------------------------------------------------------------------------

def available(quantized: bool = False) -> bool:
    """Whether the operators can be called, `quantized`: for int8 and int4 weights too. The first call builds them (10 to
    15 s) or finds them built."""
    wanted = PLAIN + QUANTIZED if quantized else PLAIN
    missing = [kind for kind in wanted if kind not in LOADED]
    if missing and all(LOADED.values()):                        # what failed once would fail again
        LOADED.update(dict.fromkeys(missing, load(missing)))
    return all(LOADED.get(kind) for kind in wanted)


def load(kinds: list[tuple]) -> bool:
    if (wish := os.environ.get("CPU_KERNELS", "")) not in ("", "0", "1", "weight_only", "vectors") and not LOADED:
        print(f"note: CPU_KERNELS={wish} is not known and ignored; 0, weight_only and vectors are", file=sys.stderr, flush=True)
    if wish == "0":
        return False
    try:
        with ThreadPoolExecutor() as pool:
            for library in pool.map(lambda kind: build(*kind), kinds):
                torch.ops.load_library(library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (str(getattr(error, "stderr", "") or error).strip() or type(error).__name__).splitlines()[0]
        print(f"note: the CPU kernels could not be built ({reason}); PyTorch's own operators serve, more slowly",
              file=sys.stderr, flush=True)
        return False
    for library in ["cpu_bfloat16"] * (PLAIN[0] in kinds) + ["cpu_kernels"] * (QUANTIZED[0] in kinds):
        getattr(torch.ops, library).round_activations(wish != "weight_only")
        torch.library.register_fake(f"{library}::linear", shape_of_linear)
        torch.library.register_fake(f"{library}::experts", lambda x, ids, *rest: x.new_empty(*ids.shape, x.shape[1]))
    if PLAIN[1] in kinds:
        ABLE["prompts"] = torch.ops.cpu_attention.takes_prompts()
        torch.library.register_fake("cpu_attention::attend", shape_of_attend)
        torch.library.register_fake("cpu_step::block", lambda x, *rest: x.new_empty(x.shape))
        torch.library.register_fake("cpu_step::step", shape_of_step)
    torch.ops.cpu_step.connect(torch.ops.cpu_attention.address(), torch.ops.cpu_bfloat16.address(),
                               torch.ops.cpu_kernels.address() if QUANTIZED[0] in kinds else 0)
    return True


def share_memory(path: str, rank: int, size: int) -> bool:
    """Let `cpu_exchange::all_sum` add up small tensors over this machine's ranks, by way of a file they all map."""
    if not available():
        return False
    torch.ops.load_library(build("exchange.cpp"))
    torch.library.register_fake("cpu_exchange::all_sum", torch.empty_like)
    torch.ops.cpu_exchange.join(path, rank, size)
    return True


def build(name: str, *defines: str) -> Path:
    """Compile a file for this machine, unless the cache has it; raises OSError or SubprocessError. Compiler and paths are those of
    torch.utils.cpp_extension, whose `load` would want ninja as well, on the PATH."""
    source = Path(__file__).with_name(name)
    told = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    told += [torch.__version__, *FLAGS, *defines, instruction_set()]
    file = f"{source.stem}-{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:16]}.so"
    library = cache_folder() / file
    if not library.exists():
        if "-DPORTABLE" not in defines:                         # the tests' own
            print(f"building the CPU kernel {source.name}, once for this machine ...", file=sys.stderr, flush=True)
        from torch.utils import cpp_extension                   # it brings setuptools; a start that builds nothing does without
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        link = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / file
            command = [cpp_extension.get_cxx_compiler(), *FLAGS, *defines, *include, str(source), "-o", str(made), *link,
                       "-ltorch", "-ltorch_cpu", "-lc10"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            os.replace(made, library)   # several processes may build at once; each result is whole
    return library


def cache_folder() -> Path:
    """$TORCH_EXTENSIONS_DIR, else ~/.cache/fast-generate, else a folder of this user's in the temporary one."""
    wanted = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "fast-generate"
    for folder in (Path(wanted), Path(tempfile.gettempdir()) / f"fast-generate-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise OSError("no folder to build it in can be written")


def instruction_set() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()


def shape_of_linear(x, w, scales, offsets, N, bits, group):
    return x.new_empty(*x.shape[:-1], N)


def shape_of_step(ids, pos, forms, ends, slots, columns, vocabulary):
    return ids.new_empty(*(ids if columns is None else columns).shape, vocabulary, dtype=torch.float32)


def shape_of_attend(q, k, v, mask, scale, cap):
    B, H, T, E = q.shape
    return q.new_empty(B, T, H, E).transpose(1, 2)


# ---- the layout --------------------------------------------------------------------------------------------

def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pack(values: Tensor, bits: int, group: int = 0, heads: Tensor | None = None) -> Tensor:
    """Weights [N, K] as the kernel reads them: bfloat16, int8, or for 4 bits uint8 0 ... 15. N is padded to a
    multiple of 32 and K to one of 8; what is there multiplies zeros. heads: what stands before each group's."""
    N, K = values.shape
    full = values.contiguous() if N % PANEL == K % UNIT == 0 else \
        F.pad(values, (0, padded(K, UNIT) - K, 0, padded(N, PANEL) - N))
    out = in_large_pages(full.numel() * bits // 8 + (0 if heads is None else heads.numel()))
    torch.ops.cpu_bfloat16.pack(full, out, bits, group, heads)
    return out.view(values.dtype) if bits == 16 else out


def pack_scaled(values: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, group: int) -> tuple[Tensor, ...]:
    """Values [N, K], scales [N, G] and int8 offsets [N, G] or None as the kernel reads them. Of 4 bits the first of the three
    has it all in its heads, the second is their `least` and the third None; unless they do not fit. A scale that is not even
    2^-32 of the largest becomes that."""
    if bits == 8 or offsets is not None and (offsets.amin() < -7 or offsets.amax() > 8):
        return pack(values, bits), pack_groups(scales), None if offsets is None else pack_groups(offsets)
    codes = scales.view(torch.int16) if scales.dtype == torch.bfloat16 else torch.full(scales.shape, -1)
    if codes.amin() < 0 or codes.amax() >= 0x7f80:              # of another kind, negative, infinite or NaN
        return pack(values, bits, group, pack_heads(codes, offsets)), pack_groups(scales), None
    least = (codes.amax() - 0xfff).clamp(min=0).int()
    return pack(values, bits, group, pack_heads((codes - least).clamp(min=0), offsets)), least.view(1), None


def in_large_pages(nbytes: int) -> Tensor:
    """Empty bytes, in large pages where they fill some."""
    return torch.frombuffer(room, dtype=torch.uint8) if (room := large_pages(nbytes)) else torch.empty(nbytes, dtype=torch.uint8)


def large_pages(nbytes: int) -> mmap.mmap | None:
    """Memory in pages of 2 MB where the system has such: the processor reads ahead within a page only, and a pass
    over the weights is about 5 % faster. But the host of a virtual machine may put such a page together from 512 small
    ones when it is first touched, in 5 ms, which makes seconds of a large model's start. Where that is seen in a program
    in a HURRY, one that answers a single prompt, pages stay small."""
    if nbytes < 4 * LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    room = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not HURRY.get("pages are slow"):
        room.madvise(mmap.MADV_HUGEPAGE)
        if HURRY and min(touch(room, 0), touch(room, LARGE_PAGE)) > 1e-3:
            HURRY["pages are slow"] = True
            room.madvise(mmap.MADV_NOHUGEPAGE)
    return room


def touch(room: mmap.mmap, at: int) -> float:
    """Seconds that a byte's first touch takes."""
    began = time.perf_counter()
    room[at] = 0
    return time.perf_counter() - began


def pack_groups(numbers: Tensor) -> Tensor:
    """Scales or offsets [N, G] -> panels of [G, 32]."""
    N, G = numbers.shape
    return F.pad(numbers, (0, 0, 0, padded(N, PANEL) - N)).view(-1, PANEL, G).transpose(1, 2).reshape(-1)


def pack_heads(codes: Tensor, offsets: Tensor | None) -> Tensor:
    """Scales as 12-bit numbers and offsets of nibbles or None, [N, G] -> [panels, G, 64] as weights.h says."""
    def halves(numbers):                                                             # [N, G] -> [panels, G, 2, 16]
        return pack_groups(numbers.to(torch.uint8)).view(-1, numbers.shape[1], 2, PANEL // 2)
    low, high = halves(codes & 255), halves(codes >> 8 & 15)
    offset = halves(torch.full(codes.shape, 7) if offsets is None else offsets + 7)
    return torch.cat([low.flatten(2), *(four[:, :, 0] | four[:, :, 1] << 4 for four in (high, offset))], 2)


def rows(packed: Tensor, index: Tensor, N: int, bits: int) -> Tensor:
    """Rows `index` [...] of a packed weight, [..., K padded], as `pack` got them."""
    panel, half, output = index // PANEL, index % PANEL // 16, index % 16
    panels = padded(N, PANEL) // PANEL
    if bits == 4:
        return nibbles(packed.view(torch.int32).view(panels, -1, 2, 16)[panel, :, half, output])
    if bits == 8:
        quads = packed.view(panels, -1, 2, 2, 16, 2, 2)[panel, :, half, :, output]     # [..., units, quad, 2, 2]
        found = (quads ^ 128).view(torch.int8).movedim(-1, -3).flatten(-3, -2)
    else:
        found = packed.view(panels, -1, 2, 4, 16, 2)[panel, :, half, :, output]
    return found.flatten(-3)                                                         # [..., units * 4 * 2]


def nibbles(words: Tensor) -> Tensor:
    """A unit of an output is one int32: [..., units] -> int8 [..., K padded]."""
    return torch.stack([words >> shift & 15 for shift in (0, 16, 4, 20, 8, 24, 12, 28)], -1).flatten(-2).to(torch.int8)


def group_rows(packed: Tensor, index: Tensor, N: int) -> Tensor:
    """Rows `index` [...] of packed scales or offsets, [..., G]."""
    return packed.view(padded(N, PANEL) // PANEL, -1, PANEL)[index // PANEL, :, index % PANEL]


def scaled_rows(packed: tuple[Tensor, ...], index: Tensor, N: int, K: int, bits: int, group: int) -> tuple[Tensor, ...]:
    """Rows `index` [...] of what `pack_scaled` made: values [..., K padded], scales and offsets [..., G], or None."""
    values, scales, offsets = packed
    if bits == 8 or offsets is not None:
        return rows(values, index, N, bits), group_rows(scales, index, N), None if offsets is None else group_rows(offsets, index, N)
    panel, output, half = index[..., None] // PANEL, index[..., None] % 16, index[..., None] % PANEL // 16
    panels, units = padded(N, PANEL) // PANEL, padded(K, UNIT) // UNIT
    each = group // UNIT if group else units                                         # units of a group
    unit, first = (torch.arange(0, units, step, device=index.device) for step in (1, each))
    words, octets = values.view(torch.int32).view(panels, -1), values.view(panels, -1)
    codes = nibbles(words[panel, 16 * (unit // each + 1 + 2 * unit + half) + output])   # heads and half units are 16 words each
    head = 64 * (first // each + 2 * first)
    low, high, offset = (octets[panel, head + at].int() for at in (half * 16 + output, 32 + output, 48 + output))
    scales = ((low | (high >> 4 * half & 15) << 8) + scales).to(torch.int16).view(torch.bfloat16) \
        if scales.dtype == torch.int32 else group_rows(scales, index, N)
    return codes, scales, (offset >> 4 * half & 15).to(torch.int8) - 7


def linear(x: Tensor, packed: Tensor, scales: Tensor | None, offsets: Tensor | None, N: int, bits: int,
           group: int) -> Tensor:
    """x [..., K] @ ((values + offsets) * scales).T -> [..., N], in x's dtype, summed in float32."""
    library = torch.ops.cpu_bfloat16 if bits == 16 else torch.ops.cpu_kernels
    return library.linear(x, packed, scales, offsets, N, bits, group)


def experts(x: Tensor, ids: Tensor, w: list[Tensor], more: list[Tensor | None], sizes: list[int], clamped: bool) -> Tensor:
    """What each token's experts make of it: x [T, D], ids [T, A] -> [T, A, D]; zeros for an id of -1. Of w13 and w2: packed
    weights, then scales, offsets and bias; `sizes` their outputs, bits and group."""
    library = torch.ops.cpu_bfloat16 if sizes[1] == sizes[4] == 16 else torch.ops.cpu_kernels
    return library.experts(x, ids, w, more, sizes, clamped)


def most_queries(E: int, dtype: torch.dtype) -> float:
    """How many queries a row the kernel takes."""
    return math.inf if dtype == torch.bfloat16 and E % 16 == 0 and E <= 256 and ABLE.get("prompts") else FEW


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float = 0.0,
           sinks: Tensor | None = None) -> Tensor:
    """model.attend in the kernel, which looks no further than the mask lets it see: few queries, and prompts where the
    processor multiplies bfloat16."""
    T, E = q.shape[2:]
    if E % 16 or q.dtype not in (torch.float32, torch.bfloat16) or sinks is not None or T > most_queries(E, q.dtype):
        return plain_attend(q, k, v, mask, scale, cap, sinks)
    return torch.ops.cpu_attention.attend(q, k, v, mask, scale, cap)


# ---- models ----------------------------------------------------------------------------------------------

class PackedLinear(nn.Module):
    """nn.Linear with its bfloat16 weight laid out for the kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", pack(weight, 16), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":      # a copy of an expert that lives on the host
            every = torch.arange(self.out_features, device=x.device)
            return F.linear(x, rows(self.packed, every, self.out_features, 16)[..., :self.in_features], self.bias)
        y = linear(x, self.packed, None, None, self.out_features, 16, 0)
        return y if self.bias is None else y + self.bias


class PackedTable(PackedLinear):
    """A tied embedding table: lookups and the head read one packed weight."""

    def forward(self, tokens: Tensor) -> Tensor:
        return rows(self.packed, tokens, self.out_features, 16)[..., :self.in_features]

    def head(self, x: Tensor) -> Tensor:
        return super().forward(x)


def pack_part(model: nn.Module, part: nn.Module):
    """Put a part of a CPU model, or all of it, on the kernels: attention, and products of bfloat16 one by one, so that
    memory grows by one layer at most."""
    if not available():
        return
    for name, module in list(part.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if getattr(module, "attend", attend) is not attend and model.norm.weight.device.type == "cpu":
            module.attend, module.rotate, module.cache = attend, rotate, PackedCache(module.cache)
        if type(module) is RMSNorm and module.weight.device.type == "cpu":
            setattr(part.get_submodule(parent), leaf, PackedNorm(module))
        tied = module is model.tok_embeddings and model.output is None
        weight = module.weight if tied or isinstance(module, nn.Linear) else None
        if weight is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            continue
        packed = PackedTable(weight.data) if tied else PackedLinear(weight.data, module.bias)
        setattr(part.get_submodule(parent), leaf, packed)
        module.weight = None
    if part is model:
        gather_small(model)


def gather_small(model: nn.Module):
    """Move what is packed but too small for large pages of its own, scales and narrow matrices, into one room of them."""
    def small(name: str, t: Tensor | None) -> bool:     # an expert's tensors lie in one room already, as views of it
        return name.startswith("packed") and t is not None and t.device.type == "cpu" and \
            t.nbytes == t.untyped_storage().nbytes() and (name != "packed" or t.nbytes < 4 * LARGE_PAGE)
    found = [(module, name, t) for module in model.modules() for name, t in module._buffers.items() if small(name, t)]
    room, at = large_pages(sum(padded(t.nbytes, 64) for *_, t in found)), 0
    if not room or HURRY.get("pages are slow"):
        return
    while found:                        # one by one, so that what was moved is free
        module, name, t = found.pop()
        module._buffers[name] = torch.frombuffer(room, dtype=t.dtype, count=t.numel(), offset=at).view(t.shape).copy_(t)
        at += padded(t.nbytes, 64)


def by_call(x: Tensor) -> bool:
    """Whether step.cpp serves: not where a compiler makes loops of its own."""
    return not torch.compiler.is_compiling() and x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu"


class PackedNorm(RMSNorm):
    """RMSNorm in one call."""

    def __init__(self, norm: RMSNorm):
        nn.Module.__init__(self)
        self.weight, self.eps, self.style = norm.weight, norm.eps, norm.style

    def forward(self, x: Tensor) -> Tensor:
        if not by_call(x) or x.dtype != self.weight.dtype:
            return super().forward(x)
        return torch.ops.cpu_step.norm(x, self.weight, self.eps, self.style == "llama", float(self.style == "gemma"))


class PackedCache(KVCache):
    """KVCache whose new entries are written in one call. place: where it says where it lies, or None; see cpu_block.py."""
    place = None

    def __init__(self, cache: KVCache):
        nn.Module.__init__(self)
        self.n_kv_heads, self.head_dim = cache.n_kv_heads, cache.head_dim
        self.register_buffer("k", cache.k, persistent=False)
        self.register_buffer("v", cache.v, persistent=False)

    def __setattr__(self, name: str, value):
        super().__setattr__(name, value)
        if name in ("k", "v", "place") and self.place is not None:
            self.place.copy_(torch.tensor(self.here()))

    def here(self) -> list[int]:
        """Addresses, rows and slots; zeros for a cache that step.cpp cannot read."""
        k, v = self.k, self.v
        fits = k is not None and v is not None and k.shape == v.shape and \
            all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in (k, v))
        return [k.data_ptr(), v.data_ptr(), len(k), k.shape[2]] if fits else [0] * 4

    def _apply(self, fn, recurse=True):     # .to() and its kin, which set no attribute
        super()._apply(fn, recurse)
        self.k = self.k
        return self

    def forward(self, where: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        if self.k is None or not by_call(k) or k.dtype != self.k.dtype:
            return super().forward(where, k, v, slots)
        torch.ops.cpu_step.keep(self.k, self.v, k, v, where[2])
        return self.k[:len(k), :, :slots], self.v[:len(k), :, :slots]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """model.rotate in one call."""
    return torch.ops.cpu_step.rotate(x, cos, sin) if by_call(x) else plain_rotate(x, cos, sin)


def argmax(x: Tensor) -> Tensor:
    """x [..., V] -> [...]: x.argmax(-1), but for NaN."""
    return torch.ops.cpu_step.argmax(x) if draws(x) else x.argmax(-1)


def draws(logits: Tensor) -> bool:
    """Whether step.cpp picks ids of such logits."""
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and bool(LOADED.get(PLAIN[2]))


def unpacked(model: nn.Module) -> bool:
    """No kernel of ours serves: there is none, or not for this dtype."""
    return isinstance(model.layers[0].attention.wo, nn.Linear)


def one_row_matmul(model: nn.Module, rows: int) -> AbstractContextManager:
    """oneDNN multiplies one bfloat16 row at two thirds of PyTorch's own speed, and many rows several times
    faster. Packed weights need neither."""
    if rows == 1 and unpacked(model):
        return torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None)
    return nullcontext()


class NarrowRows(TorchFunctionMode):
    """While `decode` is traced for a CPU: one row times a narrow matrix as a written-out sum, which the compiler turns
    into its own loop. PyTorch's kernels take up to twice as long where no kernel of ours serves."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and len(args) > 1 and not kwargs:
            x, weight, bias = (*args, None)[:3]
            if x.numel() == x.shape[-1] <= 1024 and weight.device.type == "cpu" and weight.is_floating_point():
                y = (weight.float() * x.reshape(-1).float()).sum(-1)
                y = y if bias is None else y + bias.float()
                return y.to(x.dtype).view(*x.shape[:-1], -1)
        return function(*args, **(kwargs or {}))
