"""Experts in host memory, beside an accelerator that holds everything else (KTransformers' division of the work).

What it is: `load`, a mixture of experts whose experts stay on the host, and `Offloaded`, which runs a layer's. Few
tokens go to the experts: the CPU kernels multiply where the weights are. For many tokens the experts come to the device,
one after another through two buffers, each multiplied while the next is on its way. The experts that are wanted most
often may have a copy on the device for good. What it is not: another model or another sum; the routing is model.py's,
and without an accelerator the same code runs with the host as the device and gives the resident model's bits.
Read experts.py in the root first; fits.py computes what fits where.
"""
import copy
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import experts
import quantize
import ranks
from checkpoint import (CheckpointError, free_memory, open_source, pick_dtype, prepare, read_tensors, resolve,
                        weight_bytes, write_safetensors)
from experts import Opaque, Records, Stacked, combine
from generate import load_model, pick_device
from kernels import cpu
from model import FeedForward, MoEFeedForward, Transformer
from quantize import QuantizedLinear

ROOM_FOR = 4096         # tokens of cache that the plan leaves room for on the device
SPARE = 0.3e9           # bytes an accelerator needs beside tensors
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)            # tokens at which `measure` compares


# ---- what goes where ---------------------------------------------------------------------------------------

@dataclass
class Sizes:
    """Bytes: what must be on the device (cache and two experts in transit included), of one expert, of them all."""
    device: int
    expert: int
    layers: list[int]                   # those with experts
    each: int                           # experts in a layer

    @property
    def host(self) -> int:
        return self.expert * self.each * len(self.layers)


def is_expert(name: str) -> bool:
    return ".feed_forward.experts." in name


def sizes(model: Transformer, dtype: torch.dtype) -> Sizes:
    """Of an unread model, as checkpoint.prepare makes it."""
    a, names = model.args, list(model.state_dict())
    if not a.n_experts:
        raise ValueError("this model has no experts to offload: every layer is dense")
    layers = [i for i in range(a.n_layers) if i not in a.dense_layers]
    one = weight_bytes(model, dtype, [n for n in names if n.startswith(f"layers.{layers[0]}.feed_forward.experts.0.")])
    cache = 2 * a.n_layers * a.n_kv_heads * a.head_dim * min(ROOM_FOR, a.max_position) * dtype.itemsize
    dense = weight_bytes(model, dtype, [n for n in names if not is_expert(n)])
    return Sizes((dense + cache) // ranks.size() + 2 * one // ranks.size(), one // ranks.size(), layers, a.n_experts)


def choose_resident(s: Sizes, room: float, counts: Tensor | None) -> list[list[int]]:
    """For each layer the experts that get a copy on the device: the most wanted first, as many as fit `room` bytes."""
    n = min(int(room // s.expert), s.each * len(s.layers))
    wanted = torch.zeros(len(s.layers), s.each) if counts is None else counts.float()
    ties = torch.arange(s.each).expand_as(wanted)               # of equal ones those with low numbers, in all layers
    order = sorted(range(wanted.numel()), key=lambda i: (-wanted.flatten()[i].item(), ties.flatten()[i].item()))[:n]
    return [sorted(i % s.each for i in order if i // s.each == layer) for layer in range(len(s.layers))]


def plan(path: Path, device: torch.device, dtype: torch.dtype, vram_gb: float | None, mapped: bool,
         trust: bool = False) -> tuple[Sizes, float]:
    """The sizes, and the bytes that are left on the device for experts. Raises ValueError where it does not fit."""
    s = sizes(prepare(open_source(path), trust)[0], dtype)
    if device.type == "cuda":
        s.device += int(SPARE)
        vram_gb = 0.95 * free_memory(device) / 1e9 if vram_gb is None else vram_gb
    room = 0.0 if vram_gb is None else vram_gb * 1e9 - s.device
    if room < 0:
        raise ValueError(f"--vram_gb {vram_gb:.3g} is less than the {s.device / 1e9:.3g} GB that must be on the device: all "
                         f"but the experts, a cache for {ROOM_FOR} tokens and two experts in transit")
    free = free_memory(torch.device("cpu"))
    if free is not None and s.host > free and not mapped:
        raise ValueError(f"the experts need {s.host / 1e9:.3g} GB of host memory and {free / 1e9:.3g} GB are free: quantize "
                         "them, or give --expert_file, from which they are mapped")
    return s, room


# ---- what was wanted ---------------------------------------------------------------------------------------

@dataclass
class Traffic:
    """Which experts were wanted how often; what a run says of it."""
    counts: Tensor                      # [layers, X], this run's
    earlier: Tensor | None = None       # of the file
    report: dict = field(default_factory=lambda: {"wanted": 0, "resident": 0, "streamed": 0})

    @classmethod
    def open(cls, file: str | None, s: Sizes) -> "Traffic":
        traffic = cls(torch.zeros(len(s.layers), s.each, dtype=torch.int64))
        if file and Path(file).exists():
            try:
                traffic.earlier = torch.tensor(json.loads(Path(file).read_text())["counts"], dtype=torch.int64)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"--expert_stats '{file}' is no file of counts that this program wrote") from None
            if traffic.earlier.shape != traffic.counts.shape:
                raise ValueError(f"--expert_stats '{file}' counts {list(traffic.earlier.shape)} layers and experts; this model "
                                 f"has {list(traffic.counts.shape)}")
        return traffic

    def save(self, file: str):
        counts = self.counts if self.earlier is None else self.counts + self.earlier
        partial = Path(f"{file}.partial")
        partial.write_text(json.dumps({"counts": counts.tolist()}))
        partial.replace(file)


# ---- one layer ---------------------------------------------------------------------------------------------

class Offloaded(Opaque):
    """The experts of a layer: all on the host, some with a copy on the device."""

    def __init__(self, layer: MoEFeedForward, store: "Store", resident: list[int], counts: Tensor,
                 written: Tensor | None = None):
        super().__init__(layer)
        self.store, self.counts = store, counts
        experts.make_alike(layer.experts)
        self.stacked = Stacked(layer, written) if Stacked.fits(layer) else None
        self.records = self.stacked.records if self.stacked else Records(layer.experts, written)
        self.copies = {e: portable(layer.experts[e], store.device) for e in resident}
        self.has_copy = torch.tensor([e in self.copies for e in range(len(layer.experts))])

    def plain(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [T, D], weights and ids [T, A] -> [T, D]. Asking for the ids is the one wait for the device."""
        T, A = ids.shape
        ids = ids.to("cpu")
        self.counts += torch.bincount(ids.flatten(), minlength=len(self.counts))
        here = self.has_copy[ids]                                                    # [T, A]
        report = self.store.traffic.report
        report["wanted"] += T * A
        report["resident"] += (found := int(here.sum()))
        out = x.new_zeros(T, A, x.shape[-1])
        self.run_copies(x, ids.masked_fill(~here, -1), out)
        if found < T * A:
            self.run_others(x, ids.masked_fill(here, -1), out)
        return combine(out, weights)

    def run_copies(self, x: Tensor, ids: Tensor, out: Tensor):
        for e in wanted(ids):
            run_expert(self.copies[e], x, ids == e, out)

    def run_others(self, x: Tensor, ids: Tensor, out: Tensor):
        if len(x) > self.store.few:
            self.store.traffic.report["streamed"] += int((ids >= 0).sum())
            return self.stream(x, ids, out)
        xs = x.to("cpu")
        if self.stacked:
            made = self.stacked.outputs(xs, ids)                                     # [T, A, D], zeros for -1
        else:
            made = xs.new_zeros(out.shape)
            for e in wanted(ids):
                run_expert(self.experts[e], xs, ids == e, made)
        out += made.to(out.device)

    def stream(self, x: Tensor, ids: Tensor, out: Tensor):
        """Each wanted expert through one of the two buffers, while its neighbour is multiplied."""
        queue = wanted(ids)
        slots = self.store.slots(self)
        slots[0].fetch(self.records.bytes[queue[0]])
        for i, e in enumerate(queue):
            if i + 1 < len(queue):
                slots[(i + 1) % 2].fetch(self.records.bytes[queue[i + 1]])
            with slots[i % 2] as expert:
                run_expert(expert, x, ids == e, out)


def wanted(ids: Tensor) -> list[int]:
    return [e for e in ids.unique().tolist() if e >= 0]


def run_expert(expert: FeedForward, x: Tensor, mine: Tensor, out: Tensor):
    """out[mine] = expert(x); mine bool [T, A] on the host, out [T, A, D] where x is."""
    row, place = (t.to(x.device, non_blocking=True) for t in mine.nonzero(as_tuple=True))
    out[row, place] = expert(x[row])


def twin(expert: FeedForward) -> FeedForward:
    """Another object for the same tensors, so that these can be replaced."""
    new = copy.copy(expert)
    new._modules = dict(new._modules)
    for name, layer in expert.named_children():
        new._modules[name] = other = copy.copy(layer)
        other._parameters, other._buffers = dict(layer._parameters), dict(layer._buffers)
    return new


def portable(expert: FeedForward, device: torch.device) -> FeedForward:
    """A copy on a device, in the form that the device multiplies fastest."""
    new = twin(expert)
    for name, layer in new.named_children():
        if isinstance(layer, cpu.PackedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            weight = cpu.rows(layer.packed, torch.arange(layer.out_features), layer.out_features, 16)
            plain.weight = nn.Parameter(weight[:, :layer.in_features].contiguous().to(device), requires_grad=False)
            plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(device), requires_grad=False)
            new._modules[name] = plain
        elif isinstance(layer, QuantizedLinear):
            layer.unpack_from_kernel()
            new._modules[name] = layer.to(device).pack()
        else:
            new._modules[name] = copy.deepcopy(layer).to(device)
    if device.type == "cpu":            # the host is the device: the same kernel, the same bits
        for name, layer in new.named_children():
            if isinstance(layer, nn.Linear) and isinstance(expert.get_submodule(name), cpu.PackedLinear):
                new._modules[name] = cpu.PackedLinear(layer.weight.data, layer.bias)
    return new


class Slot:
    """A place on the device for one expert: `fetch` begins to fill it, `with` waits for that and keeps it until the
    work inside is done. On an accelerator the way leads through pinned memory, on a stream of its own."""

    def __init__(self, like: Offloaded, device: torch.device):
        n = like.records.bytes.shape[1]
        self.bytes = torch.empty(n, dtype=torch.uint8, device=device)
        self.expert, self.cuda = twin(like.experts[0]), device.type == "cuda"
        like.records.point(self.expert, self.bytes)
        if self.cuda:
            self.pinned = torch.empty(n, dtype=torch.uint8, pin_memory=True)
            self.stream, self.arrived, self.free = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()

    def fetch(self, record: Tensor):
        if not self.cuda:
            self.bytes.copy_(record)
            return
        self.arrived.synchronize()      # the pinned bytes are still under way
        self.pinned.copy_(record)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free)
            self.bytes.copy_(self.pinned, non_blocking=True)
            self.arrived.record()

    def __enter__(self) -> FeedForward:
        if self.cuda:
            torch.cuda.current_stream().wait_event(self.arrived)
        return self.expert

    def __exit__(self, *_):
        if self.cuda:
            self.free.record()


# ---- a model -----------------------------------------------------------------------------------------------

class Store:
    """What the layers share: the device, the two buffers, the traffic, and up to how many tokens the host multiplies."""

    def __init__(self, device: torch.device, traffic: Traffic, few: float):
        self.device, self.traffic, self.few, self.pair = device, traffic, few, []

    def slots(self, layer: Offloaded) -> list[Slot]:
        if not self.pair or self.pair[0].bytes.shape[0] != layer.records.bytes.shape[1]:
            self.pair = [Slot(layer, self.device) for _ in range(2)]
        return self.pair


def load(path: str, device: str, dtype: str, *, vram_gb: float | None = None, how: str = "auto",
         stats: str | None = None, file: str | None = None, trust_architecture: bool = False):
    """As generate.load_model, experts on the host; and the store. Raises ValueError, or CheckpointError, in a sentence."""
    path, where = resolve(path), pick_device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"--offload_experts works beside a CUDA device, or on a CPU alone; not on '{where}'")
    kind = pick_dtype(dtype, where, path)
    file = Path(f"{file}.rank{ranks.rank()}of{ranks.size()}" if ranks.size() > 1 else file) if file else None
    mapped = file is not None and file.exists()
    s, room = plan(path, where, kind, vram_gb, mapped, trust_architecture)
    traffic = Traffic.open(stats, s)
    few = {"cpu": math.inf, "stream": 0}.get(how, math.inf)
    store = Store(where, traffic, few)
    resident = choose_resident(s, room, traffic.earlier)
    first = f"layers.{s.layers[0]}.feed_forward.experts.0."

    def place(name: str) -> torch.device | str:
        if not is_expert(name):
            return where
        return "cpu" if not mapped or name.startswith(first) else "meta"

    def pack(model: Transformer, part: nn.Module):
        if part is not model:           # the layers' experts may lie in one file: wait for all
            return
        written = map_experts(model, s, file) if mapped else [None] * len(s.layers)

        def finish(block: nn.Module):
            layer = getattr(block, "feed_forward", None)
            if isinstance(layer, MoEFeedForward):
                i = s.layers.index(next(i for i, b in enumerate(model.layers) if b is block))
                layer.run = Offloaded(layer, store, resident[i], traffic.counts[i], written[i])
        quantize.pack_model(model, finish)
        if file and not mapped:
            write_experts(model, s, file)

    model, tokenizer = load_model(path, str(where), kind, pack=pack, place=place, trust_architecture=trust_architecture)
    if how == "auto" and where.type == "cuda":
        store.few = measure(experts.layers(model)[0])
    traffic.counts.zero_()
    traffic.report.update(wanted=0, resident=0, streamed=0, copies=sum(map(len, resident)), experts=s.each * len(s.layers),
                          few=None if store.few == math.inf else store.few)
    return model, tokenizer, store


def measure(layer: MoEFeedForward) -> int:
    """Up to how many tokens the host multiplies faster than the weights travel: both ways, at growing numbers."""
    run, D = layer.run, layer.router.in_features
    for T in LENGTHS:
        times = []
        for run.store.few in (math.inf, 0):
            x = torch.randn(T, D, device=run.store.device).to(layer.router.weight.dtype)
            ids = torch.stack([torch.randperm(len(run.experts))[:layer.active] for _ in range(T)]).to(x.device)
            weights = torch.full(ids.shape, 1 / layer.active, device=x.device)
            attempts = []
            for _ in range(3):
                began = time.perf_counter()
                run.plain(x, weights, ids).cpu()
                attempts.append(time.perf_counter() - began)
            times.append(min(attempts))
        if times[1] < times[0]:
            return T - 1
    return LENGTHS[-1]


# ---- packed experts in a file ------------------------------------------------------------------------------

def write_experts(model: Transformer, s: Sizes, file: Path):
    """All records, as they lie in memory, for `map_experts`: written beside and renamed."""
    runs = [layer.run for layer in experts.layers(model)]
    if len({form(run.records) for run in runs}) > 1:
        raise CheckpointError("--expert_file holds experts of one form, and this checkpoint's layers have several")
    state = {f"layers.{i}": run.records.bytes for i, run in zip(s.layers, runs)}
    partial = file.with_name(f".{file.name}.partial")
    try:
        write_safetensors(state | {"form": as_bytes(form(runs[0].records))}, None, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def form(records: Records) -> str:
    return json.dumps([(name, str(dtype), list(shape), at) for name, dtype, shape, at in records.parts])


def map_experts(model: Transformer, s: Sizes, file: Path) -> list[Tensor]:
    """The records of each layer in the file, mapped: nothing is read before it is wanted. One expert, which was read
    and is packed here, is the pattern for the others' objects."""
    stored, layers = read_tensors(file), experts.layers(model)
    pattern = layers[0].experts[0]
    for module in pattern.modules():
        if isinstance(module, QuantizedLinear):
            module.pack()
    cpu.pack_part(model, pattern)
    names = {f"layers.{i}" for i in s.layers} | {"form"}
    records = Records(nn.ModuleList([pattern]))
    if set(stored) != names or not torch.equal(stored["form"].pieces[0](), as_bytes(form(records))):
        raise CheckpointError(f"--expert_file '{file}' holds experts of another model or format: delete it, or name another")
    written = [stored[f"layers.{i}"].pieces[0]() for i in s.layers]
    if not all(torch.equal(a, b) for a, b in zip(records.views(records.bytes[0]), records.views(written[0][0]))):
        raise CheckpointError(f"--expert_file '{file}' holds another checkpoint's experts: delete it, or name another")
    for layer in layers:
        layer.experts = nn.ModuleList(twin(pattern) for _ in range(s.each))
    return written
