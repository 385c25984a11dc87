"""Several tokens a step: speculative decoding (Leviathan et al. 2023; Chen et al. 2023), exact in
distribution.

Decoding one token reads every weight once, and so does decoding five. So something cheap guesses k tokens
ahead, and the model checks all of them in one forward: it accepts a guess as often as it would have drawn it
itself, and replaces the first refused one by a draw from what is left of its own distribution. The text is
distributed as if nothing had been guessed, and with temperature 0 it is the same text.

The guesses come from a smaller model (`draft_tokens`) or from the text so far (`look_up`).
`Speculation.decode` is the loop, and takes the place of generate.py's `decode_n_tokens`; `accept` is the
mathematics; `Pace` chooses k. Rows accept different numbers of tokens: positions are per row, and what a
refused guess left in a cache is overwritten by the next step, for it stands at later positions than any query
sees.

What it is not: a tree of guesses, nor a head trained for guessing. Read generate.py first.
"""
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ranks
from generate import (PAD, Row, Steps, attended, compile_step, decode_n_tokens, generate_rows, make_room,
                      rows_for, run_prefill, symbolic)
from kernels import cpu
from kernels.cpu_block import one_call
from model import Transformer
from sampling import Choices, Sampler, Sampling, choices
from tokenizer import Tokenizer

MOST = PAD              # guesses a step: the cache has PAD slots more than the text needs
CHOICES = (1, 2, 3, 4, 6, 8)            # what `auto` chooses from, beside 0


# ---- steps: what is compiled -------------------------------------------------------------------------------

def draft(model: Transformer, tokens: Tensor, input_pos: Tensor, key_pos: Tensor) -> Tensor:
    """The draft model reads one or two tokens a row. tokens, input_pos [B, 1|2] -> logits [B, V] after the
    last."""
    B, T = tokens.shape
    last = torch.full((B, 1), T - 1, device=tokens.device)
    return model(tokens, input_pos, slots=key_pos.shape[0], logits_at=last)[:, 0]


def verify(model: Transformer, tokens: Tensor, input_pos: Tensor, key_pos: Tensor) -> Tensor:
    """The model reads its newest token and k guesses. tokens, input_pos [B, k+1] -> logits [B, k+1, V]."""
    return model(tokens, input_pos, slots=key_pos.shape[0])


class SpeculativeSteps(NamedTuple):
    draft: Callable = draft
    verify: Callable = verify


def compile_speculation(model: Transformer | None = None, draft_model: Transformer | None = None) -> SpeculativeSteps:
    """As generate.compile_steps; a model alone guesses from the text. k is a tensor's dimension, hence symbolic: one graph
    of verify serves all k, two of draft its one or two tokens, and how many guesses are accepted is data."""
    guesses = draft_model is not None or model is None
    return SpeculativeSteps(compile_step(draft) if guesses and not one_call(draft_model) else draft,
                            verify if one_call(model) else compile_step(verify))


# ---- guesses -----------------------------------------------------------------------------------------------

def draft_tokens(model: Transformer, step: Callable, history: Tensor, input_pos: Tensor, k: int,
                 sampler: Sampler, vocab_size: int, key_pos: Tensor) -> tuple[Tensor, Choices | None]:
    """k guesses [B, k] of the draft model after the tokens at input_pos [B] of history [B, L], and the
    choices [B, k, C] they were drawn from; None where drawing is taking the most likely one.

    The first forward reads two tokens: after a fully accepted block the draft has not seen the last of its
    own guesses; otherwise it writes again what stands there.
    """
    at = input_pos[:, None] + torch.arange(-1, 1, device=input_pos.device)           # [B, 2]
    tokens, seen = known_to(model, history.gather(1, at)), sampler.seen
    ids, q = [], []
    for _ in range(k):
        with cpu.one_row_matmul(model, tokens.numel()):
            logits = fit(step(model, tokens, at, key_pos), vocab_size)
        if takes_the_best(sampler):
            ids.append(ranks.agree(cpu.argmax(logits)))
        else:
            q.append(choices(logits, sampler.settings, seen))
            ids.append(sampler.draw(q[-1]))
            seen = None if seen is None else seen.scatter(1, ids[-1][:, None], True)
        tokens, at = ids[-1][:, None], at[:, -1:] + 1
    return torch.stack(ids, 1), Choices(*(torch.stack(t, 1) for t in zip(*q))) if q else None


def fit(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits [B, V'] of a draft whose vocabulary is padded otherwise -> [B, V]: no guess is outside V."""
    if logits.shape[-1] < vocab_size:
        return F.pad(logits, (0, vocab_size - logits.shape[-1]), value=-torch.inf)
    return logits[:, :vocab_size]


def known_to(draft_model: Transformer, tokens: Tensor) -> Tensor:
    """The other way round: ids that only the model's larger table has become the draft's last one."""
    return tokens.clamp(max=draft_model.args.vocab_size - 1)


def takes_the_best(sampler: Sampler) -> bool:
    """Greedy without a penalty: then ids are compared, and no distribution is needed."""
    return sampler.settings.temperature == 0 and sampler.seen is None


def look_up(history: Tensor, input_pos: Tensor, ngram: int, k: int) -> tuple[Tensor, Tensor]:
    """Guess from the text so far: find where its last tokens, up to `ngram`, stood before, and copy what
    followed.

    history [B, L] holds each row's ids up to input_pos [B]; what lies beyond is not read. The longest match
    wins, among equals the latest. A copy that reaches the text's end goes on from its own beginning, as a
    repetition would. Returns guesses [B, k] and found [B] bool: a row with no match has guesses that mean
    nothing.
    """
    B, L = history.shape
    slots = torch.arange(L, device=history.device).expand(B, L)
    last = input_pos[:, None]                                                        # [B, 1]
    # does the text that ends at a slot agree with the end of the whole, and in how many tokens?
    match, length = slots < last, torch.zeros_like(slots)
    for back in range(ngram):
        at = (slots - back).clamp(min=0)
        same = history.gather(1, at) == history.gather(1, (last - back).clamp(min=0))
        match = match & same & (slots >= back)
        length = length + match
    best = (length * L + slots).masked_fill(length == 0, -1).amax(1, keepdim=True)   # [B, 1]
    begin = (best % L) + 1                                                           # what followed the match
    offset = torch.arange(k, device=history.device) % (last + 1 - begin).clamp(min=1)
    return history.gather(1, (begin + offset).clamp(max=L - 1)), best[:, 0] >= 0


# ---- accepting ---------------------------------------------------------------------------------------------

def accept(guesses: Tensor, found: Tensor, q: Choices | None, p: Choices, uniform: Tensor,
           vocab_size: int) -> tuple[Tensor, Choices]:
    """How many guesses stand, and what to draw the next id from (Leviathan et al. 2023, algorithm 1).

    guesses [B, k], drawn from q [B, k, C] (None: they were certain), found [B]: False refuses a row's guesses
    unseen; p [B, k+1, C] the model's own choices; uniform [B, k] in [0, 1). A guess stands with probability
    min(1, p / q). Returns accepted [B] and weights [B, C]: max(p - q, 0) at the first refused guess, p after
    the last one.
    """
    B, k = guesses.shape
    q_guess = 1.0 if q is None else probability(q, guesses)
    stands = (uniform * q_guess < probability(Choices(*(t[:, :k] for t in p)), guesses)) & found[:, None]
    accepted = stands.long().cumprod(1).sum(1)                                       # [B]
    row, first_refused = torch.arange(B, device=uniform.device), accepted.clamp(max=k - 1)
    p_next = Choices(*(t[row, accepted] for t in p))                                 # [B, C]
    if q is None:
        q_next = (p_next.ids == guesses[row, first_refused][:, None]).float()
    else:                                               # q at p's ids, by way of the whole vocabulary
        ids, probs = (t[row, first_refused] for t in q)
        q_next = probs.new_zeros(B, vocab_size).scatter_(1, ids, probs).gather(1, p_next.ids)
    refused = (accepted < k) & found
    weights = (p_next.probs - q_next * refused[:, None]).clamp(min=0)
    # p = q leaves nothing; a refusal is then rounding's, and p itself is what remains to draw from
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, p_next.probs)
    return accepted, Choices(p_next.ids, weights)


def probability(of: Choices, ids: Tensor) -> Tensor:
    """That each of the ids [B, k] is drawn from its choices [B, k, C] -> [B, k]."""
    return torch.where(of.ids == ids[..., None], of.probs, 0.0).sum(-1)


def verified(logits: Tensor, guesses: Tensor, found: Tensor, q: Tensor | None,
             sampler: Sampler) -> tuple[Tensor, Tensor]:
    """The model's logits [B, k+1, V] decide: ids [B, k+1], of which each row's first accepted [B] + 1 are its
    next."""
    B, k = guesses.shape
    if takes_the_best(sampler):
        ids = ranks.agree(cpu.argmax(logits))                                        # [B, k+1]
        stands = (ids[:, :k] == guesses) & found[:, None]
        return ids, stands.long().cumprod(1).sum(1)
    seen = sampler.seen
    if seen is not None:                                # grows within the block, guess by guess
        seen = [seen]
        for guess in guesses.unbind(1):
            seen.append(seen[-1].scatter(1, guess[:, None], True))
        seen = torch.stack(seen, 1).flatten(0, 1)                                    # [B*(k+1), V]
    p = Choices(*(t.unflatten(0, (B, k + 1)) for t in choices(logits.flatten(0, 1), sampler.settings, seen)))
    accepted, left = accept(guesses, found, q, p, ranks.agree(sampler.uniform(k)), logits.shape[-1])
    accepted = ranks.agree(accepted)
    ids = F.pad(guesses, (0, 1)).scatter(1, accepted[:, None], sampler.draw(left)[:, None])
    if sampler.seen is not None:                    # refused ids become the next one, which is seen anyway
        last = ids.gather(1, accepted[:, None])
        taken = torch.where(torch.arange(k + 1, device=ids.device) <= accepted[:, None], ids, last)
        sampler.seen.scatter_(1, taken, True)
    return ids, accepted


# ---- how many to guess -------------------------------------------------------------------------------------

class Pace:
    """Chooses k before each step. A fixed k stays; "auto" maximizes the tokens a second to be expected.

    With a the share of guesses accepted, k guesses bring (1 - a^(k+1)) / (1 - a) tokens. Their seconds are a
    line through the medians of the last steps' at each k. Where plain decoding is expected to be as fast,
    guessing rests for 16 plain steps, and if three trials then do not change that, for 32, ... 512.
    """

    def __init__(self, k: int | str):
        self.fixed = 0 if k == "auto" else int(k)
        self.most = self.fixed or max(CHOICES)
        self.seconds: dict[int, deque] = {}                     # k -> its last steps'
        self.trials = [4, 0, 1] * 3                             # ks to be timed next; 1 and 4 span the line
        self.accepted, self.tried = 1.0, 1.5                    # guesses, older ones fading
        self.rest, self.since = 16, 0                           # since: steps since the last trial

    def choose(self) -> int:
        if self.fixed:
            return self.fixed
        if self.trials:
            return self.trials.pop(0)
        best = max(CHOICES, key=self.worth)
        if self.worth(best) < 1.05 * self.worth(0):
            best = 0
        self.since += 1
        if best and self.since > 64:                            # times drift on a shared machine
            self.since, self.rest, self.trials = 0, 16, [1, 4]
            return 0
        if best == 0 and self.since > self.rest:
            self.since, self.rest, self.trials = 0, min(2 * self.rest, 512), [2, 2]
            self.accepted, self.tried = 0.1 * self.accepted, 0.1 * self.tried       # another passage of the text
            return 2
        return best

    def worth(self, k: int) -> float:
        """Tokens a second to be expected of steps with k guesses."""
        rate = min(self.accepted / self.tried, 0.99)
        return (1 - rate ** (k + 1)) / (1 - rate) / self.expected_seconds(k)

    def expected_seconds(self, k: int) -> float:
        known = {n: statistics.median(times) for n, times in self.seconds.items()}
        if k == 0:
            return known.get(0, float("inf"))
        line = {n: t for n, t in known.items() if n}
        if len(line) < 2:
            return max(line.values(), default=float("inf"))
        slope, offset = statistics.linear_regression(list(line), list(line.values()))
        return max(offset + slope * k, min(line.values()))

    def learn(self, k: int, accepted: list[int], seconds: float):
        """What a step with k guesses brought its rows."""
        if self.fixed:
            return
        self.seconds.setdefault(k, deque(maxlen=9)).append(seconds)
        for n in accepted if k else ():
            self.accepted = 0.95 * self.accepted + n
            self.tried = 0.95 * self.tried + n + (n < k)


# ---- the loop ----------------------------------------------------------------------------------------------

@dataclass
class Acceptance:
    """Counts over rows and steps, of rows that had not ended; a block is a row's guesses in one step."""
    histogram: list[int] = field(default_factory=lambda: [0] * (MOST + 1))  # [n]: blocks with n accepted
    guessed: int = 0                    # tokens
    plain: int = 0                      # a row's steps without a guess
    model_steps: int = 0                # forwards of the model, whatever the number of rows
    draft_steps: int = 0                # and of the draft

    def add(self, other: "Acceptance"):
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram)]
        for name in ("guessed", "plain", "model_steps", "draft_steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict:
        """histogram, its mean, accepted / guessed, and tokens that a step of the model brings a row."""
        verified, accepted = sum(self.histogram), sum(n * count for n, count in enumerate(self.histogram))
        used = max((n for n, count in enumerate(self.histogram) if count), default=0)
        steps = verified + self.plain
        return {"histogram": self.histogram[:used + 1], "mean": accepted / max(verified, 1),
                "rate": accepted / max(self.guessed, 1), "plain_steps": self.plain,
                "tokens_per_step": (accepted + steps) / max(steps, 1)}


def enough(key_pos: Tensor | None, model: Transformer, filled: int) -> Tensor:
    """The attended positions, made anew only where the last ones do not reach."""
    return key_pos if key_pos is not None and filled <= key_pos.shape[0] else attended(model, filled)


class Speculation:
    """How to speculate, for generate_rows: with a draft model, or without one by looking the text up.

    k: guesses a step, 1 ... 16 or "auto". ngram: the longest run of tokens to look for. The draft keeps its
    cache between calls, so that a chat's next turn runs its new tokens only. `acceptance` counts the last
    call.
    """

    def __init__(self, draft: Transformer | None = None, k: int | str = 4, ngram: int = 3,
                 steps: SpeculativeSteps = SpeculativeSteps()):
        if k != "auto" and not 1 <= int(k) <= MOST:
            raise ValueError(f"speculate_k is {k}; it must be auto or 1 ... {MOST}, the tokens for which the "
                             "cache keeps room behind the text")
        if ngram < 1:
            raise ValueError(f"lookup_ngram is {ngram}; it must be 1 or more")
        self.draft, self.k, self.ngram, self.steps = draft, k, ngram, steps
        self.pace, self.acceptance = Pace(k), Acceptance()
        self.rows: list[Row] = []
        self.drafted = 0                # the first positions of each row that the draft's cache holds

    def prefill(self, model: Transformer, steps: Steps, rows: list[Row], cached: int):
        """The draft reads the prompts too. The first `cached` ids are the last call's too."""
        self.acceptance = Acceptance()
        before = self.rows[0].prompt + self.rows[0].ids if len(self.rows) == len(rows) == 1 else []
        held = before[:min(cached, self.drafted)]
        same = next((i for i, (a, b) in enumerate(zip(held, rows[0].prompt)) if a != b), len(held))
        self.rows, self.drafted = rows, min(same, len(rows[0].prompt) - 1)
        if self.draft is not None:
            make_room(self.draft, len(rows), max(len(row.prompt) + row.limit for row in rows))
            self.catch_up(steps)
            self.drafted = min(len(row.prompt) for row in rows)

    def catch_up(self, steps: Steps):
        """Let the draft read what it has not: the prompts, or tokens that were decoded without it."""
        last = self.draft.args.vocab_size - 1
        texts = [[min(i, last) for i in row.prompt + row.ids] for row in self.rows]     # as in known_to
        run_prefill(self.draft, steps, texts, min(self.drafted, max(map(len, texts)) - 1))

    def decode(self, model: Transformer, steps: Steps, tokens: Tensor, input_pos: Tensor,
               sampler: Sampler) -> Iterator[Tensor]:
        """Feed tokens [B] that stand at input_pos [B], and yield each step's ids [B, k+1] on the host, -1
        after a row's last. The caller takes them into the rows before it asks again, and stops when all have
        ended."""
        rows, device = self.rows, tokens.device
        history = self.history(tokens, input_pos)                                    # [B, L]
        end = torch.tensor([len(row.prompt) + row.limit - 1 for row in rows], device=device)
        chosen, key_pos, draft_key_pos, left_behind = self.choose(device), None, None, False
        guesses, found = self.guess_from_text(history, input_pos, chosen)
        hopeful = bool(found.any())
        while True:
            began = time.perf_counter()
            running = [r for r, row in enumerate(rows) if not row.finish_reason]
            filled = max(len(row.prompt) + len(row.ids) for row in rows)
            k = chosen if hopeful else 0
            key_pos = enough(key_pos, model, filled + k)
            if k == 0:
                if self.draft is None:
                    sampler.uniform(self.pace.most)     # a row's noise must not depend on other rows' finds
                with cpu.one_row_matmul(model, len(rows)):
                    logits = steps.decode(model, tokens[:, None], input_pos[:, None], key_pos)
                ids, accepted = sampler(logits)[:, None], torch.zeros_like(input_pos)
            else:
                q = None
                if self.draft is not None:
                    if left_behind:
                        self.catch_up(steps)
                        began = time.perf_counter()     # a step among others would not have had this to do
                    self.drafted = min(len(rows[r].prompt) + len(rows[r].ids) for r in running) - 2
                    draft_key_pos = enough(draft_key_pos, self.draft, filled + k)
                    guesses, q = draft_tokens(self.draft, self.steps.draft, history, input_pos, k, sampler,
                                              model.args.vocab_size, draft_key_pos)
                block = torch.cat([tokens[:, None], guesses], 1)              # [B, k+1]
                at = input_pos[:, None] + torch.arange(k + 1, device=device)
                logits = self.steps.verify(model, symbolic(block, 1), symbolic(at, 1), key_pos)
                ids, accepted = verified(logits, guesses, found, q, sampler)
            left_behind = k == 0
            column = torch.arange(k + 1, device=device)
            history.scatter_(1, input_pos[:, None] + 1 + column, ids)
            tokens = ids.gather(1, accepted[:, None])[:, 0]
            input_pos = torch.minimum(input_pos + 1 + accepted, end)  # one that has ended waits for others
            chosen = self.choose(device)
            had, (guesses, found) = found, self.guess_from_text(history, input_pos, chosen)
            ids = ids.masked_fill(column > accepted[:, None], -1)
            host = torch.cat([ids, had[:, None], found[:, None]], 1).cpu()     # the one wait for the device
            hopeful = bool(host[:, -1].any())
            self.count(k, host[running], time.perf_counter() - began)
            yield host[:, :k + 1]

    def choose(self, device: torch.device) -> int:
        """k; where it follows the clock, rank 0's."""
        k = self.pace.choose()
        return k if self.pace.fixed else int(ranks.agree(torch.tensor(k, device=device)))

    def history(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Ids [B, L] by position, with room for the longest text and a block behind it."""
        width = max(len(row.prompt) + row.limit for row in self.rows) + MOST + 1
        text = [row.prompt + [0] * (width - len(row.prompt)) for row in self.rows]
        return torch.tensor(text, device=tokens.device).scatter_(1, input_pos[:, None], tokens[:, None])

    def guess_from_text(self, history: Tensor, input_pos: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
        """look_up's guesses and finds; a draft model always finds something. k = 0: nobody wants them."""
        if self.draft is None and k:
            return look_up(history, input_pos, self.ngram, k)
        return None, torch.full_like(input_pos, k > 0, dtype=torch.bool)

    def count(self, k: int, host: Tensor, seconds: float):
        """Keep account of a step with k guesses: of its rows' ids, whether they had guesses, whether they
        will."""
        accepted = []
        self.acceptance.model_steps += 1
        self.acceptance.draft_steps += k if self.draft is not None else 0
        for *ids, had, _ in host.tolist():
            if k and had:
                accepted.append(sum(i >= 0 for i in ids) - 1)
                self.acceptance.histogram[accepted[-1]] += 1
                self.acceptance.guessed += k
            else:
                self.acceptance.plain += 1
        self.pace.learn(k, accepted, seconds)


# ---- before and after a run --------------------------------------------------------------------------------

def check_same_tokens(tokenizer: Tokenizer, draft_tokenizer: Tokenizer):
    """ValueError unless ids mean the same to both models; special tokens at the end may be missing from
    one."""
    ours, theirs = tokenizer.vocab_size, draft_tokenizer.vocab_size
    larger = tokenizer if ours > theirs else draft_tokenizer
    for i in range(min(ours, theirs)):
        a, b = tokenizer.token_bytes(i, False), draft_tokenizer.token_bytes(i, False)
        if a != b:
            raise ValueError(f"token {i} is {a!r} to the model and {b!r} to the draft; a draft must have the "
                             "model's tokenizer")
    beyond = range(min(ours, theirs), larger.vocab_size)
    if any(i not in larger.added_by_id and larger.token_bytes(i) for i in beyond):
        raise ValueError(f"the model has {ours} tokens and the draft {theirs}; a draft must have the model's "
                         "tokenizer")


def warm_up(speculation: Speculation, model: Transformer, steps: Steps, tokenizer: Tokenizer, rows: int,
            length: int):
    """Compile draft and verify by running them, with the caches that rows of `length` tokens will need."""
    if speculation.draft is not None:
        make_room(speculation.draft, rows, length)
    speculation.pace = Pace(MOST if speculation.k == "auto" else speculation.k)
    prompts = [[0] * PAD] * rows                                # repeats itself: look_up finds something
    for _ in range(2):                                          # the second time, CUDA records its graphs
        several = rows_for(model, tokenizer, prompts, 8, ignore_eos=True)
        for _ in generate_rows(model, several, Sampling(temperature=0), steps=steps, speculation=speculation):
            pass
    speculation.pace, speculation.rows = Pace(speculation.k), []


@torch.no_grad()
def plain_step_seconds(model: Transformer, steps: Steps, rows: list[Row], settings: Sampling) -> float:
    """What a step without speculation takes here and now: a few are run after the rows' texts, and nobody
    reads their ids."""
    device = model.norm.weight.device
    texts = [row.prompt + row.ids for row in rows]
    sampler = Sampler(settings, texts, model.args.vocab_size, device)
    tokens = torch.tensor([text[-1] for text in texts], device=device)
    input_pos = torch.tensor([len(text) - 1 for text in texts], device=device)
    interval, times = 1 if device.type == "cpu" or steps.blocks else PAD // 2, []
    decoder = decode_n_tokens(model, steps, tokens, input_pos, max(map(len, texts)), PAD, sampler)
    for _ in range(8 if device.type == "cpu" else 2):
        began = time.perf_counter()
        ids = torch.cat([next(decoder).view(len(rows), -1) for _ in range(interval)], 1)        # a block may come at a time
        ids.tolist()
        times.append((time.perf_counter() - began) / ids.shape[1])
    return statistics.median(times[1:])
