"""Text from a checkpoint: the compiled steps, and the loops over them. `python generate.py --help`
runs it.

A token's way: `load_model` reads a checkpoint; `generate_rows` runs `prefill` over the prompts in chunks,
then `decode` once a token; `Sampler` picks the ids; `Row` turns them into text and knows when to stop.
Everything is built from the two steps, which are all that is ever compiled (`compile_steps` says how and
why). `stream` and `generate` are the same for Python callers.

What it is not: a server or a scheduler; one batch runs at a time. Flags, chat and figures are in cli.py.
Read model.py first; sampling.py, quantize.py and tp.py after.
"""
import itertools
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # said when torch is imported; nothing here needs it

import torch
import torch.nn as nn
from torch import Tensor

import ranks
import tp
from checkpoint import (end_ids, free_memory, load_checkpoint, pick_dtype, read_generation_config, resolve,
                        weight_bytes)
from experts import pack_part
from kernels.cpu import NarrowRows, available, one_row_matmul, unpacked
from kernels.cpu_block import draws, one_call
from model import Transformer
from sampling import Sampler, Sampling
from tokenizer import Tokenizer, load_tokenizer

BUNDLED = Path(__file__).resolve().parent / "checkpoints" / "stories"
CHUNK = 512        # prompt tokens per prefill call, 4 x on a GPU: memory grows with CHUNK * S, not with the prompt's square
PAD = 16           # compiled prefill sees lengths rounded up to this
REPLAYED = "cuda"  # where blocks of steps are
BUCKET = 256       # decode attends to 256, 512, 1024, ... slots: cost follows what is used, not the capacity


# ---- steps: what is compiled -------------------------------------------------------------------------------

def prefill(model: Transformer, tokens: Tensor, input_pos: Tensor, last: Tensor, key_pos: Tensor) -> Tensor:
    """A chunk of the prompts. tokens, input_pos [B, T]; last [B]: the column whose logits [B, V] are
    wanted."""
    return model(tokens, input_pos, slots=key_pos.shape[0], logits_at=last[:, None])[:, 0]


def decode(model: Transformer, tokens: Tensor, input_pos: Tensor, key_pos: Tensor) -> Tensor:
    """One token a row. tokens, input_pos [B, 1] -> logits [B, V]. key_pos [S]: only its length matters."""
    return model(tokens, input_pos, slots=key_pos.shape[0])[:, 0]


NUMBERS, COUNT = weakref.WeakKeyDictionary(), itertools.count(1)                  # of models that run compiled


class Steps(NamedTuple):
    prefill: Callable = prefill
    decode: Callable = decode
    pad: int = 1                        # prefill lengths are rounded up to a multiple of it
    blocks: Callable | None = None      # decode_n_tokens by the block, on a GPU: graphs.py


EAGER = Steps()


def compile_steps(compile_decode: bool = True, compile_prefill: bool = False, model: Transformer | None = None) -> Steps:
    """The one place that decides what is compiled. model: what it is for, if there is but one.

    decode: it is overhead that makes it slow. On a CPU most models' steps are one call already, model.step, and
    prompts too: there is nothing to compile. One graph serves all attended lengths and sampling settings: the length is a
    tensor's dimension, which torch.compile takes as a symbol (an int would be a constant), and sampling stays
    outside. Another batch size or a larger cache is another graph. On CUDA several steps are replayed as one
    CUDA graph (GPU_BLOCKS=0: each on its own). prefill: on request; it is bound by arithmetic, and compiling
    takes longer than most prompts. Its lengths are rounded up to PAD and symbolic too.
    """
    compile_decode = compile_decode and not one_call(model)
    compile_prefill = compile_prefill and not one_call(model, PAD)
    if compile_decode or compile_prefill:       # every batch and cache size is a graph of its own; past the limit a step would fail
        torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    blocks = compile_decode and torch.cuda.is_available() and ranks.size() == 1 and os.environ.get("GPU_BLOCKS") != "0"
    return Steps(torch.compile(prefill, fullgraph=True) if compile_prefill else prefill,
                 compile_step(decode) if compile_decode else decode, PAD if compile_prefill else 1,
                 partial(import_module("graphs").decode_blocks, compile_step(decode, graphs=False)) if blocks else None)


def compile_step(step: Callable, graphs: bool = True) -> Callable:
    """A step of few tokens, in which calling the loops may cost as much as running them. On CUDA a graph replays
    them, unless the caller records one. Elsewhere C++ calls them, which saves a fifth of a small model's time and
    a twentieth of a large one's. (It cannot call collectives.)"""
    def numbered(number: str, model: Transformer, *rest: Tensor) -> Tensor:
        assert number                   # looked at, and so a condition of the graph
        with NarrowRows() if unpacked(model) else nullcontext():
            return step(model, *rest)

    def run(model: Transformer, *rest: Tensor) -> Tensor:
        return compiled(NUMBERS.setdefault(model, str(next(COUNT))), model, *rest)
    kind = {"triton.cudagraphs": graphs, "coordinate_descent_tuning": True} if torch.cuda.is_available() else \
        {"cpp_wrapper": ranks.size() == 1 and not torch.accelerator.is_available(),
         "cpp.vec_isa_ok": True if available() else None,             # our kernels were built for this processor
         "cpp.enable_floating_point_contract_flag": "off -O2"}        # the last flag: same loops, built in 2/3 of the time
    compiled = torch.compile(numbered, fullgraph=True, options=kind | {"size_asserts": False, "guard_filter_fn": conditions})
    return run


def conditions(guards: list) -> list[bool]:
    """Of what was so when a graph was compiled: what to look at before every call. Not a model's modules, whose 4,000 facts
    take 0.6 ms: it keeps its number, and its modules; nor globals. But ropes change, and caches grow, all with the first one's."""
    return [g.guard_type == "TENSOR_MATCH" if "cache" in g.name and "'0'" in g.name else
            "ropes'" in g.name or not (".step." in g.name or "_modules" in g.name or g.name.startswith("G[")) for g in guards]


def bucket(n: int) -> int:
    """The slots attended to when n are filled, or allocated for n: a power of two, at least BUCKET."""
    return max(BUCKET, 1 << (n - 1).bit_length())


def make_room(model: Transformer, rows: int, length: int) -> bool:
    """Set up the cache for rows of `length` tokens. It grows by doubling, for a new size means a new
    compiled graph. Raises ValueError where it would not fit, with the bytes that decide it."""
    a, device, slots = model.layers[0].attention, model.norm.weight.device, bucket(length + PAD)
    if rows > model.max_batch_size or slots > model.cache_slots:
        per_slot = 2 * len(model.layers) * a.n_kv_heads * a.head_dim * model.norm.weight.itemsize
        need, free = per_slot * max(rows, model.max_batch_size) * slots, free_memory(device)
        if free is not None and need > free:
            raise ValueError(f"a cache for {rows} rows of {length} tokens needs {need / 1e9:.2f} GB beside the "
                             f"weights' {weight_bytes(model) / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; "
                             f"{free // (2 * per_slot * rows)} tokens a row would fit")
    return model.setup_caches(rows, length, slots)


def symbolic(tensor: Tensor, dim: int) -> Tensor:
    """Mark a dimension as varying, so that another length meets the same compiled graph. Where nothing is
    compiled the compiler is not loaded for it: that takes two seconds."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


def attended(model: Transformer, n: int) -> Tensor:
    """The positions of the slots that a step looks at when n are filled."""
    slots = min(bucket(n), model.cache_slots)
    return symbolic(torch.arange(slots, device=model.norm.weight.device), 0)


# ---- loops -------------------------------------------------------------------------------------------------

def run_prefill(model: Transformer, steps: Steps, prompts: list[list[int]], start: int = 0) -> Tensor:
    """Put prompts of any lengths into the cache, in chunks, and return the logits [B, V] after each row's
    last token.

    Positions before `start` are already there. Shorter rows are padded to the right, where later tokens
    overwrite.
    """
    device = model.norm.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest, result = max(map(len, prompts)), None
    # not more on a CPU, or where attention is written out and keeps all scores
    chunk = CHUNK * (1 if device.type == "cpu" or model.args.attention_softcap or model.args.attention_sinks else 4)
    for begin in range(start, longest, chunk):
        end = min(begin + chunk, longest)
        width = -(-(end - begin) // steps.pad) * steps.pad
        padded = [p[begin:end] + [0] * (width - len(p[begin:end])) for p in prompts]
        tokens = torch.tensor(padded, device=device)                                  # [B, T]
        input_pos = torch.arange(begin, begin + width, device=device).expand(tokens.shape)
        if width > 1 and steps.pad > 1:
            tokens, input_pos = symbolic(tokens, 1), symbolic(input_pos.contiguous(), 1)
        last = (lengths - 1 - begin).clamp(0, width - 1)                             # [B]
        logits = steps.prefill(model, tokens, input_pos, last, attended(model, begin + width))
        ends_here = ((lengths > begin) & (lengths <= end))[:, None]
        result = logits if result is None else torch.where(ends_here, logits, result)
    return result


def decode_n_tokens(model: Transformer, steps: Steps, tokens: Tensor, input_pos: Tensor, filled: int, n: int,
                    sampler: Sampler, ends: set[int] = frozenset()) -> Iterator[Tensor]:
    """Feed tokens [B] that stand at input_pos [B] and yield the next ones, n times; nothing here waits for
    the device.

    filled: slots that hold tokens after the first step, for the bucket. Lazy: a step runs when its ids are
    asked for. On a GPU compiled steps come as blocks, ids [B, n], -1 behind one of `ends`.
    """
    if steps.blocks and tokens.device.type == REPLAYED:
        yield from steps.blocks(model, steps, tokens, input_pos, filled, n, sampler, ends)
        return
    key_pos, first = attended(model, filled), input_pos[:, None]
    for i in range(n):
        if filled + i > key_pos.shape[0]:
            key_pos = attended(model, filled + i)
        if steps.decode is decode and draws(model, tokens, sampler):
            tokens = model.step.next(tokens, input_pos, i, key_pos.shape[0], sampler)
        else:
            with one_row_matmul(model, len(tokens)):
                tokens = sampler(steps.decode(model, tokens[:, None], first + i, key_pos))
        yield tokens


class Row:
    """One prompt and what became of it: ids, text, and why it ended ("stop", "length", or "" while it
    runs)."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], limit: int, ends: set[int] = frozenset(),
                 stop: list[str] = (), chat: bool = False):
        self.prompt, self.limit, self.ends, self.stop = prompt, limit, ends, [s for s in stop if s]
        self.detokenizer = tokenizer.detokenizer([] if chat else prompt)
        self.ids: list[int] = []        # the end token included
        self.text = ""                  # what has been handed out
        self.held = ""                  # decoded, but it may turn out to begin a stop string
        self.finish_reason = ""

    def take(self, token: int) -> str:
        """Append an id and return the text that is now certain."""
        self.ids.append(token)
        if token in self.ends:
            return self.finish("stop")
        self.held += self.detokenizer.push(token)
        cut = min((at for at in (self.held.find(s) for s in self.stop) if at >= 0), default=-1)
        if cut >= 0:
            self.held, self.finish_reason = self.held[:cut], "stop"
            return self.hand_out(len(self.held))
        if len(self.ids) >= self.limit:
            return self.finish("length")
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        return self.hand_out(len(self.held) - keep)

    def finish(self, reason: str) -> str:
        """No more ids: hand out what was held back, unless the flushed tail completes a stop string."""
        self.held, self.finish_reason = self.held + self.detokenizer.flush(), reason
        cut = min((at for at in (self.held.find(s) for s in self.stop) if at >= 0), default=len(self.held))
        if cut < len(self.held):
            self.finish_reason = "stop"
        return self.hand_out(cut)

    def hand_out(self, n: int) -> str:
        piece, self.held = self.held[:n], self.held[n:]
        self.text += piece
        return piece


@dataclass
class Figures:
    """Times in seconds and counts of one call of generate_rows; compilation and warm-up are not among
    them."""
    prompt_tokens: int = 0              # of all rows, without what the cache already held
    new_tokens: int = 0                 # of all rows, end tokens included, nothing after them
    prefill_s: float = 0.0
    ttft_s: float = 0.0                 # from the call to the first ids on the host
    decode_s: float = 0.0               # for decode_tokens: every token but the first of each row
    decode_tokens: int = 0


@torch.no_grad()
def generate_rows(model: Transformer, rows: list[Row], settings: Sampling, *, steps: Steps = EAGER,
                  cached: int = 0, figures: Figures | None = None,
                  speculation=None) -> Iterator[tuple[int, str]]:
    """Run rows to their ends as one batch and yield (row, piece of text). `cached`: leading positions to
    reuse. `speculation`: a speculate.Speculation, which then decodes, several tokens a step.

    The host asks for ids once a step on a CPU and once in 8 steps elsewhere, so that the device hardly
    waits for it; what was computed past the last row's end is thrown away.
    """
    figures = Figures() if figures is None else figures
    prompts = [row.prompt for row in rows]
    device = model.norm.weight.device
    limit, longest = max(row.limit for row in rows), max(map(len, prompts))
    if limit == 0:
        for row in rows:
            row.finish_reason = "length"
        return
    make_room(model, len(rows), longest + limit)
    began = time.perf_counter()
    sampler = Sampler(settings, prompts, model.args.vocab_size, device)
    logits = run_prefill(model, steps, prompts, cached)
    if speculation:
        speculation.prefill(model, steps, rows, cached)
    logits[0, 0].item()                                                         # wait: prefill is timed alone
    figures.prefill_s = time.perf_counter() - began
    figures.prompt_tokens = sum(len(p) - cached for p in prompts)
    tokens = sampler(logits)
    positions = torch.tensor([len(p) for p in prompts], device=device)
    if speculation:
        decoder, interval = speculation.decode(model, steps, tokens, positions, sampler), 1
    else:
        decoder = decode_n_tokens(model, steps, tokens, positions, longest + 1, limit - 1, sampler,
                                  set.intersection(*(set(row.ends) for row in rows)))
        interval = 1 if device.type == "cpu" or steps.blocks else 8
    block = [tokens]
    while block:
        by_row = torch.cat([ids.view(len(rows), -1) for ids in block], 1).tolist()  # the one wait for the device
        elapsed, before = time.perf_counter() - began, figures.new_tokens
        for ids in zip(*by_row):                              # a column; -1 where a row's block is shorter
            running = [r for r, row in enumerate(rows) if not row.finish_reason and ids[r] >= 0]
            figures.new_tokens += len(running)
            for r in running:
                yield r, rows[r].take(ids[r])
        if before == 0:
            figures.ttft_s = elapsed
        else:
            figures.decode_s += elapsed
            figures.decode_tokens += figures.new_tokens - before
        if all(row.finish_reason for row in rows):
            return
        began = time.perf_counter()                                            # the caller's time is not ours
        block = [ids for _, ids in zip(range(interval), decoder)]


def rows_for(model: Transformer, tokenizer: Tokenizer, prompts: list, max_new_tokens: int, stop=(),
             ignore_eos: bool = False, chat: bool = False) -> list[Row]:
    """Rows for prompts given as text or as ids, checked against the model's limit before any work starts."""
    ends = set() if ignore_eos else model.end_ids | tokenizer.eos_ids
    if chat and not ignore_eos:
        ends |= tokenizer.turn_end_ids()
    stop = [stop] if isinstance(stop, str) else list(stop)
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt is empty and this model has no token to begin with; give some text")
        if not all(0 <= i < model.args.vocab_size for i in ids):
            raise ValueError(f"the prompt has the id {max(ids)}, but the model has {model.args.vocab_size} "
                             "tokens; the tokenizer does not belong to this model")
        check_length(len(ids), max_new_tokens, model.limit)
        rows.append(Row(tokenizer, ids, max_new_tokens, ends, stop, chat))
    return rows


def check_length(prompt: int, new: int, limit: int):
    if new < 0:
        raise ValueError(f"max_new_tokens is {new}; it must be 0 or more")
    if prompt + new > limit:
        raise ValueError(f"{prompt} prompt tokens and {new} new ones make {prompt + new}, over the limit of "
                         f"{limit}; shorten one of them, or raise --max_seq_length if the model allows it")


# ---- for Python callers ------------------------------------------------------------------------------------

def load_model(path: str | Path = BUNDLED, device: str = "cpu", dtype: str | torch.dtype = "auto",
               pack: Callable[[Transformer, nn.Module], None] = pack_part, **options) -> tuple[Transformer, Tokenizer]:
    """A checkpoint (folder, file or hub id) as a model ready to generate, and its tokenizer.

    The model carries what belongs to the checkpoint and not to the mathematics: `end_ids`,
    `generation_config`, and `limit`, the most tokens a row may hold. Raises ValueError or OSError with one
    sentence. pack: called with each block as soon as its weights are there, and with the model when all are.
    """
    path = resolve(str(path))
    device = pick_device(str(device))
    dtype = pick_dtype(dtype, device, path)
    tokenizer = load_tokenizer(path)
    several = ranks.size() > 1
    model = load_checkpoint(path, device=device, dtype=dtype, cut=tp.cut if several else None, ready=pack, **options)
    if several:
        tp.connect(model)
    model.end_ids, model.generation_config = set(end_ids(path)), read_generation_config(path)
    model.limit = model.args.max_position
    return model, tokenizer


def stream(model: Transformer, tokenizer: Tokenizer, prompt: str | list[int], *, max_new_tokens: int = 256,
           stop=(), ignore_eos: bool = False, steps: Steps = EAGER, speculation=None,
           **sampling) -> Iterator[str]:
    """Yield the text that follows a prompt, piece by piece, as it is computed. sampling: the fields of
    `Sampling`."""
    rows = rows_for(model, tokenizer, [prompt], max_new_tokens, stop, ignore_eos)
    for _, piece in generate_rows(model, rows, Sampling.of(model, **sampling), steps=steps,
                                  speculation=speculation):
        if piece:
            yield piece


def generate(model: Transformer, tokenizer: Tokenizer, prompts: list, *, max_new_tokens: int = 256, stop=(),
             ignore_eos: bool = False, steps: Steps = EAGER, figures: Figures | None = None,
             speculation=None, **sampling) -> list[Row]:
    """Run prompts of any lengths as one batch; each row comes back with its ids, text and finish_reason."""
    rows = rows_for(model, tokenizer, prompts, max_new_tokens, stop, ignore_eos)
    if rows:
        for _ in generate_rows(model, rows, Sampling.of(model, **sampling), steps=steps, figures=figures,
                               speculation=speculation):
            pass
    return rows


def pick_device(name: str) -> torch.device:
    """auto: the accelerator if there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:          # kernels and graphs go to the current one
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device '{name}' is not available here; try --device cpu") from None
    return device


if __name__ == "__main__":      # cli.py stands above this file: importing it is what an entry script does
    from cli import main
    sys.exit(main())
