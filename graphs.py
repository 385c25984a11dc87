"""Eight decode steps as one CUDA graph: sampling inside, a stop flag on the device, and a host that reads one block late.

What it is: `decode_blocks`, which takes the place of generate.py's loop on a GPU. A step of a small or a quantized model
takes two milliseconds there, of which the launches, and the host's turn between two steps, are a good part; a graph repeats
thousands of launches for the price of one, and while the host turns one block into text the next one runs. What it is
not: compilation; what is recorded is the compiled step of generate.py. Speculation, whose steps are of different widths,
leaves graphs to the compiler. kernels/gpu_block.py, what such a step launches, is what to read next.

A replay repeats launches and nothing else. So all that changes between two blocks lies in tensors that stay where they
are, and in the generators: `State`. No GPU has run it yet; the tests replay what PyTorch's dispatcher saw on a CPU.
"""
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from experts import GATHER, Gathered, layers
from generate import Steps, bucket, decode_n_tokens, symbolic
from model import Transformer
from ranks import notice
from sampling import Sampler

BLOCK = 8                               # steps of a graph
FAILED: weakref.WeakSet[Transformer] = weakref.WeakSet()
KEPT = 8                                # recordings of a model: for settings and lengths that take turns
RECORDINGS: weakref.WeakKeyDictionary[Transformer, dict] = weakref.WeakKeyDictionary()


def decode_blocks(step: Callable, model: Transformer, steps: Steps, tokens: Tensor, input_pos: Tensor, filled: int, n: int,
                  sampler: Sampler, ends: set[int] = frozenset()) -> Iterator[Tensor]:
    """generate.decode_n_tokens by the block: yields ids [B, BLOCK], -1 behind a row's end, n columns or a few more, which are
    on the host. Where blocks cannot be recorded: single steps, as many at a time. step: the compiled `decode`, without a
    graph of its own."""
    state, block, wait_for_last = State(tokens, input_pos, sampler), None, None
    for done in range(0, n, BLOCK):
        block = recording(step, model, state, filled + done + BLOCK - 1, ends)
        if block is None:
            break
        if block.state is not state:
            block.state.load(state)
            state = block.state
        block.replay()
        wait = to_host(block.ids)
        if wait_for_last:
            yield wait_for_last()       # the host's turn, while the device runs what was just sent
        wait_for_last = wait
    if wait_for_last:
        yield wait_for_last()
    if n > 0 and block is None:
        singly = decode_n_tokens(model, steps._replace(blocks=None), state.tokens, state.positions, filled + done, n - done,
                                 state.sampler)
        while some := list(islice(singly, BLOCK)):
            yield torch.stack(some, 1)


def replayable(model: Transformer, rows: int) -> bool:
    """Whether a step asks the host nothing: a mixture must find its experts on the device. And none has failed before."""
    return model not in FAILED and all(
        rows <= GATHER and isinstance(layer.run, Gathered) and None not in (layer.run.up, layer.run.down)
        for layer in layers(model))


class State:
    """What changes from step to step: tokens and positions [B], who has ended [B], and the sampler."""

    def __init__(self, tokens: Tensor, positions: Tensor, sampler: Sampler):
        self.tokens, self.positions, self.sampler = tokens.clone(), positions.clone(), sampler.copy()
        self.ended = torch.zeros_like(tokens, dtype=torch.bool)

    def load(self, other: "State"):
        """Its values, in tensors that stay where they are."""
        for name in ("tokens", "positions", "ended"):
            getattr(self, name).copy_(getattr(other, name))
        self.sampler.load(other.sampler)


class Recording:
    """A block of steps for as many rows as `state` has, with its settings, that look at `slots` slots."""

    def __init__(self, step: Callable, model: Transformer, state: State, slots: int, ends: set[int]):
        device = state.tokens.device
        self.state = State(state.tokens, state.positions, state.sampler)
        self.key_pos = symbolic(torch.arange(slots, device=device), 0)
        self.ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
        self.ids = torch.zeros(len(state.tokens), BLOCK, dtype=torch.long, device=device)
        self.replay = record(lambda n: self.run(step, model, n), self.state.sampler.generators)

    def run(self, step: Callable, model: Transformer, n: int):
        s = self.state
        for i in range(n):
            logits = step(model, s.tokens[:, None], s.positions[:, None], self.key_pos)
            s.tokens.copy_(s.sampler(logits))
            self.ids[:, i] = torch.where(s.ended, -1, s.tokens)
            s.ended |= (s.tokens[:, None] == self.ends).any(1)
            s.positions += 1


def recording(step: Callable, model: Transformer, state: State, filled: int, ends: set[int]) -> Recording | None:
    """The recording for such a state, made where there is none; None where it cannot be. Those of a cache that was outgrown
    are dropped, and of many the one least recently used."""
    if not replayable(model, len(state.tokens)):
        return None
    kept = RECORDINGS.setdefault(model, {})
    slots, settings = min(bucket(filled), model.cache_slots), replace(state.sampler.settings, seed=0)
    caches = [cache for layer in model.layers for cache in (layer.attention.cache.k, layer.attention.cache.v)]
    at = (caches[0].shape, *(cache.data_ptr() for cache in caches))
    key = (at, step, len(state.tokens), slots, repr(settings), frozenset(ends))
    try:
        found = kept.pop(key, None) or Recording(step, model, state, slots, ends)
    except RuntimeError as error:       # what a driver, or an operator that asks the device, may raise
        FAILED.add(model)
        notice(f"steps are not replayed as one CUDA graph: {str(error).splitlines()[0]}")
        return None
    for old in [k for k in kept if k[0] != at] + list(kept)[:max(0, len(kept) - KEPT + 1)]:
        kept.pop(old, None)
    kept[key] = found
    return found


def record(run: Callable[[int], None], generators: list[torch.Generator]) -> Callable:
    """What repeats the launches of run(BLOCK). A step runs for real before, since to compile and to tune cannot be
    recorded."""
    before, (pool, side) = torch.cuda.current_stream(), shared(torch.cuda.current_device())
    side.wait_stream(before)
    with torch.cuda.stream(side):
        run(1)
    before.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph, pool=pool.id):
            run(BLOCK)
    finally:
        torch.cuda.set_stream(before)   # a recording that fails would leave its own
    return graph.replay


@cache
def shared(device: int) -> tuple:
    """Memory that all recordings share, since they run one after another and leave nothing there that is read later; kept
    when the last one goes, for libraries keep theirs in it. And a stream: each would get its own scratch memory."""
    return torch.cuda.MemPool(), torch.cuda.Stream(device)


def to_host(ids: Tensor) -> Callable[[], Tensor]:
    """Begin to copy; what is returned waits for the copy, and for nothing that was launched after it."""
    if ids.device.type == "cpu":
        copied = ids.clone()
        return lambda: copied
    copied, arrived = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True), torch.cuda.Event()
    copied.copy_(ids, non_blocking=True)
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copied
    return wait
