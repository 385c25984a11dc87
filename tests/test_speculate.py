"""Speculation: the text is the plain one's, or distributed as it is; what is counted is what happened."""
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import cli
import generate as g
import speculate as s
from generate import Figures, generate, stream
from kernels import cpu
from model import ModelArgs, Transformer
from sampling import Choices, Sampling, choices
from speculate import Pace, Speculation, accept, look_up
from test_cli import chat, folder, prefilled, run, tiny  # noqa: F401  (folder is a fixture)
from test_generate import ROOT, Scripted, random_model, spell, tokenizer  # noqa: F401  (tokenizer is a fixture)

GREEDY = {"temperature": 0}
PROMPTS = [[(7 * i + n) % 256 for i in range(n)] for n in (1, 2, 9, 23)]


def other_model(noise: float, **switches) -> Transformer:
    """A draft that agrees with random_model sometimes."""
    model = random_model(**switches)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * noise)
    return model


# ---- greedy ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 16, "auto"])
@pytest.mark.parametrize("kind", ["near", "far", "lookup"])
def test_greedy_text_is_the_plain_text(tokenizer, kind, k):
    """A wrong position, mask, or cache after a refusal: rows of different lengths that accept different numbers."""
    model, options = random_model(), dict(max_new_tokens=40, **GREEDY)
    draft = {"near": other_model(0.05), "far": other_model(1.0, n_layers=1), "lookup": None}[kind]
    plain = [row.ids for row in generate(model, tokenizer, PROMPTS, **options)]
    speculation = Speculation(draft, k)
    for prompts, expected in ((PROMPTS, plain), (PROMPTS[2:3], plain[2:3])):
        assert [row.ids for row in generate(model, tokenizer, prompts, speculation=speculation, **options)] == expected
    if kind == "near" and k != "auto":
        assert 0 < speculation.acceptance.figures()["rate"] < 1


@pytest.mark.parametrize("switches", [{"layer_windows": [5, 0]}, {"attention_softcap": 5.0}], ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_with_other_attention_and_a_penalty(tokenizer, switches, penalty):
    """A penalty that does not see the guesses before a guess."""
    model = random_model(**switches)
    options = dict(max_new_tokens=30, repetition_penalty=penalty, **GREEDY)
    plain = [row.ids for row in generate(model, tokenizer, PROMPTS, **options)]
    for draft in (other_model(0.05, **switches), None):
        rows = generate(model, tokenizer, PROMPTS, speculation=Speculation(draft, 4), **options)
        assert [row.ids for row in rows] == plain


@pytest.mark.parametrize("sampling", [GREEDY, dict(temperature=1.0, seed=1), dict(top_k=5, top_p=0.9, seed=2),
                                      dict(repetition_penalty=1.3, seed=3)], ids=str)
def test_the_model_as_its_own_draft_is_always_right(tokenizer, sampling):
    """A draft whose cache lacks the last token of a fully accepted block, or another distribution than the model's."""
    model, speculation = random_model(), Speculation(random_model(), 4)
    generate(model, tokenizer, PROMPTS, max_new_tokens=41, speculation=speculation, **sampling)
    assert speculation.acceptance.histogram[:5] == [0, 0, 0, 0, 8 * len(PROMPTS)]


def test_both_caches_hold_the_text(tokenizer):
    """A slot that was skipped or left from a refused guess: caches after the run against those of one prefill."""
    model, draft = random_model(), other_model(0.05)
    [row] = generate(model, tokenizer, [[1, 2, 3]], max_new_tokens=30, speculation=Speculation(draft, 3), **GREEDY)
    for m, certain in ((model, 1), (draft, 5)):             # the last ids were not fed yet, to the draft its last block
        fresh = random_model()
        fresh.load_state_dict(m.state_dict())
        g.make_room(fresh, 1, 40)
        text = row.prompt + row.ids
        g.run_prefill(fresh, g.EAGER, [text])
        for a, b in zip(m.layers, fresh.layers):
            n = len(text) - certain
            assert torch.allclose(a.attention.cache.k[:1, :, :n], b.attention.cache.k[:1, :, :n], atol=1e-5)


@pytest.mark.parametrize("sizes", [(300, 400), (400, 300)], ids=str)
def test_vocabularies_padded_otherwise(tokenizer, sizes):
    """A guess that the model has no logit for; a distribution of another width."""
    model, draft = random_model(vocab_size=sizes[0]), random_model(vocab_size=sizes[1])
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=20, **GREEDY)
    rows = generate(model, tokenizer, PROMPTS, max_new_tokens=20, speculation=Speculation(draft, 3), **GREEDY)
    assert [row.ids for row in rows] == [row.ids for row in plain]
    generate(model, tokenizer, PROMPTS, max_new_tokens=20, speculation=Speculation(draft, 3), top_k=0, min_p=0.01)


def test_the_bundled_pair(tokenizer):
    """The pair that the README speaks of: same text in float32, and a draft that is worth its name."""
    model, words = g.load_model(ROOT / "checkpoints/stories", dtype="float32")
    draft, its_words = g.load_model(ROOT / "checkpoints/stories-draft", dtype="float32")
    s.check_same_tokens(words, its_words)
    options = dict(max_new_tokens=100, **GREEDY)
    prompts = ["Once upon a time", "Tom had a red ball.", "One day"]
    plain = [row.ids for row in generate(model, words, prompts, **options)]
    for k in (1, 4, 8):
        speculation = Speculation(draft, k)
        assert [r.ids for r in generate(model, words, prompts, speculation=speculation, **options)] == plain
        assert speculation.acceptance.figures()["tokens_per_step"] > {1: 1.6, 4: 2.5, 8: 2.5}[k]


def test_bfloat16_differs_only_at_ties():
    """One row and several are multiplied by different kernels. Where the texts part, the two ids must be as likely
    as bfloat16 can tell: their logits within a few roundings of each other."""
    model, words = g.load_model(ROOT / "checkpoints/stories", dtype="bfloat16")
    draft, _ = g.load_model(ROOT / "checkpoints/stories-draft", dtype="bfloat16")
    prompts = ["Once upon a time", "Tom had a red ball.", "One day", "The cat and the dog", "Lily was sad."]
    for prompt in prompts:
        plain, other = (generate(model, words, [prompt], max_new_tokens=80, speculation=x, **GREEDY)[0]
                        for x in (None, Speculation(draft, 4)))
        at = next((i for i, (a, b) in enumerate(zip(plain.ids, other.ids)) if a != b), None)
        if at is not None:
            model.drop_caches()
            logits = model(torch.tensor([plain.prompt + plain.ids[:at]]))[0, -1]
            assert abs(logits[plain.ids[at]] - logits[other.ids[at]]) < 0.03 * logits.abs().max()


@pytest.mark.parametrize("k", [1, 4, 8])
def test_bfloat16_texts_are_equal_too(k):
    """A kernel that adds up in another order for several rows than for one: one token in 75 was another."""
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    model, tokenizer = g.load_model(dtype="bfloat16")
    draft, _ = g.load_model(ROOT / "checkpoints/stories-draft", dtype="bfloat16")
    for prompt in ("Once upon a time", "The dog ran", "Mom said"):
        plain = generate(model, tokenizer, [prompt], max_new_tokens=60, temperature=0)[0].ids
        assert generate(model, tokenizer, [prompt], max_new_tokens=60, temperature=0,
                        speculation=Speculation(draft, k))[0].ids == plain


# ---- sampled ---------------------------------------------------------------------------------------------------

def chi_square_holds(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """The 99.99 % quantile, nearly; and nothing where nothing is expected."""
    there = expected > 5
    chi2, freedom = ((counts - expected)[there] ** 2 / expected[there]).sum(), max(int(there.sum()) - 1, 0)
    return counts[expected == 0].sum() == 0 and chi2 < freedom + 5.5 * (2 * freedom) ** 0.5 + 6

def token_probs(logits, settings, seen=None):
    """Choices spread over the vocabulary."""
    found = choices(logits, settings, seen)
    return torch.zeros_like(logits).scatter_(1, found.ids, found.probs)


P = [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]
DRAFTS = {"bad": [0.05, 0.05, 0.1, 0.3, 0.3, 0.2], "identical": P, "disjoint": [0, 0, 0, 0, 0.5, 0.5],
          "certain": [0, 0, 1.0, 0, 0, 0], "impossible": [0, 0, 0, 0, 0, 1.0], "no draft": None}


@pytest.mark.parametrize("name", DRAFTS)
def test_accepted_or_replaced_ids_follow_p(name):
    """A residual that is not normalized, NaN where p = q, or a guess accepted too often: 100,000 blocks of two."""
    torch.manual_seed(0)
    n, first, second = 100_000, torch.tensor(P), torch.tensor(P).flip(0)
    p = torch.stack([first, second, first]).expand(n, 3, 6)
    q = torch.tensor(DRAFTS[name] or DRAFTS["certain"])
    guesses = torch.multinomial(q, 2 * n, replacement=True).view(n, 2)
    found = torch.full((n,), name != "no draft")
    given = None if name in ("certain", "no draft") else q.expand(n, 2, 6)
    ids = torch.arange(6).expand(n, 3, 6)
    given = None if given is None else Choices(ids[:, :2], given)
    accepted, (_, weights) = accept(guesses, found, given, Choices(ids, p), torch.rand(n, 2), 6)
    assert weights.isfinite().all() and (weights.sum(1) > 0).all()
    drawn = torch.multinomial(weights, 1)[:, 0]
    ids = torch.cat([guesses, drawn[:, None]], 1).scatter(1, accepted[:, None], drawn[:, None])
    assert chi_square_holds(torch.bincount(ids[:, 0], minlength=6).float(), first * n)
    later = ids[accepted >= 1][:, 1]
    assert chi_square_holds(torch.bincount(later, minlength=6).float(), second * len(later))
    share = {"identical": 1.0, "disjoint": 0.0, "impossible": 0.0, "no draft": 0.0, "certain": 0.2, "bad": 0.3}[name]
    assert abs((accepted >= 1).float().mean() - share) < 0.01      # sum of min(p, q)


class Chain(Transformer):
    """The next id depends on the last one alone: logits [V, V]."""

    def __init__(self, table: torch.Tensor):
        super().__init__(ModelArgs(vocab_size=len(table), dim=8, n_layers=1, n_heads=1, max_position=64))
        self.table, self.end_ids, self.generation_config, self.limit = table, set(), {}, 64

    def forward(self, tokens, input_pos=None, *, slots=0, logits_at=None):
        logits = self.table[tokens]
        return logits if logits_at is None else logits.gather(1, logits_at[:, :, None].expand(-1, -1, len(self.table)))


SETTINGS = [dict(temperature=1.0, top_k=0), dict(temperature=0.7, top_k=3), dict(top_k=0, top_p=0.8),
            dict(top_k=0, min_p=0.2), dict(top_k=0, repetition_penalty=1.8)]


@pytest.mark.parametrize("kind", ["near", "far", "lookup"])
@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_texts_are_distributed_as_plain_ones(tokenizer, given, kind):
    """Filters on one side only, noise used twice, a penalty that lags: 4,000 texts of 4 ids against their odds."""
    torch.manual_seed(4)
    V, n, settings = 5, 4000, Sampling(seed=9, **given)
    model = Chain(torch.randn(V, V) * 1.5)
    draft = {"near": Chain(model.table + 0.5 * torch.randn(V, V)), "far": Chain(torch.randn(V, V) * 3), "lookup": None}
    prompt = [0, 1, 2, 0]
    rows = [g.Row(tokenizer, prompt, 4) for _ in range(n)]
    list(g.generate_rows(model, rows, settings, speculation=Speculation(draft[kind], 2, 2)))
    counts, expected = torch.zeros(V ** 4), torch.zeros(V ** 4)
    for row in rows:
        counts[sum(i * V ** place for place, i in enumerate(row.ids))] += 1
    for ids in itertools.product(range(V), repeat=4):
        odds, text = 1.0, list(prompt)
        for i in ids:
            seen = torch.zeros(1, V, dtype=torch.bool)
            seen[0, text] = True
            odds *= float(token_probs(model.table[text[-1]][None], settings, seen)[0, i])
            text.append(i)
        expected[sum(i * V ** place for place, i in enumerate(ids))] = odds * n
    assert chi_square_holds(counts, expected)


@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_one_seed_one_text_whatever_the_neighbours(tokenizer, kind):
    """Noise that depends on what other rows accept or find."""
    model, options = random_model(), dict(max_new_tokens=24, seed=5, temperature=0.3)
    make = lambda: Speculation(other_model(0.05) if kind == "draft" else None, 3)       # noqa: E731
    alone = generate(model, tokenizer, ["hello"], speculation=make(), **options)[0].ids
    batch = generate(model, tokenizer, ["hello", "a longer one one one", "x"], speculation=make(), **options)
    assert batch[0].ids == alone
    assert generate(model, tokenizer, ["hello"], speculation=make(), **options)[0].ids == alone


# ---- looking up ------------------------------------------------------------------------------------------------

def naive_look_up(text: list[int], ngram: int, k: int) -> list[int] | None:
    for n in range(min(ngram, len(text) - 1), 0, -1):
        for begin in range(len(text) - n - 1, -1, -1):
            if text[begin:begin + n] == text[-n:]:
                copy = list(text)
                for _ in range(k):                          # a copy that runs into itself
                    copy.append(copy[begin + n + len(copy) - len(text)])
                return copy[len(text):]
    return None


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
def test_look_up_equals_a_search(ngram):
    """Off by one at either end, an earlier match before a later one, tokens read beyond the text."""
    torch.manual_seed(ngram)
    texts = [torch.randint(letters, (n,)).tolist() for letters in (2, 3, 8, 30) for n in range(1, 40, 3)]
    history = torch.tensor([text + [0] * (48 - len(text)) for text in texts])
    guesses, found = look_up(history, torch.tensor([len(text) - 1 for text in texts]), ngram, 6)
    for text, ids, there in zip(texts, guesses.tolist(), found.tolist()):
        expected = naive_look_up(text, ngram, 6)
        assert there == (expected is not None) and (not there or ids == expected), (text, ids, expected)


def test_nothing_found_costs_nothing(tokenizer):
    """A verification of guesses that nobody made."""
    model = Scripted(lambda row, position: position % 250)
    speculation = Speculation(None, 4)
    generate(model, tokenizer, [[251, 252]], max_new_tokens=12, speculation=speculation, **GREEDY)
    assert model.forwards == 12 == model.head_rows and speculation.acceptance.plain == 11


# ---- stopping and counting -------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 3, 4, 8])
def test_a_right_draft_saves_forwards(tokenizer, k):
    """Blocks of another size than told; figures that count what was thrown away."""
    model, draft, figures = Scripted(spell("abcdefg", 3)), Scripted(spell("abcdefg", 3)), Figures()
    speculation = Speculation(draft, k)
    [row] = generate(model, tokenizer, [[1, 2, 3]], max_new_tokens=41, figures=figures, speculation=speculation, **GREEDY)
    assert row.text == ("abcdefg" * 6)[:41] and len(row.ids) == 41 == figures.new_tokens
    blocks = -(-40 // (k + 1))
    assert model.forwards == 1 + blocks and draft.forwards == 1 + k * blocks
    assert speculation.acceptance.histogram[k] == blocks == speculation.acceptance.model_steps
    assert speculation.acceptance.draft_steps == k * blocks == speculation.acceptance.guessed


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9])
def test_limits_and_ends_inside_a_block(tokenizer, n):
    """Text beyond max_new_tokens or beyond an end token that stands inside an accepted block."""
    model, draft = Scripted(spell("abcdefg", 1)), Scripted(spell("abcdefg", 1))
    [row] = generate(model, tokenizer, [[1]], max_new_tokens=n, speculation=Speculation(draft, 4), **GREEDY)
    assert row.text == "abcdefgabcdefg"[:n] and row.finish_reason == "length"
    end = lambda row, position: 299 if position == 1 + n else 65    # noqa: E731
    model, draft = Scripted(end), Scripted(end)
    model.end_ids = {299}
    [row] = generate(model, tokenizer, [[1]], max_new_tokens=50, speculation=Speculation(draft, 4), **GREEDY)
    assert row.ids == [65] * n + [299] and row.finish_reason == "stop"


def test_rows_end_apart_and_the_others_go_on(tokenizer):
    """A row that has ended and runs on beyond the cache while others accept little."""
    script = lambda row, position: 299 if row == 0 and position == 4 else 66 + row      # noqa: E731
    model = Scripted(script)
    model.end_ids = {299}
    draft = Scripted(lambda row, position: 67 if row == 0 else 0)   # right in the ended row's case only
    rows = generate(model, tokenizer, [[1], [1, 2]], max_new_tokens=230, speculation=Speculation(draft, 16), **GREEDY)
    assert rows[0].ids == [66, 66, 66, 299] and rows[1].ids == [67] * 230


@pytest.mark.parametrize("stop, expected", [("lo wo", "hel"), (["zzz", "d!"], "hello worl"), ("é", "hello world!")])
def test_stop_strings_inside_a_block(tokenizer, stop, expected):
    """A stop string that is found only at a block's end."""
    whole = "hello world!é."
    options = dict(max_new_tokens=len(whole.encode()), stop=stop, **GREEDY)
    speculation = Speculation(Scripted(spell(whole, 1)), 4)
    assert "".join(stream(Scripted(spell(whole, 1)), tokenizer, [1], speculation=speculation, **options)) == expected


def test_the_cache_has_room_for_the_last_block(tokenizer):
    """An index error at the end of a text that fills its cache: 240 + 16 tokens of slack are one bucket of 256."""
    model = random_model()
    for prompt, new in (([5] * 200, 40), ([5] * 239, 1), ([5] * 10, 230)):
        plain = generate(model, tokenizer, [prompt], max_new_tokens=new, **GREEDY)[0].ids
        model.drop_caches()
        for draft in (random_model(), None):
            rows = generate(model, tokenizer, [prompt], max_new_tokens=new, speculation=Speculation(draft, 16), **GREEDY)
            assert rows[0].ids == plain


def test_the_next_turn_runs_new_tokens_only(tokenizer):
    """A draft that reads the whole conversation again, or keys of another one."""
    model, draft = random_model(), random_model()
    speculation, prompt = Speculation(draft, 3), [3, 4, 5, 6, 7, 8]
    [first] = generate(model, tokenizer, [prompt], max_new_tokens=9, speculation=speculation, **GREEDY)
    longer = prompt + first.ids + [9, 10, 11]
    plain = generate(random_model(), tokenizer, [longer], max_new_tokens=9, **GREEDY)[0].ids
    widths, forward = [], draft.forward
    draft.forward = lambda tokens, *a, **b: widths.append(tokens.shape[1]) or forward(tokens, *a, **b)
    [row] = g.rows_for(model, tokenizer, [longer], 9)
    list(g.generate_rows(model, [row], Sampling(temperature=0), cached=len(longer) - 4, speculation=speculation))
    assert row.ids == plain and widths[0] <= 9 and speculation.acceptance.histogram[3] == 2


# ---- how many to guess -----------------------------------------------------------------------------------------

def simulate(pace: Pace, rate: float, draft: float, tokens: int) -> tuple[float, float]:
    """Tokens and seconds of steps chosen by a pace, where a plain step takes 1 and k guesses 1.1 + k * draft."""
    generator, made, seconds = torch.Generator().manual_seed(0), 0, 0.0
    while made < tokens:
        k = pace.choose()
        took = 1.1 + k * draft if k else 1.0
        stands = torch.rand(k, generator=generator) < rate
        accepted = int(stands.long().cumprod(0).sum())
        pace.learn(k, [accepted], took)
        made, seconds = made + accepted + 1, seconds + took
    return made, seconds


@pytest.mark.parametrize("rate, draft, least", [(0.0, 0.2, 0.96), (0.3, 0.6, 0.96), (0.8, 0.1, 1.95), (0.95, 0.02, 4.5),
                                                (0.5, 0.05, 1.3)])
def test_auto_is_worth_it_or_costs_nothing(rate, draft, least):
    """A pace that keeps guessing when plain decoding is faster, or stops when it is not."""
    made, seconds = simulate(Pace("auto"), rate, draft, 3000)
    assert made / seconds > least


def test_auto_returns():
    """A pace that gives up for good at the first dull passage."""
    pace = Pace("auto")
    simulate(pace, 0.0, 0.1, 1000)
    made, seconds = simulate(pace, 0.95, 0.05, 3000)
    assert made / seconds > 2.5


def test_falling_back_lets_the_draft_catch_up(tokenizer, monkeypatch):
    """A draft that does not know what was decoded without it."""
    model, speculation = random_model(), Speculation(random_model(), "auto")
    ks = itertools.cycle([0, 0, 0, 2, 4, 0, 1, 3])
    monkeypatch.setattr(speculation.pace, "choose", lambda: next(ks))
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=60, **GREEDY)
    rows = generate(model, tokenizer, PROMPTS, max_new_tokens=60, speculation=speculation, **GREEDY)
    assert [row.ids for row in rows] == [row.ids for row in plain]
    assert speculation.acceptance.figures()["rate"] == 1


# ---- compiled graphs -------------------------------------------------------------------------------------------

def test_acceptance_k_and_settings_do_not_recompile(tokenizer):
    """A graph per k, per number of accepted tokens, per length or per setting; compiled tokens that differ."""
    torch._dynamo.reset()
    counters = [CompileCounter() for _ in range(2)]
    steps = s.SpeculativeSteps(*(torch.compile(f, backend=c, fullgraph=True) for f, c in zip((s.draft, s.verify), counters)))
    model, draft = random_model(), other_model(0.05)
    for k in (4, 1, 2, 3, 8, "auto"):
        for n in (1, 30, 100, 180):
            ids = [(3 * i + n) % 256 for i in range(n)]
            plain = generate(model, tokenizer, [ids], max_new_tokens=30, **GREEDY)[0].ids
            rows = generate(model, tokenizer, [ids], max_new_tokens=30, speculation=Speculation(draft, k, steps=steps),
                            **GREEDY)
            assert rows[0].ids == plain
    for settings in SETTINGS:
        generate(model, tokenizer, ["hello"], max_new_tokens=8, speculation=Speculation(draft, 3, steps=steps), **settings)
    assert [c.frame_count for c in counters] == [2, 1]


# ---- the command line ------------------------------------------------------------------------------------------

def test_flags_and_figures(folder, capsys):
    """A text that changes with the flags; a figure that is missing or not a number."""
    options = [*tiny(folder), "--dtype", "float32", "--prompt", "hello", "x", "--max_new_tokens", 20]
    plain = run(capsys, *options)[1]
    draft = ["--draft_checkpoint_path", folder / "tiny.safetensors"]
    for flags in (draft, [*draft, "--speculate_k", "auto"], ["--prompt_lookup"],
                  ["--prompt_lookup", "--speculate_k", 2, "--lookup_ngram", 1]):
        code, out, err = run(capsys, *options, *flags)
        assert code == 0 and out == plain and "tokens a step" in err and "accepted" in err
    assert "only a smaller draft saves time" in run(capsys, *options, *draft)[2]
    found = json.loads(run(capsys, *options, *draft, "--speculate_k", 3, "--num_samples", 2, "--json")[1])
    assert found["acceptance"]["histogram"] == [0, 0, 0, 5 * 2 * 2] and found["acceptance"]["rate"] == 1
    assert found["acceptance"]["mean"] == 3 and found["acceptance"]["tokens_per_step"] == 4 and found["speedup"] > 0


def test_chat_with_both_caches(folder, capsys, monkeypatch):
    """A second turn whose text depends on what the draft remembers."""
    flags = ["--temperature", 0, "--dtype", "float32"]
    plain, _ = chat(capsys, monkeypatch, folder, "hello\nagain\nand again\n", *flags)
    draft = ["--draft_checkpoint_path", folder / "tiny.safetensors", "--speculate_k", 3]
    out, err = chat(capsys, monkeypatch, folder, "hello\nagain\nand again\n", *flags, *draft)
    assert out == plain and len(prefilled(err)) == 3 and err.count("0 accepted 0, 0 accepted 1, 0 accepted 2") == 3
    assert chat(capsys, monkeypatch, folder, "hello\nagain\nand again\n", *flags, "--prompt_lookup")[0] == plain


WRONG = [(["--draft_checkpoint_path", "/no/such/model"], 1, "/no/such/model"),
         (["--prompt_lookup", "--speculate_k", "0"], 2, "0 is not in 1 ... 16"),
         (["--prompt_lookup", "--speculate_k", "17"], 2, "17 is not in 1 ... 16"),
         (["--prompt_lookup", "--speculate_k", "many"], 2, "many"),
         (["--prompt_lookup", "--lookup_ngram", "0"], 2, "0 is not 1 or more"), (["--speculate_k", "4"], 2, "--prompt_lookup"),
         (["--lookup_ngram", "2"], 2, "--prompt_lookup"),
         (["--prompt_lookup", "--draft_checkpoint_path", "x"], 2, "one of them"),
         (["--draft_checkpoint_path", ROOT / "checkpoints/stories-draft"], 1, "a draft must have the model's tokenizer")]


@pytest.mark.parametrize("arguments, expected, words", WRONG, ids=str)
def test_mistakes_are_one_sentence(folder, capsys, arguments, expected, words):
    """A traceback, or a run without the speculation that was asked for."""
    code, out, err = run(capsys, *tiny(folder), "--quiet", *arguments)
    assert code == expected and out == "" and "Traceback" not in err and words in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1


def test_python_callers_get_the_sentence_too():
    """A bad k that is found in the middle of a text."""
    for bad in (dict(k=0), dict(k=17), dict(ngram=0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Speculation(None, **bad)


# ---- scripts ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "scripts").glob("speculate_*.sh")))
def test_scripts_run_or_parse(name, tmp_path):
    """A script whose flags have changed: the bundled pair's runs, the others' arguments are read by the parser."""
    arguments = tmp_path / "arguments"
    echo = tmp_path / "echo.sh"
    echo.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {arguments}\n')
    echo.chmod(0o755)
    with_echo = {**os.environ, "PYTHON": str(echo), "TORCHRUN": str(echo)}
    bundled = name == "speculate_stories.sh"
    environment = {**os.environ, "PYTHON": sys.executable} if bundled else with_echo
    done = subprocess.run(["bash", str(ROOT / "scripts" / name), "--max_new_tokens", "8", "--quiet"], env=environment,
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and bool(done.stdout) == bundled, done.stderr
    if not bundled:
        words = arguments.read_text().splitlines()
        given = cli.parser().parse_args(words[words.index(str(ROOT / "generate.py")) + 1:])
        assert given.draft_checkpoint_path and given.speculate_k and given.compile


def test_the_benchmark_runs():
    """A benchmark that nobody has run since the last change."""
    command = ["scripts/benchmark_speculate.py", "--config", "scripts/shapes/stories15m.json", "--rounds", "1", "--json",
               "--draft_config", "scripts/shapes/stories15m.json", "--new_tokens", "12", "--text_rounds", "1"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads(done.stdout)
    assert found["speedup"] > 0 and found["verify_over_decode"]["4"] > 0 and 1 <= found["tokens_per_step"] <= 5
