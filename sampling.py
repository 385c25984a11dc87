"""How the next id is drawn: the filters, in the order and with the meaning transformers gives them, and the draw.

What it is: `Sampling`, the settings; `choices`, logits to the ids that may be drawn and their probabilities; `Sampler`,
one id per row without waiting for the device. What it is not: which ids end a text; that is `Row`, in generate.py,
which is what to read next. speculate.py draws from the same `choices`.
"""
import math
import os
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import ranks
from kernels import cpu
from model import Transformer

TIES = 32               # ids that may share the k-th place of top_k and stay


@dataclass
class Sampling:
    """How an id is drawn. The filters apply in this order and mean what transformers means by the same
    names."""
    repetition_penalty: float = 1.0     # 1: off
    temperature: float = 0.8            # 0: the most likely id, the lowest one on ties
    top_k: int = 200                    # 0: off; ties with the k-th stay
    top_p: float = 1.0                  # keep the most likely ids until their mass reaches it
    min_p: float = 0.0                  # drop what is less likely than min_p times the most likely
    seed: int = 0

    @classmethod
    def of(cls, model: Transformer, **given) -> "Sampling":
        """What is given (not None), else what the model's generation_config.json says, else the defaults
        above."""
        config = dict(getattr(model, "generation_config", {}))
        if config.get("do_sample") is True:                 # the file's silence means transformers' defaults
            config = {"temperature": 1.0, "top_k": 50, **config}
        elif config.get("do_sample") is False:
            config["temperature"] = 0.0
        names = [name for name in cls.__dataclass_fields__ if name != "seed"]
        chosen = {name: config[name] for name in names if config.get(name) is not None}
        chosen |= {name: value for name, value in given.items() if value is not None}
        chosen.setdefault("seed", int.from_bytes(os.urandom(4), "little"))
        return cls(**chosen).check()

    def check(self) -> "Sampling":
        rules = [("temperature", self.temperature >= 0, "be 0 (greedy) or more"),
                 ("top_k", self.top_k >= 0, "be 0 (off) or more"),
                 ("top_p", 0 <= self.top_p <= 1, "lie in 0 ... 1"),
                 ("min_p", 0 <= self.min_p <= 1, "lie in 0 ... 1"),
                 ("repetition_penalty", self.repetition_penalty > 0, "be above 0")]
        for name, holds, rule in rules:
            if not (holds and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}; it must {rule}")
        return self


class Choices(NamedTuple):
    """The ids [..., C] that may be drawn and their probabilities [..., C]: all of a vocabulary, or its likely part."""
    ids: Tensor
    probs: Tensor


def choices(logits: Tensor, s: Sampling, seen: Tensor | None = None) -> Choices:
    """Logits [B, V] float32 -> what an id is drawn from. seen [B, V] bool: ids in prompt or output.

    With top_k only its ids, and room for ties with the last, are looked at further, and have noise drawn for
    them: on a vocabulary of 128 k that takes a quarter of the time. On a CPU a kernel does all of it: kernels/draw.h.
    """
    V = logits.shape[-1]
    if s.repetition_penalty != 1.0:
        penalized = torch.where(logits < 0, logits * s.repetition_penalty, logits / s.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if s.temperature == 0:
        ids = logits.argmax(-1, keepdim=True)
        return Choices(ids, torch.ones_like(ids, dtype=logits.dtype))
    k = min(s.top_k or V, V)
    if k < V or s.top_p < 1.0:
        logits, ids = largest(logits, min(k + TIES, V))                              # the likeliest first
        logits = logits.masked_fill(logits < logits[:, k - 1:k], -math.inf)
    else:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    probs = (logits / max(s.temperature, 1e-5)).softmax(-1)
    if s.top_p < 1.0:
        beyond = probs.cumsum(-1) - probs >= s.top_p
        beyond[:, 0] = False                                                         # the first always stays
        probs = probs.masked_fill(beyond, 0.0)
    if s.min_p > 0:
        probs = probs.masked_fill(probs < s.min_p * probs.amax(-1, keepdim=True), 0.0)
    return Choices(ids, probs / probs.sum(-1, keepdim=True))


def largest(x: Tensor, n: int, block: int = 32) -> tuple[Tensor, Tensor]:
    """x.topk(n) of x [B, V]; where V is large in two steps, twice as fast: the n largest values lie in the n blocks
    with the largest maxima."""
    if x.shape[1] < 4 * n * block:
        return x.topk(n)
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=-math.inf).unflatten(1, (-1, block))
    chosen = blocks.amax(-1).topk(n, sorted=False).indices                           # [B, n]
    values, at = blocks.gather(1, chosen[..., None].expand(-1, -1, block)).flatten(1).topk(n)
    return values, chosen.gather(1, at // block) * block + at % block


class Sampler:
    """Draws one id per row. Each row has its own generator, so its text does not depend on its neighbours."""

    def __init__(self, settings: Sampling, prompts: list[list[int]], vocab_size: int, device: torch.device):
        self.settings, self.noises = settings, min(settings.top_k + TIES, vocab_size)
        self.known = settings.temperature == 0 or 0 < settings.top_k < vocab_size          # to kernels/draw.h
        self.generators = [torch.Generator(device).manual_seed((settings.seed * 65537 + row) % 2 ** 63)
                           for row in range(len(prompts))]
        self.seen = None
        if settings.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, device=device)] = True

    def copy(self) -> "Sampler":
        """One that will draw the same, on its own."""
        twin = copy(self)
        twin.generators = [torch.Generator(g.device) for g in self.generators]
        twin.seen = None if self.seen is None else self.seen.clone()
        return twin.load(self)

    def load(self, other: "Sampler") -> "Sampler":
        """Go on as another one of the same settings would; tensors and generators stay where they are."""
        for mine, its in zip(self.generators, other.generators):
            mine.set_state(its.get_state())
        if self.seen is not None:
            self.seen.copy_(other.seen)
        return self

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> ids [B], without a host sync: argmax of p / Exp(1) draws from p (the Gumbel-max
        trick)."""
        if self.known and cpu.draws(logits):
            return ranks.agree(torch.ops.cpu_step.draw(logits, *self.orders()))
        if self.settings.temperature == 0 and self.seen is None:
            return ranks.agree(logits.argmax(-1))
        ids = self.draw(choices(logits, self.settings, self.seen))
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        return ids

    def orders(self) -> tuple:
        """What a kernel that draws is told beside the logits: noise for one step, ids seen, settings."""
        s = self.settings
        noise = None if s.temperature == 0 else self.uniform(self.noises)
        return noise, self.seen, s.top_k, s.temperature, s.top_p, s.min_p, s.repetition_penalty

    def draw(self, among: Choices) -> Tensor:
        """One of each row's ids [B, C], each as likely as its share of the row's weights -> [B]."""
        weights = among.probs
        if weights.shape[1] > 1:
            exponential = self.uniform(weights.shape[1]).log_().neg_()     # exponential_ takes 6 x as long
            weights = weights / exponential
        return ranks.agree(among.ids.gather(1, weights.argmax(-1, keepdim=True))[:, 0])

    def uniform(self, n: int) -> Tensor:
        """Numbers [B, n] in [0, 1), so that no log of theirs is 0; each row's from its own generator."""
        rows = [torch.rand(1, n, generator=generator, device=generator.device) for generator in self.generators]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
