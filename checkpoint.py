"""From what is on disk to a Transformer, and back.

What it is: the file formats and where their bytes go. A checkpoint is told by its content, never by its name;
loading is strict, reads every weight once and keeps no second copy; what cannot be loaded is a
CheckpointError of one sentence. What it is not: what the tensors mean is settled in architecture.py, and
nothing here knows tokens or generation.

Reading order: `load_checkpoint` (the story), `open_source` (file formats), the older formats,
`save_checkpoint` (our own files), `resolve` (the hub). Then architecture.py for names and configs, or
generate.py, which runs the model.
"""
import ctypes
import itertools
import json
import math
import os
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from architecture import CheckpointError, Part, Stored, args_from, cut_parts, plan, unstack
from foreign import by_place, read_quantized, split_layers
from model import ModelArgs, Transformer
from quantize import QuantizedLinear, SplitLinear, empty_layer

FORMAT_VERSION = 1                      # of our own files; a reader refuses a newer one
FORMAT_KEY = "self_describing_checkpoint"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass
class Source:
    """An opened checkpoint: what it says of itself and its tensors by their own names. `own`: one of our
    files, with ModelArgs in `args`; otherwise `config` is read, under Hugging Face's names."""
    path: Path
    config: dict
    tensors: dict[str, Stored]
    generation_config: dict = field(default_factory=dict)
    own: bool = False
    args: dict = field(default_factory=dict)
    quantization: dict = field(default_factory=dict)    # our own files: layer -> what it takes to make it
    quantized_from: str = ""            # the dtype before that


# ---- loading -----------------------------------------------------------------------------------------------

def load_checkpoint(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                    trust_architecture: bool = False, progress: Callable[[int, int], None] | None = None,
                    cut: Callable[[Transformer], dict] | None = None,
                    place: Callable[[str], str | torch.device] | None = None,
                    ready: Callable[[Transformer, nn.Module], None] | None = None) -> Transformer:
    """The model at `path` (a folder, a file, or a hub id), in eval mode, without gradients, in `dtype`
    (None: as stored). The weights are read once, straight into their final place: host memory peaks at the
    weights plus one tensor. progress(bytes done, bytes in all) is called after each parameter. cut: as
    tp.cut, makes the empty model smaller and tells what is left of its tensors; only that is read. place: the
    device of each tensor, by name, where it is not `device`; "meta" leaves it unread. ready(model, part): called with
    each block as soon as it is filled, so that it can be laid out anew before the next one takes memory, and with the
    model in the end. Raises CheckpointError.
    """
    source = open_source(resolve(path))
    model, steps = prepare(source, trust_architecture)
    for name, (dim, ranges) in (cut(model) if cut else {}).items():
        steps[name] = cut_parts(steps[name], dim, ranges)
    dtype = dtype or common_dtype(source)
    places = {name: torch.device(place(name) if place else device) for name in model.state_dict()}
    for wanted in set(places.values()):
        names = [name for name, where in places.items() if where == wanted]
        check_memory(weight_bytes(model, dtype, names), wanted)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.dtype = dtype
    done, total = 0, weight_bytes(model, dtype)
    # the last norm first, which tells where the model is; then block after block
    order = sorted(places, key=lambda name: (name != "norm.weight", block_of(name) == ""))
    for block, names in itertools.groupby(order, block_of):
        for name in (n for n in names if places[n].type != "meta"):
            done += read_weight(source, model, steps, name, dtype, places[name]).nbytes
            if progress:
                progress(done, total)
        if block and ready:
            ready(model, model.get_submodule(block))
    model.ropes.to(torch.device(device))
    model.eval()
    if ready:
        ready(model, model)
    return model


def block_of(name: str) -> str:
    """layers.0.attention.wo.weight -> layers.0; "" for a tensor of none."""
    return name[:name.index(".", 7)] if name.startswith("layers.") else ""


def read_weight(source: Source, model: Transformer, steps: dict[str, list[Part]], name: str, dtype: torch.dtype,
                device: torch.device | str = "cpu") -> Tensor:
    """Put the stored values of one parameter (or one buffer of a quantized layer) in its place in `model`."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    empty = getattr(owner, leaf)
    weight = torch.empty(empty.shape, dtype=final_dtype(leaf, empty, dtype), device=device)
    for part in steps[name]:
        copy_part(weight, source.tensors[part.source], part)
    put(owner, leaf, weight)
    return weight


def prepare(source: Source, trust_architecture: bool = False) -> tuple[Transformer, dict[str, list[Part]]]:
    """The model on the meta device and where each of its tensors comes from, checked: nothing is read yet."""
    try:
        args = source_args(source, trust_architecture)
        with torch.device("meta"), NoRandomStart():
            model = Transformer(args)
    except CheckpointError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the config of '{source.path}' does not describe a model: {first_line(error)}") from None
    model.n_parameters = sum(p.numel() for p in model.parameters())
    split = set_layers(model, source)
    steps = plan(model, source.tensors, source.config.get("model_type"), own=source.own, split=split)
    check_shapes(model, source, steps)
    return model, steps


def set_layers(model: Transformer, source: Source) -> set[str]:
    """Put quantized layers in the places that the source says; returns the fused ones that had to stay apart."""
    layers = source.quantization
    if not source.own:
        source.tensors, found = split_layers(source.tensors)
        layers = by_place(found, source.tensors, model.args)
    split = set()
    for name, spec in layers.items():
        try:
            old = model.get_submodule(name)
            new = quantized_layer(old, spec)
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"'{source.path}' describes the quantized layer '{name}' in a way this version "
                                  f"cannot read: {first_line(error)}") from None
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        split |= {name} if isinstance(new, SplitLinear) else set()
    return split


def quantized_layer(old: nn.Module, spec: dict) -> nn.Module:
    """An unfilled layer on the meta device in place of nn.Linear, a tied table, or part by part."""
    with torch.device("meta"):
        if "parts" in spec:
            return SplitLinear({part: quantized_layer(nn.Linear(old.in_features, rows, bias=bias), of)
                                for part, (rows, bias, of) in spec["parts"].items()})
        if not spec:
            return old
        N, K = old.weight.shape
        return empty_layer(K, N, **{"bias": getattr(old, "bias", None) is not None} | spec)


class NoRandomStart(TorchFunctionMode):
    """An embedding's random start is of no use here, and on the meta device it imports torch.compile's
    machinery: a second and 65 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def source_args(source: Source, trust_architecture: bool = False) -> ModelArgs:
    """ModelArgs of an opened checkpoint; raises CheckpointError for what this Transformer is not."""
    if source.own:
        return own_args(source)
    logical = unstack(read_quantized(source.config, source.tensors), source.config)
    args, source.tensors = args_from(source.config, logical, trust_architecture)
    return args


def check_shapes(model: Transformer, source: Source, steps: dict[str, list[Part]]):
    """Each stored tensor is as large as its place."""
    for parameter, empty in model.state_dict().items():
        by_source = Counter()
        for part in steps[parameter]:
            by_source[part.source] += part.stop - part.start
        for name, rows in by_source.items():
            stored, wanted = source.tensors[name], (rows, *empty.shape[1:])
            if stored.shape != wanted:
                raise CheckpointError(f"tensor '{name}' has shape {list(stored.shape)} where {list(wanted)} is needed")
            plain = stored.dtype.is_floating_point and stored.dtype.itemsize >= 2
            if not (plain if empty.is_floating_point() else stored.dtype == empty.dtype):
                raise CheckpointError(f"tensor '{name}' is stored as {stored.dtype}: quantized weights of an unknown "
                                      "kind")


def put(module: nn.Module, leaf: str, weight: Tensor):
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    else:
        module._buffers[leaf] = weight


def copy_part(weight: Tensor, stored: Stored, part: Part):
    """Copy one source tensor into its rows of `weight`, casting on the way.

    Files with interleaved rope turn the pairs (2j, 2j+1) of a head; ours turns (j, j + E/2), so rows are
    reordered.
    """
    target, at = weight[part.start:part.stop], 0
    stored = stored.narrow(1, *part.columns) if part.columns else stored
    for read in stored.narrow(0, part.first, part.first + len(target)).pieces:
        piece = read()
        size = piece.shape[stored.dim]
        place = target.narrow(stored.dim, at, size)
        if part.head_dim:
            half = part.head_dim // 2
            place.unflatten(0, (-1, 2, half)).copy_(piece.unflatten(0, (-1, half, 2)).transpose(1, 2))
        else:
            place.copy_(piece)
        at += size


def final_dtype(leaf: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Weights and biases take the wanted dtype; scales keep the one they were made for."""
    return dtype if leaf in ("weight", "bias") and tensor.is_floating_point() else tensor.dtype


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None, names: list[str] | None = None) -> int:
    """Bytes of a model's parameters and stored buffers (or those of these names), as they are or would be in `dtype`."""
    def itemsize(name, t):
        return (final_dtype(name.rpartition(".")[2], t, dtype) if dtype else t.dtype).itemsize
    state = model.state_dict()
    return sum(state[name].numel() * itemsize(name, state[name]) for name in (state if names is None else names))


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be allocated on a device, or None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else None
    return None


def check_memory(needed: int, device: torch.device):
    """Fail before the machine starts to swap, with both numbers."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise CheckpointError(f"the weights need {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free: "
                              "choose a smaller dtype, a quantized checkpoint or another device")


def common_dtype(source: Source) -> torch.dtype:
    """The floating dtype in which most of the bytes are stored; of a quantized file what it says."""
    if source.own and hasattr(torch, source.quantized_from):
        return getattr(torch, source.quantized_from)
    count = Counter()
    for stored in source.tensors.values():
        if stored.dtype.is_floating_point:
            count[stored.dtype] += math.prod(stored.shape) * stored.dtype.itemsize
    return count.most_common(1)[0][0] if count else torch.float32


def read_args(path: str | Path, trust_architecture: bool = False) -> tuple[ModelArgs, dict]:
    """What the model will be, and the config it was read from; no weights are read."""
    source = open_source(resolve(path))
    return prepare(source, trust_architecture)[0].args, source.config


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype most weight bytes are stored in."""
    return common_dtype(open_source(resolve(path)))


def pick_dtype(name: str | torch.dtype, device: torch.device, path: Path) -> torch.dtype:
    """auto: bfloat16, which halves what decode reads, where the device has it, else float16. On a CPU a
    checkpoint stored in float32 that fits the cache (32 MB) stays as it is: halving it would gain nothing
    and round."""
    if isinstance(name, torch.dtype):
        return name
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        files = [path] if path.is_file() else path.glob("*.safetensors")
        small = sum(file.stat().st_size for file in files) <= 32 << 20
        return torch.float32 if small and stored_dtype(path) == torch.float32 else torch.bfloat16
    lacks_bfloat16 = device.type == "mps" or device.type == "cuda" and not torch.cuda.is_bf16_supported()
    return torch.float16 if lacks_bfloat16 else torch.bfloat16


def read_generation_config(path: str | Path) -> dict:
    """The contents of generation_config.json, or what our own file kept of it; {} where there is none."""
    return open_source(resolve(path)).generation_config


def end_ids(path: str | Path) -> set[int]:
    """Every id that ends a text, according to generation_config.json and config.json together: they often
    differ."""
    source = open_source(resolve(path))
    found = set()
    for config in (source.generation_config, source.config, source.config.get("text_config") or {}):
        ids = config.get("eos_token_id")
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return found


# ---- files -------------------------------------------------------------------------------------------------

def open_source(path: Path) -> Source:
    """Find out what `path`, a file or a folder, holds, and list its tensors without reading them."""
    try:
        return open_folder(path) if path.is_dir() else open_file(path)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from None


def open_folder(folder: Path) -> Source:
    names = {f.name for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")}
    consolidated = sorted(n for n in names if re.fullmatch(r"consolidated(\.\d+)?\.(pth|safetensors)", n))
    if "config.json" in names and (shards := hf_shards(folder, names)):
        tensors = {}
        for shard in shards:
            tensors |= read_tensors(folder / shard)
        return hf_source(folder, read_json(folder / "config.json"), tensors)
    if "params.json" in names and consolidated:
        tensors = join_slices([read_tensors(folder / n) for n in consolidated])
        return hf_source(folder, native_config(folder / "params.json", tensors), tensors)
    if "adapter_config.json" in names:
        raise CheckpointError(f"'{folder}' holds only a LoRA adapter: merge it into its base model first")
    weights = sorted(n for n in names if n.endswith((".safetensors", ".pth", ".pt", ".bin", ".gguf"))
                     and not n.startswith(("tok", "training_args", "optimizer", "adapter")))
    if len(weights) == 1:
        return open_file(folder / weights[0])
    if weights:
        raise CheckpointError(f"'{folder}' holds several weight files ({', '.join(weights)}): name the one to load")
    if "config.json" in names or "params.json" in names:
        raise CheckpointError(f"'{folder}' holds no weights: neither *.safetensors nor pytorch_model*.bin")
    raise CheckpointError(f"'{folder}' holds no checkpoint: no config.json and no weights")


def hf_shards(folder: Path, names: set[str]) -> list[str]:
    """The weight files of a Hugging Face folder, safetensors before pickles; [] if there are none."""
    for single, index in (("model.safetensors", "model.safetensors.index.json"),
                          ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if single in names:
            return [single]
        if index in names:
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"'{folder / index}' has no 'weight_map'")
            shards = sorted(set(weight_map.values()))
            missing = [s for s in shards if not (folder / s).is_file()]
            if missing:
                raise CheckpointError(f"'{folder}' lacks {', '.join(missing)}, named in {index}: download it again")
            return shards
    shards = sorted(n for n in names if re.fullmatch(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)", n))
    shards = [n for n in shards if n.endswith(shards[-1][-4:])]             # safetensors, if there are both
    if shards and len(shards) != (count := int(re.findall(r"\d+", shards[0])[1])):
        raise CheckpointError(f"'{folder}' holds {len(shards)} of {count} weight files: download it again")
    return shards


def hf_source(path: Path, config: dict, tensors: dict[str, Stored]) -> Source:
    folder = path if path.is_dir() else path.parent
    generation = folder / "generation_config.json"
    beside = folder / "quantize_config.json"            # GPTQ's, before it moved into config.json
    if "quantization_config" not in config and beside.is_file():
        config = config | {"quantization_config": {"quant_method": "gptq"} | read_json(beside)}
    return Source(path, config, tensors, read_json(generation) if generation.is_file() else {})


def open_file(path: Path) -> Source:
    with open(path, "rb") as file:
        head = file.read(256)
    kind = file_kind(path, head)
    if kind == "llama2.c":
        config, tensors = read_llama2c(path, head)
        return Source(path, config, tensors)
    tensors, extra = read_safetensors(path) if kind == "safetensors" else read_pickle(path, kind)
    if FORMAT_KEY in extra:
        return own_source(path, extra[FORMAT_KEY], tensors)
    if "model_args" in extra:                                  # a training checkpoint of llama2.c: tinyllamas
        return Source(path, native_args(extra["model_args"], tensors, path), tensors)
    return hf_source(path, config_beside(path, tensors), tensors)


def file_kind(path: Path, head: bytes) -> str:
    """safetensors, zip, pickle or llama2.c, by the first bytes."""
    size = path.stat().st_size
    if head[:4] == b"PK\3\4":
        return "zip"
    if head[:4] == b"GGUF":
        raise CheckpointError(f"'{path}' is a GGUF file, which is not supported: use the model's safetensors")
    if head[:2] == b"\x80\x02":
        return "pickle"
    if head[:4] == b"24ka" or size == legacy_size(head):
        return "llama2.c"
    if head[8:9] == b"{":
        return "safetensors"
    raise CheckpointError(f"'{path}' ({size:,} bytes) is no checkpoint this program knows, or is damaged")


def config_beside(path: Path, tensors: dict[str, Stored]) -> dict:
    """The config of a file that has none inside: config.json or params.json in the same folder."""
    if (path.parent / "config.json").is_file():
        return read_json(path.parent / "config.json")
    if (path.parent / "params.json").is_file():
        return native_config(path.parent / "params.json", tensors)
    raise CheckpointError(f"'{path}' does not say how many heads its model has: put its config.json or params.json "
                          "beside it")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{path}' is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' is not a JSON object")
    return found


def read_tensors(path: Path) -> dict[str, Stored]:
    with open(path, "rb") as file:
        kind = file_kind(path, file.read(256))
    return read_safetensors(path)[0] if kind == "safetensors" else read_pickle(path, kind)[0]


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                      "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
                      "U32": torch.uint32, "U16": torch.uint16, "U64": torch.uint64}


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict]:
    """The tensors, mapped when read, and what our own files say of themselves."""
    from safetensors import SafetensorError, safe_open
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is truncated or damaged ({error}): download it again") from None
    tensors = {}
    for name in file.keys():
        view = file.get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
        if dtype is None:
            raise CheckpointError(f"'{path}' stores '{name}' as {view.get_dtype()}, which is not supported")
        tensors[name] = Stored(tuple(view.get_shape()), dtype, [lambda name=name: file.get_tensor(name)])
    metadata = file.metadata() or {}
    try:
        return tensors, {FORMAT_KEY: json.loads(metadata[FORMAT_KEY])} if FORMAT_KEY in metadata else {}
    except json.JSONDecodeError:
        raise CheckpointError(f"'{path}' has a damaged description of itself: convert it again") from None


def read_pickle(path: Path, kind: str) -> tuple[dict[str, Stored], dict]:
    """The state dict of a torch file, mapped if it is a zip, and what stands beside it. Nothing in it may
    run."""
    import pickle
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True if kind == "zip" else None)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"'{path}' is refused, because it is damaged or wants to run code ({first_line(error)}): "
                              "use safetensors") from None
    except Exception as error:              # a damaged pickle is a program gone wrong: it can raise anything
        raise CheckpointError(f"'{path}' is truncated or damaged ({first_line(error)}): download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' holds a {type(found).__name__}, not the weights of a model")
    state = next((found[k] for k in ("state_dict", "model") if isinstance(found.get(k), dict)), found)
    state = {str(name): t for name, t in state.items() if isinstance(t, Tensor)}
    if not state:
        raise CheckpointError(f"'{path}' holds no tensors")
    extra = {k: v for k, v in found.items() if k in (FORMAT_KEY, "model_args")}
    return {name: mapped(t) for name, t in drop_tied_head(state).items()}, extra


def drop_tied_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pickles store a tied pair as two names for one storage: keep the table's."""
    for table, head in (("embed_tokens.weight", "lm_head.weight"), ("tok_embeddings.weight", "output.weight")):
        pair = [next((n for n in state if n.split(".")[-2:] == end.split(".")), None) for end in (table, head)]
        if None not in pair and state[pair[0]].data_ptr() == state[pair[1]].data_ptr():
            return {name: t for name, t in state.items() if name != pair[1]}
    return state


def mapped(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), tensor.dtype, [lambda: tensor])


def join_slices(slices: list[dict[str, Stored]]) -> dict[str, Stored]:
    """Meta's consolidated.NN.pth are tensor-parallel slices: undo the cut, by name."""
    tensors = dict(slices[0])
    if len(slices) == 1:
        return tensors
    if sum(map(len, slices)) == len(set().union(*slices)):      # Mixtral's: each file has tensors of its own, whole
        return {name: t for s in slices for name, t in s.items()}
    if "norm.weight" not in tensors:
        raise CheckpointError("the consolidated files lack tensor 'norm.weight'")
    width = math.prod(tensors["norm.weight"].shape)
    for name, first in slices[0].items():
        if len(first.shape) != 2:
            continue                                                      # norms and frequencies are repeated
        if any(name not in s for s in slices):
            raise CheckpointError(f"tensor '{name}' is missing from some of the consolidated files")
        by_columns = name.endswith(("wo.weight", "w2.weight"))
        if name == "tok_embeddings.weight":                        # Llama 2 cut its columns, Llama 3 its rows
            by_columns = first.shape[1] != width
        dim = int(by_columns)
        shape = list(first.shape)
        shape[dim] = sum(s[name].shape[dim] for s in slices)
        tensors[name] = Stored(tuple(shape), first.dtype, [read for s in slices for read in s[name].pieces], dim)
    return tensors


# ---- llama2.c and params.json ------------------------------------------------------------------------------

def native_config(path: Path, tensors: dict[str, Stored]) -> dict:
    """Meta's and Mistral's params.json."""
    params = read_json(path)
    foreign = [k for k in ("vision_encoder", "q_lora_rank", "quantization", "yarn", "llama_4_scaling", "lora")
               if params.get(k)]
    if foreign:
        raise CheckpointError(f"unsupported model: '{path}' asks for '{foreign[0]}'")
    return native_args(params, tensors, path)


def native_args(params: dict, tensors: dict[str, Stored], path: Path) -> dict:
    """dim, n_layers, n_heads, ... under Hugging Face's names. What is left out is read off the tensors."""
    try:
        table = next(t for n, t in tensors.items() if n.endswith("tok_embeddings.weight"))
        width = params["hidden_dim"] if params.get("moe") and "hidden_dim" in params else next(
            t for n, t in tensors.items() if re.search(r"feed_forward\.(experts\.\d+\.)?w2\.weight$", n)).shape[-1]
    except StopIteration:
        raise CheckpointError(f"'{path}' has no tok_embeddings.weight or no feed_forward.w2.weight beside it") from None
    for key in ("dim", "n_layers", "n_heads"):
        if not isinstance(params.get(key), int):
            raise CheckpointError(f"'{path}' lacks '{key}', or it is no whole number")
    theta = params.get("rope_theta") or 10000.0
    config = {"model_type": "llama", "hidden_size": params["dim"], "num_hidden_layers": params["n_layers"],
              "num_attention_heads": params["n_heads"], "num_key_value_heads": params.get("n_kv_heads"),
              "head_dim": params.get("head_dim"), "intermediate_size": width, "vocab_size": table.shape[0],
              "rms_norm_eps": params.get("norm_eps") or 1e-5, "rope_theta": theta,
              "max_position_embeddings": params.get("max_seq_len") or NATIVE_LENGTHS.get(theta, 4096)}
    if params.get("sliding_window"):
        config |= {"model_type": "mistral", "sliding_window": params["sliding_window"]}
    if moe := params.get("moe"):
        config |= {"model_type": "mixtral", "num_local_experts": moe.get("num_experts"),
                   "num_experts_per_tok": moe.get("num_experts_per_tok")}
    if params.get("use_scaled_rope"):   # the factor is not stored: 8 in Meta's code, 32 in the small models' configs
        config["max_position_embeddings"] = 131072
        config["rope_scaling"] = {"rope_type": "llama3", "factor": 32.0 if params["dim"] <= 3072 else 8.0,
                                  "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 8192}
    return config


NATIVE_LENGTHS = {500000.0: 8192, 1000000.0: 16384}     # params.json has no length: Llama 3, CodeLlama; else Llama 2


def legacy_size(head: bytes) -> int:
    """What a headerless llama2.c file must weigh if these are its first bytes; -1 if they cannot be."""
    if len(head) < 28:
        return -1
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", head[:28])
    if not (0 < dim < 2**17 and hidden > 0 and 0 < layers < 2**10 and heads > 0 and kv_heads > 0 and vocab
            and length > 0 and dim % heads == 0 and heads % kv_heads == 0):
        return -1
    head_dim = dim // heads
    per_layer = 2 * dim + 2 * dim * dim + 2 * dim * kv_heads * head_dim + 3 * dim * hidden
    untied = vocab < 0
    return 28 + 4 * ((1 + untied) * abs(vocab) * dim + layers * per_layer + dim + length * head_dim)


def read_llama2c(path: Path, head: bytes) -> tuple[dict, dict[str, Stored]]:
    """run.c's files: the headerless one, version 1 (float32) and version 2 (Q8_0), as config and tensors."""
    version = struct.unpack("i", head[4:8])[0] if head[:4] == b"24ka" else 0
    if version not in (0, 1, 2):
        raise CheckpointError(f"'{path}' is a llama2.c file of version {version}; known are 0, 1 and 2")
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("7i", head, 8 if version else 0)
    tied = head[36] != 0 if version else vocab > 0
    group = struct.unpack_from("i", head, 37)[0] if version == 2 else 0
    params = {"dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "max_seq_len": length}
    kv = kv_heads * (dim // heads)
    norms = [(f"layers.{{}}.{n}.weight", (dim,)) for n in ("attention_norm", "ffn_norm")]
    table, head_ = ("tok_embeddings.weight", (abs(vocab), dim)), ("output.weight", (abs(vocab), dim))
    wq, wk, wv, wo = ((f"layers.{{}}.attention.{n}.weight", s) for n, s in
                      (("wq", (dim, dim)), ("wk", (kv, dim)), ("wv", (kv, dim)), ("wo", (dim, dim))))
    w1, w2, w3 = ((f"layers.{{}}.feed_forward.{n}.weight", s) for n, s in
                  (("w1", (hidden, dim)), ("w2", (dim, hidden)), ("w3", (hidden, dim))))
    final = ("norm.weight", (dim,))
    if version == 0:
        order = [table, norms[0], wq, wk, wv, wo, norms[1], w1, w2, w3, final,
                 ("freqs_cos", (length, dim // heads // 2)), ("freqs_sin", (length, dim // heads // 2))]
    else:
        order = [*norms, final, table, wq, wk, wv, wo, w1, w2, w3]
    order += [] if tied else [head_]
    tensors = llama2c_tensors(path, order, layers, 256 if version else 28, group)
    return native_args(params, tensors, path), tensors


def llama2c_tensors(path: Path, order: list, layers: int, at: int, group: int) -> dict[str, Stored]:
    """Walk the file: each kind for all layers in turn. With a group size, matrices are int8 with a scale
    per group."""
    raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for name, shape in order:
        for layer in range(layers if "{}" in name else 1):
            n = math.prod(shape)
            quantized = bool(group) and len(shape) == 2
            size = n + 4 * (n // group) if quantized else 4 * n
            data = raw[at:at + size]
            at += size
            if data.numel() != size:
                raise CheckpointError(f"'{path}' is truncated: it ends within '{name.format(layer)}'")
            read = (lambda d=data, n=n, s=shape: q8_0(d, n, group).view(s)) if quantized else \
                   (lambda d=data, s=shape: d.view(torch.float32).view(s))
            tensors[name.format(layer)] = Stored(shape, torch.float32, [read])
    if at != raw.numel():
        raise CheckpointError(f"'{path}' has {raw.numel() - at} bytes more than its header says")
    return tensors


def q8_0(data: Tensor, n: int, group: int) -> Tensor:
    scales = data[n:].clone().view(torch.float32)               # a clone, since it need not be aligned
    return (data[:n].view(torch.int8).view(-1, group) * scales[:, None]).view(-1)


# ---- our own files -----------------------------------------------------------------------------------------

def save_checkpoint(model: Transformer, path: str | Path, metadata: dict | None = None):
    """Write `model` with all that is needed to load it, as safetensors or, if `path` ends in .pth, as a torch
    file.

    metadata may hold generation_config, source_config, source (a word on the origin) and quantization (per
    layer). The file is written beside its target and renamed: an interruption leaves the old file, or
    none.
    """
    path = Path(path)
    writers = {".safetensors": write_safetensors, ".pth": write_pth}
    if path.suffix not in writers:
        raise CheckpointError(f"cannot save to '{path}': the name must end in .safetensors or .pth")
    about = {"version": FORMAT_VERSION, "config": model.args.to_dict(), "quantization": None, "generation_config": {},
             "source_config": {}, "source": "", "versions": {"torch": torch.__version__}} | (metadata or {})
    about = json.loads(json.dumps(about))               # plain types, which every reader of a .pth accepts
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        writers[path.suffix](model.state_dict(), about, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_safetensors(state: dict[str, Tensor], about: dict | None, path: Path):
    """Header, then tensor by tensor: the library's own writer takes a second copy of everything."""
    metadata = {"format": "pt"} | ({FORMAT_KEY: json.dumps(about)} if about else {})
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, at = {"__metadata__": metadata}, 0
    for name, t in sorted(state.items(), key=lambda item: -item[1].dtype.itemsize):     # wide first: all are aligned
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in list(header)[1:]:
            t = state[name].detach().cpu().contiguous()
            file.write((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))        # .numpy() is no dependency


def write_pth(state: dict[str, Tensor], about: dict, path: Path):
    torch.save({FORMAT_KEY: about, "state_dict": {name: t.detach().cpu() for name, t in state.items()}}, path)


def own_source(path: Path, about: dict, tensors: dict[str, Stored]) -> Source:
    version = about.get("version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"'{path}' is of format version {version}; this program reads version {FORMAT_VERSION}")
    return Source(path, about.get("source_config") or {}, tensors, about.get("generation_config") or {}, own=True,
                  args=about.get("config") or {}, quantization=(about.get("quantization") or {}).get("layers", {}),
                  quantized_from=(about.get("quantization") or {}).get("dtype", ""))


def own_args(source: Source) -> ModelArgs:
    try:
        return ModelArgs(**source.args)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"'{source.path}' has a config this version cannot read: {error}") from None


# ---- the hub -----------------------------------------------------------------------------------------------

def resolve(path: str | Path) -> Path:
    """An existing file or folder as it is; a hub id, org/name, downloaded to the cache."""
    if Path(path).exists():
        return Path(path)
    text = str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith(".") or Path(text).parent.exists():
        raise CheckpointError(f"there is no file or folder '{text}'")
    return download(text)


HUB_TEXTS = ["*.json", "*.jinja", "*.tiktoken", "tokenizer.model*", "merges.txt"]
HUB_WEIGHTS = [["*.safetensors"], ["pytorch_model*.bin"], ["consolidated*", "*.pth", "*.pt", "*.bin"]]  # first found


def download(repo: str, *, folder: str | Path | None = None, token: str | None = None) -> Path:
    """What is needed of a hub repository, in the cache or in `folder`: the texts and one set of weights.
    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE count; without a connection the cache serves."""
    from huggingface_hub import snapshot_download
    for weights in HUB_WEIGHTS:
        ignored = ["*/*"] + ["consolidated*"] * (weights is not HUB_WEIGHTS[-1])    # Llama's original/, Mistral's twin
        try:
            found = Path(snapshot_download(repo, allow_patterns=HUB_TEXTS + weights, ignore_patterns=ignored,
                                           local_dir=folder, token=token))
        except Exception as error:      # what the transport raises depends on the library's version
            raise CheckpointError(f"'{repo}' {hub_reason(error)}") from None
        if any(any(found.glob(pattern)) for pattern in weights):
            break
    return found


def hub_reason(error: Exception) -> str:
    from huggingface_hub import constants, errors
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "huggingface.co cannot be reached"
    reasons = (     # in this order: the first is a kind of the second
        (errors.GatedRepoError, "is gated: accept its licence on huggingface.co and set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "is no file or folder here and no repository on huggingface.co (a private one "
                                         "needs HF_TOKEN)"),
        ((errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
         f"is no file or folder here, it is not in the download cache, and {why}"))
    known = [text for kinds, text in reasons if isinstance(error, kinds)]
    return known[0] if known else f"cannot be downloaded: {first_line(error)}"
