"""The command line of quantize.py: a checkpoint in, a smaller one beside it. `python quantize.py --help` lists
the flags.

What it is: recipes (which layer gets which mode), the walk over a checkpoint that never holds more than the
result and one layer, the table of what was done, and the export for other programs. What it is not: how weights
are rounded; that is quantize.py, and gptq.py for int4-gptq.
"""
import argparse
import json
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import gptq
from architecture import CheckpointError
from checkpoint import (Source, common_dtype, open_source, prepare, read_weight, resolve, save_checkpoint,
                        weight_bytes, write_safetensors)
from model import Transformer
from quantize import GROUPSIZES, Int4Linear, Int8Linear, QuantizedLinear
from tokenizer import load_tokenizer

MODES = ("int8", "int4", "int4-gptq")
BESIDE = ("*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "tok*.bin")


# ---- which layer gets what ---------------------------------------------------------------------------------

def parse_mode(text: str, groupsize: int) -> tuple[str, int]:
    """'int4', 'int4.g64', 'int4-gptq', 'int8' or 'none' -> (mode, groupsize)."""
    mode, _, group = text.partition(".g")
    size = int(group) if group.isdigit() else groupsize
    if mode not in (*MODES, "none") or ".g" in text and not group.isdigit():
        raise ValueError(f"unknown mode '{text}'; known are none, {', '.join(MODES)}, with .g32 ... .g256 after int4")
    if mode.startswith("int4") and size not in GROUPSIZES:
        raise ValueError(f"unknown group size {size}; known are {', '.join(map(str, GROUPSIZES))}")
    return mode, size if mode.startswith("int4") else 0


def choose(model: Transformer, mode: str, groupsize: int, recipe: list[str]) -> dict[str, tuple[str, int]]:
    """Every layer's (mode, groupsize): the first rule whose regular expression is found in its name, else the
    mode of all. An embedding table that is not also the head stays as it is unless a rule names it."""
    default = parse_mode(mode, groupsize)
    rules = []
    for rule in recipe:
        pattern, equals, text = rule.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"recipe '{rule}' is not REGEX=MODE")
        try:
            rules.append((re.compile(pattern), parse_mode(text, groupsize), rule))
        except re.error as error:
            raise ValueError(f"recipe '{rule}' has no regular expression before '=': {error}") from None
    chosen, used = {}, set()
    for name, module in model.named_modules():
        table = module is model.tok_embeddings
        if not (table or type(module) is nn.Linear):
            continue
        found = next((rule for rule in rules if rule[0].search(name)), None)
        used |= {found[2]} if found else set()
        untied_table = table and model.output is not None
        chosen[name] = found[1] if found else ("none", 0) if untied_table else default
    idle = [rule for _, _, rule in rules if rule not in used]
    if idle:
        raise ValueError(f"recipe '{idle[0]}' matches no layer (or rules before it took them all); layers are "
                         "named like layers.0.attention.wqkv, layers.0.feed_forward.w2, output, tok_embeddings")
    return chosen


def table(model: Transformer, chosen: dict[str, tuple[str, int]]) -> str:
    """What became of the layers, those of one kind in a line."""
    lines = defaultdict(list)
    for name, (mode, group) in chosen.items():
        module = model.get_submodule(name)
        N, K = (module.out_features, module.in_features) if isinstance(module, QuantizedLinear) else module.weight.shape
        what = f"{mode}.g{group}" if group else str(module.weight.dtype)[6:] if mode == "none" else mode
        kind = re.sub(r"\.\d+\.", ".*.", name) + (" (also the head)" if name == "tok_embeddings"
                                                  and model.output is None else "")
        lines[kind, what, N, K].append(weight_bytes(module))
    rows = [f"  {kind:<32} {what:<14} {len(sizes):>3} x [{N}, {K}]  {sum(sizes) / 1e6:10.2f} MB  "
            f"{sum(sizes) / len(sizes) / N / K:.4f} bytes a weight"
            for (kind, what, N, K), sizes in lines.items()]
    return "\n".join(rows)


# ---- the walk ----------------------------------------------------------------------------------------------

class Reader:
    """Weights of a source, put into a model on the meta device when they are asked for."""

    def __init__(self, source: Source, model: Transformer, steps: dict, dtype: torch.dtype):
        self.source, self.model, self.steps, self.dtype = source, model, steps, dtype

    def fill(self, prefix: str):
        for name in [n for n in self.steps if n.startswith(prefix + ".")]:
            weight = read_weight(self.source, self.model, self.steps, name, self.dtype)
            if not weight.sum(dtype=torch.float64).isfinite():      # NaN and inf survive a sum, and it needs no copy
                raise CheckpointError(f"tensor '{name}' of '{self.source.path}' holds NaN or infinite numbers, which "
                                      "cannot be rounded: the checkpoint is damaged")

    def quantized(self, name: str, mode: str, group: int, H: Tensor | None = None, settings=None) -> nn.Module:
        """The filled layer `name` in its mode; a kind of 'none' is the layer itself."""
        module = self.model.get_submodule(name)
        if mode == "none":
            return module
        if mode == "int4-gptq" and H is not None:
            layer = gptq.round_weight(module.weight.data, H, group, settings)
        else:
            layer = (Int8Linear if mode == "int8" else Int4Linear).quantize(module.weight.data, group)
        layer.dtype, bias = self.dtype, getattr(module, "bias", None)
        layer.bias = None if bias is None else bias.data
        return layer


def round_all(reader: Reader, chosen: dict, progress) -> None:
    """Round each layer to the nearest, in the order of the file's names."""
    for i, name in enumerate(chosen):
        reader.fill(name)
        gptq.replace(reader.model, name, reader.quantized(name, *chosen[name]))
        progress(i + 1, len(chosen), name)
    done = tuple(f"{name}." for name in chosen)
    for name in reader.steps:
        if not name.startswith(done):
            reader.fill(name.rpartition(".")[0])


def gptq_all(reader: Reader, chosen: dict, samples: list[Tensor], o, progress) -> None:
    settings = gptq.Settings(o.percdamp, o.blocksize, o.act_order, not o.no_clip_search)
    walk = gptq.quantize_blocks(
        reader.model, samples, reader.fill,
        lambda name, H: reader.quantized(name, *chosen[name], H, settings),
        lambda name: chosen[name][0] == "int4-gptq", batch_size=8 if o.pad_calibration_inputs else 1)
    for i, name in enumerate(walk):
        progress(i + 1, len(chosen), name)


def progress_bar(done: int, total: int, name: str):
    if not sys.stderr.isatty() and 10 * done // total == 10 * (done - 1) // total:
        return                          # a file or a pipe gets ten lines of it
    filled = 30 * done // total
    end = "\n" if done >= total else ""
    print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {name:<34}", end=end, file=sys.stderr, flush=True)


def run(o: argparse.Namespace) -> Path:
    path = resolve(o.checkpoint_path)
    source = open_source(path)
    model, steps = prepare(source, o.trust_architecture)
    if any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise CheckpointError(f"'{path}' is quantized already; start from the checkpoint with the full weights")
    dtype = getattr(torch, o.dtype) if o.dtype != "auto" else common_dtype(source)
    chosen = choose(model, o.mode, o.groupsize, o.recipe)
    output = Path(o.output) if o.output else default_output(path, o)
    if o.format == "compressed-tensors":
        chosen = exportable(source, model, steps, chosen)
    samples = read_samples(o, path, model) if any(mode == "int4-gptq" for mode, _ in chosen.values()) else []
    reader = Reader(source, model, steps, dtype)
    progress = (lambda *_: None) if o.quiet else progress_bar
    before = sum(t.numel() * dtype.itemsize for t in model.state_dict().values())
    if samples:
        gptq_all(reader, chosen, samples, o, progress)
    else:
        round_all(reader, chosen, progress)
    layers = {name: m.spec() for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if o.format == "compressed-tensors":
        export(source, model, steps, chosen, path, output)
    else:
        about = {"dtype": str(dtype).removeprefix("torch."), "mode": o.mode, "groupsize": o.groupsize,
                 "recipe": o.recipe, "layers": layers}
        save_checkpoint(model, output, {"quantization": about, "generation_config": source.generation_config,
                                        "source_config": source.config, "source": str(path.name)})
    if not o.quiet:
        print(table(model, chosen), file=sys.stderr)
        print(f"{before / 1e6:,.1f} MB in {dtype} -> {weight_bytes(model) / 1e6:,.1f} MB", file=sys.stderr)
    return output


def default_output(path: Path, o: argparse.Namespace) -> Path:
    """model_int8, model_int4.g32 or model_int4-gptq.g32 beside the input, with its suffix."""
    folder = path if path.is_dir() else path.parent
    name = f"model_{o.mode}" + ("" if o.mode == "int8" else f".g{o.groupsize}")
    if o.format == "compressed-tensors":
        return folder / f"{name}-compressed-tensors"
    return folder / (name + (".pth" if path.suffix in (".pth", ".pt", ".bin") else ".safetensors"))


def read_samples(o: argparse.Namespace, path: Path, model: Transformer) -> list[Tensor]:
    """What GPTQ looks at: a file, or the texts of lm-eval's tasks."""
    tokenizer = load_tokenizer(path)
    length = o.calibration_seq_length or min(2048, model.args.max_position)
    if o.calibration_file:
        try:
            return gptq.calibration(o.calibration_file, tokenizer, length, o.calibration_limit, o.seed)
        except UnicodeDecodeError as error:
            raise ValueError(f"calibration_file '{o.calibration_file}' is not UTF-8: {error.reason}") from None
    if not o.calibration_tasks:
        raise ValueError("int4-gptq needs text to look at: give --calibration_file FILE (or --calibration_tasks)")
    documents = task_documents(o.calibration_tasks, o.calibration_limit, o.include_path)
    samples = [torch.tensor(tokenizer.encode(text)[:length]) for text in documents if text]
    return [ids for ids in samples if len(ids) > 1]


def task_documents(tasks: list[str], limit: int, include_path: str | None) -> list[str]:
    """The first documents of lm-eval's tasks, question and answer."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("--calibration_tasks needs lm-eval: pip install 'lm_eval>=0.4.13' "
                         "(--calibration_file FILE needs nothing)") from None
    manager, texts = TaskManager(include_path=include_path), []
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval knows no task '{unknown[0]}'; --include_path FOLDER adds your own")
    for task in manager.load(tasks)["tasks"].values():
        rows = task.training_docs() if task.has_training_docs() else \
            task.validation_docs() if task.has_validation_docs() else task.test_docs()
        for _, row in zip(range(limit), rows):
            target = task.doc_to_target(row)
            texts.append(f"{task.doc_to_text(row)} {target if isinstance(target, str) else ''}".strip())
    return texts[:limit]


# ---- for vLLM and transformers -----------------------------------------------------------------------------

def exportable(source: Source, model: Transformer, steps: dict, chosen: dict) -> dict:
    """`chosen` without the head, which those programs want unquantized; raises for what the format cannot hold."""
    if source.own or not source.path.is_dir() or any(p.head_dim for parts in steps.values() for p in parts):
        raise ValueError("--format compressed-tensors needs a Hugging Face folder as --checkpoint_path")
    if {part.source for parts in steps.values() for part in parts} - set(open_source(source.path).tensors):
        raise ValueError("--format compressed-tensors needs experts that are stored one by one, each under its own name")
    chosen = {name: ("none", 0) if name in ("output", "tok_embeddings") else how for name, how in chosen.items()}
    for name, (mode, group) in chosen.items():
        K = model.get_submodule(name).weight.shape[1]
        if group and K % group:
            raise ValueError(f"--format compressed-tensors needs whole groups: '{name}' has {K} inputs, no multiple "
                             f"of {group}")
    return chosen


def packed_words(values: Tensor, bits: int) -> Tensor:
    """Unsigned [n, K] -> int32 words [n, K * bits / 32], the first value lowest."""
    per = 32 // bits
    fields = torch.nn.functional.pad(values, (0, -values.shape[1] % per)).to(torch.int64).unflatten(1, (-1, per))
    return (fields << torch.arange(0, 32, bits)).sum(-1).to(torch.int32)


def export(source: Source, model: Transformer, steps: dict, chosen: dict, path: Path, output: Path):
    """A Hugging Face folder in compressed-tensors' pack-quantized format, under the source's tensor names."""
    state, groups = {}, defaultdict(list)
    for name, parts in steps.items():
        owner, leaf = name.rpartition(".")[::2]
        layer = model.get_submodule(owner)
        for part in parts:
            rows = slice(part.start, part.stop)
            if not isinstance(layer, QuantizedLinear) or leaf == "bias":
                state[part.source] = getattr(layer, leaf)[rows]
                continue
            if layer.perm is not None:
                raise ValueError("--format compressed-tensors cannot be combined with --act_order")
            module = part.source.removesuffix(".weight")
            middle = 2 ** (layer.bits - 1)
            state[f"{module}.weight_packed"] = packed_words(layer.numbers(rows)[0].to(torch.int16) + middle, layer.bits)
            state[f"{module}.weight_scale"] = layer.scales[rows]
            state[f"{module}.weight_shape"] = torch.tensor([part.stop - part.start, layer.in_features])
            if layer.zeros is not None:
                zeros = layer.zeros[rows].to(torch.int16) + middle - layer.centre
                state[f"{module}.weight_zero_point"] = packed_words(zeros.t(), layer.bits).t().contiguous()
            groups[layer.bits, chosen[owner][1], layer.zeros is None].append(module)
    ignored = [p.source.removesuffix(".weight") for n, parts in steps.items() for p in parts
               if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Linear) and n.endswith(".weight")]
    config_groups = {f"group_{i}": {"targets": modules, "input_activations": None, "output_activations": None,
                                    "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric,
                                                "strategy": "group" if group else "channel",
                                                "group_size": group or None, "dynamic": False}}
                     for i, ((bits, group, symmetric), modules) in enumerate(groups.items())}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
                "ignore": ignored, "config_groups": config_groups}
    output.mkdir(parents=True, exist_ok=True)
    for pattern in BESIDE:
        for file in path.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, output / file.name)
    write_safetensors(state, None, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(source.config | {"quantization_config": settings}, indent=2))


# ---- flags -------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Rewrite a checkpoint with int8 or int4 weights, beside the original.")
    add = p.add_argument
    add("--checkpoint_path", required=True, help="a folder, a file or a hub id")
    add("--mode", default="int8", help="int8, int4 or int4-gptq; default: int8")
    add("--groupsize", type=int, default=32, help="int4: inputs that share a scale, 32, 64, 128 or 256; default: 32")
    add("--recipe", action="append", default=[], metavar="REGEX=MODE",
        help="another mode for the layers whose name matches, e.g. 'output=int8' or 'w2=int4.g64' or "
             "'layers\\.0\\.=none'; may be repeated, the first match counts")
    add("--output", help="default: model_int8, model_int4.g32, ... beside the input, with its suffix")
    add("--format", default="self", choices=["self", "compressed-tensors"],
        help="self: one file that describes itself; compressed-tensors: a folder for vLLM and transformers")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of what is not quantized; default: as stored")
    add("--calibration_file", help="int4-gptq: text, or .jsonl with a \"text\" a line")
    add("--calibration_tasks", nargs="+", default=[], help="int4-gptq: tasks of lm-eval instead of a file")
    add("--include_path", help="a folder with lm-eval task files of your own")
    add("--calibration_limit", type=int, default=128, help="samples at most; default: 128")
    add("--calibration_seq_length", type=int, default=0, help="tokens in a sample; default: 2048 or what the model takes")
    add("--pad_calibration_inputs", action="store_true",
        help="run samples of different lengths eight at a time, padded; padding does not count")
    add("--percdamp", type=float, default=0.01, help="damping, as a share of the Hessian's mean diagonal")
    add("--blocksize", type=int, default=128, help="inputs rounded between two updates of the rest")
    add("--act_order", action="store_true", help="round the most active inputs first (costs a gather at run time)")
    add("--no_clip_search", action="store_true", help="do not search for the best range of each group")
    add("--seed", type=int, default=0, help="which samples are drawn")
    add("--trust_architecture", action="store_true", help="load a model_type this program does not know")
    add("--quiet", action="store_true", help="nothing on stderr but errors")
    return p


def check(o: argparse.Namespace):
    parse_mode(o.mode, o.groupsize)
    if o.mode == "none":
        raise ValueError("mode none changes nothing; known are " + ", ".join(MODES))
    o.mode, _, group = o.mode.partition(".g")
    o.groupsize = int(group) if group else o.groupsize
    for name, low in (("calibration_limit", 1), ("calibration_seq_length", 0), ("blocksize", 1), ("seed", 0)):
        if getattr(o, name) < low:
            raise ValueError(f"{name} is {getattr(o, name)}; it must be {low} or more")
    if not 0 < o.percdamp < 1e6:
        raise ValueError(f"percdamp is {o.percdamp}; it must be above 0")
    if o.output and o.format == "self" and Path(o.output).suffix not in (".safetensors", ".pth"):
        raise ValueError(f"output '{o.output}' must end in .safetensors or .pth")


def main(argv: list[str] | None = None) -> int:
    o = parser().parse_args(argv)
    try:
        check(o)
        print(run(o))
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"\nerror: {str(error) or type(error).__name__}".lstrip("\n"), file=sys.stderr)
        wrong_argument = isinstance(error, ValueError) and not isinstance(error, CheckpointError)
        return 2 if wrong_argument else 1
