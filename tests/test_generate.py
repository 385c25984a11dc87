"""generate.py from Python: sampling, stopping, batches, caches, compiled graphs. Tiny random or scripted models."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import generate as g
from generate import generate, stream
from model import ModelArgs, Transformer
from sampling import Sampling, choices, largest
from test_tokenizer import byte_level_json
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(byte_level_json(tmp_path_factory.mktemp("tokenizer")))


def random_model(**switches) -> Transformer:
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_position=4096)
    model = Transformer(ModelArgs(**sizes | switches)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    model.end_ids, model.generation_config, model.limit = set(), {}, model.args.max_position
    return model


class Scripted(Transformer):
    """Says a given id at each position, whatever it reads; counts its forwards."""

    def __init__(self, script, vocab_size: int = 300):
        super().__init__(ModelArgs(vocab_size=vocab_size, dim=8, n_layers=1, n_heads=1, max_position=4096))
        self.script, self.forwards, self.head_rows, self.nap = script, 0, 0, (0.0, 0.0)
        self.end_ids, self.generation_config, self.limit, self.n_parameters = set(), {}, 4096, 0

    def forward(self, tokens, input_pos=None, *, slots=0, logits_at=None):
        self.forwards += 1
        time.sleep(self.nap[0] if tokens.shape[1] > 1 else self.nap[1])
        at = input_pos.expand(tokens.shape) if logits_at is None else input_pos.expand(tokens.shape).gather(1, logits_at)
        self.head_rows += at.numel()
        logits = torch.zeros(*at.shape, self.args.vocab_size)
        for row in range(at.shape[0]):
            for column in range(at.shape[1]):
                logits[row, column, self.script(row, int(at[row, column]) + 1)] = 9.0
        return logits


def spell(text: str, start: int):
    """A script that continues a prompt of `start` tokens with the bytes of a text."""
    data = text.encode()
    return lambda row, position: data[(position - start) % len(data)]


# ---- sampling --------------------------------------------------------------------------------------------------

def reference_probs(logits, s: Sampling, prompt=None):
    from transformers import generation as t
    chain = t.LogitsProcessorList()
    if s.repetition_penalty != 1.0:
        chain.append(t.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    chain.append(t.TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        chain.append(t.TopKLogitsWarper(s.top_k))
    chain.append(t.TopPLogitsWarper(s.top_p))
    chain.append(t.MinPLogitsWarper(s.min_p))
    return chain(prompt, logits).softmax(-1)

def token_probs(logits, settings, seen=None):
    """Choices spread over the vocabulary."""
    found = choices(logits, settings, seen)
    return torch.zeros_like(logits).scatter_(1, found.ids, found.probs)


FILTERS = [dict(top_k=0), dict(top_k=1), dict(top_k=5), dict(top_k=40), dict(top_k=500), dict(top_k=0, top_p=0.5),
           dict(top_k=0, top_p=0.0), dict(top_k=0, top_p=1.0), dict(top_k=0, min_p=0.1), dict(top_k=0, min_p=1.0),
           dict(temperature=0.3), dict(temperature=2.5), dict(repetition_penalty=1.7, top_k=0),
           dict(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3)]


@pytest.mark.parametrize("given", FILTERS, ids=str)
def test_filters_mean_what_transformers_means(given):
    """A filter in another order, off by one at its edge, or on when it should be off."""
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    s, logits, prompt = Sampling(**given), torch.randn(4, 50) * 3, torch.randint(50, (4, 6))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, prompt, True)
    assert torch.allclose(token_probs(logits, s, seen), reference_probs(logits, s, prompt), atol=1e-6)


@pytest.mark.parametrize("given", [dict(top_k=0), dict(top_k=7), dict(top_k=0, top_p=0.7), dict(top_k=0, min_p=0.1),
                                   dict(temperature=0.6, top_k=12, top_p=0.9, min_p=0.02)], ids=str)
def test_draws_follow_the_probabilities(given):
    """Noise that is not exponential, or shared between rows: chi-square of 100,000 draws, 99.99 % quantile."""
    torch.manual_seed(2)
    s, logits, draws = Sampling(seed=3, **given), torch.randn(1, 24) * 2, 100_000
    expected = token_probs(logits, s)[0] * draws
    sampler, rows = g.Sampler(s, [[0]], 24, torch.device("cpu")), 500
    sampler.generators = [torch.Generator().manual_seed(n) for n in range(rows)]
    counts = torch.zeros(24)
    for _ in range(draws // rows):
        counts += torch.bincount(sampler(logits.expand(rows, -1).contiguous()), minlength=24)
    assert counts[expected == 0].sum() == 0
    there = expected > 5
    chi2, freedom = ((counts - expected)[there] ** 2 / expected[there]).sum(), int(there.sum()) - 1
    assert chi2 < freedom + 5.5 * (2 * freedom) ** 0.5 + 6


def test_temperature_zero_is_argmax_and_ties_go_to_the_lowest():
    """A greedy text that depends on noise."""
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    for s in (Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=1.0, top_k=2)):
        assert g.Sampler(s, [[0]], 4, torch.device("cpu"))(logits).tolist() == [1]
    assert token_probs(logits, Sampling(temperature=0)).tolist() == [[0, 1, 0, 0]]
    wide = torch.randint(0, 9, (3, 1280)).float()
    assert g.Sampler(Sampling(temperature=0), [[0]] * 3, 1280, torch.device("cpu"))(wide).tolist() == \
        [row.index(max(row)) for row in wide.tolist()]
    cold = token_probs(torch.tensor([[1.0, 1.1, -float("inf")]]), Sampling(temperature=1e-6, top_k=0))
    assert torch.allclose(cold, torch.tensor([[0.0, 1.0, 0.0]]))


def test_ties_with_the_kth_stay():
    """top_k looks at a part of the vocabulary only: the tied ids must be in it."""
    logits = torch.zeros(1, 1000)
    logits[0, 100:103] = 2.0
    logits[0, 700:712] = 1.0
    drawn = token_probs(logits, Sampling(temperature=1.0, top_k=5))[0]
    assert drawn.nonzero()[:, 0].tolist() == [100, 101, 102, *range(700, 712)]


def test_largest_equals_topk():
    """A block that was not looked at, or ids that count from their block."""
    x = torch.randn(3, 5003)
    for n in (1, 7, 39, 200, 5003):
        values, ids = largest(x, n)
        assert torch.equal(values, x.topk(n).values) and torch.equal(x.gather(1, ids), values)


def test_settings_fall_back_to_the_models_own():
    """A flag that loses against generation_config.json, or do_sample false that still samples."""
    model = random_model()
    assert (Sampling.of(model).temperature, Sampling.of(model).top_k) == (0.8, 200)
    model.generation_config = {"do_sample": True, "top_p": 0.9}
    assert (Sampling.of(model).temperature, Sampling.of(model).top_k, Sampling.of(model).top_p) == (1.0, 50, 0.9)
    assert Sampling.of(model, top_p=0.5, temperature=0.1).top_p == 0.5
    model.generation_config = {"do_sample": False, "temperature": 0.6}
    assert Sampling.of(model).temperature == 0
    for bad in (dict(temperature=-1), dict(top_k=-1), dict(top_p=1.5), dict(min_p=-0.1), dict(repetition_penalty=0),
                dict(temperature=float("nan"))):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling.of(model, **bad)


def test_one_seed_one_text_whatever_the_neighbours(tokenizer):
    """A row whose noise is drawn from its batch's generator."""
    model, options = random_model(), dict(max_new_tokens=12, seed=5, temperature=1.0)
    alone = generate(model, tokenizer, ["hello"], **options)[0].ids
    assert generate(model, tokenizer, ["hello", "a longer one", "x"], **options)[0].ids == alone
    assert generate(model, tokenizer, ["hello"], **options)[0].ids == alone
    assert generate(model, tokenizer, ["hello"], **{**options, "seed": 6})[0].ids != alone


# ---- batches, chunks, caches -----------------------------------------------------------------------------------

def naive(model, prompt: list[int], n: int) -> list[int]:
    """The oracle: no cache, the whole text again for every id."""
    model.drop_caches()
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("switches", [{}, {"layer_windows": [5, 0]}, {"attention_softcap": 5.0}], ids=str)
def test_cached_equals_naive_for_prompts_of_all_lengths(tokenizer, switches, monkeypatch):
    """Chunk borders, padding, positions per row: a batch of lengths 1 ... 23 in chunks of 8 against no cache at all."""
    monkeypatch.setattr(g, "CHUNK", 8)
    model = random_model(**switches)
    prompts = [[(7 * i + n) % 256 for i in range(n)] for n in (1, 2, 7, 8, 9, 16, 17, 23)]
    expected = [naive(model, p, 6) for p in prompts]
    rows = generate(model, tokenizer, prompts, max_new_tokens=6, **GREEDY)
    assert [row.ids for row in rows] == expected
    assert [row.ids for row in generate(model, tokenizer, prompts[3:4], max_new_tokens=6, **GREEDY)] == expected[3:4]


def test_a_b_a(tokenizer):
    """Something left over from an earlier prompt: long after short, short after long, then the first again."""
    model = random_model()
    a, b = [5, 6, 7], [9] * 400
    first = generate(model, tokenizer, [a], max_new_tokens=8, **GREEDY)[0].ids
    generate(model, tokenizer, [b], max_new_tokens=8, **GREEDY)
    assert generate(model, tokenizer, [a], max_new_tokens=8, **GREEDY)[0].ids == first


def test_prefix_reuse_equals_a_fresh_run(tokenizer):
    """A chat's next turn that reads keys of another conversation."""
    model = random_model()
    ids = [3, 4, 5, 6, 7, 8, 9, 10]
    fresh = generate(model, tokenizer, [ids], max_new_tokens=5, **GREEDY)[0].ids
    generate(model, tokenizer, [ids[:5] + [99, 98, 97]], max_new_tokens=5, **GREEDY)
    [row] = g.rows_for(model, tokenizer, [ids], 5)
    figures = g.Figures()
    list(g.generate_rows(model, [row], Sampling(temperature=0), cached=5, figures=figures))
    assert row.ids == fresh and figures.prompt_tokens == 3


def test_the_head_runs_on_one_position_a_row(tokenizer):
    """A prefill that multiplies the whole prompt with the vocabulary."""
    model = Scripted(lambda row, position: 65)
    generate(model, tokenizer, [[1] * 700], max_new_tokens=3, **GREEDY)
    assert model.head_rows == 2 + 2                     # two chunks, two further tokens


# ---- stopping --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 2, 5])
def test_end_token_at_step_k_takes_k_forwards(tokenizer, k):
    """Tokens computed past the end, printed, or counted."""
    model = Scripted(lambda row, position: 300 - 1 if position == 3 + k - 1 else 65)
    model.end_ids, figures = {7, 299}, g.Figures()
    [row] = generate(model, tokenizer, [[1, 2, 3]], max_new_tokens=20, figures=figures, **GREEDY)
    assert model.forwards == k and row.finish_reason == "stop" and row.text == "A" * (k - 1)
    assert figures.new_tokens == k and len(row.ids) == k
    model.forwards = 0
    [row] = generate(model, tokenizer, [[1, 2, 3]], max_new_tokens=6, ignore_eos=True, **GREEDY)
    assert model.forwards == 6 and row.finish_reason == "length"


def test_rows_stop_apart(tokenizer):
    """A batch that ends with its first row, or goes on after its last."""
    model = Scripted(lambda row, position: 299 if position >= 2 + 3 * row else 66)
    model.end_ids = {299}
    rows = generate(model, tokenizer, [[1], [1], [1]], max_new_tokens=20, **GREEDY)
    assert [row.text for row in rows] == ["B", "BBBB", "BBBBBBB"] and model.forwards == 8


@pytest.mark.parametrize("stop, expected", [("lo wo", "hel"), ("hello", ""), (["zzz", "d!"], "hello worl"),
                                            ("é", "hello world!"), ("rld!é", "hello wo"), ("nothing", None)])
def test_stop_strings_across_tokens(tokenizer, stop, expected):
    """A stop string that is split over tokens or inside a character, printed in part before it is known."""
    whole = "hello world!é."
    model = Scripted(spell(whole, 1))
    pieces = list(stream(model, tokenizer, [1], max_new_tokens=len(whole.encode()), stop=stop, **GREEDY))
    assert "".join(pieces) == (whole if expected is None else expected)


@pytest.mark.parametrize("n", [0, 1])
def test_no_or_one_new_token(tokenizer, n):
    """Concatenations of nothing, and a forward whose result nobody reads."""
    model = Scripted(lambda row, position: 65)
    [row] = generate(model, tokenizer, [[1]], max_new_tokens=n, **GREEDY)
    assert row.text == "A" * n and row.finish_reason == "length" and model.forwards == n


def test_limit_is_checked_before_work(tokenizer):
    """An index error in the middle of a text; the message names all three numbers."""
    model = Scripted(lambda row, position: 65)
    model.limit = 20
    assert generate(model, tokenizer, [[1] * 15], max_new_tokens=5, **GREEDY)[0].text == "A" * 5
    model.forwards = 0
    with pytest.raises(ValueError, match=r"16 prompt tokens and 5 new.*limit of 20"):
        generate(model, tokenizer, [[1] * 16], max_new_tokens=5, **GREEDY)
    assert model.forwards == 0
    with pytest.raises(ValueError, match="empty"):
        generate(model, tokenizer, [[]], max_new_tokens=5)
    with pytest.raises(ValueError, match="does not belong"):
        generate(model, tokenizer, [[1, 300]], max_new_tokens=5)


def test_first_piece_comes_before_the_last_forward(tokenizer):
    """A stream that is a list."""
    model = Scripted(spell("hello", 1))
    pieces = stream(model, tokenizer, [1], max_new_tokens=50, **GREEDY)
    assert next(pieces) == "h" and model.forwards == 1


def test_figures_leave_out_the_caller(tokenizer):
    """Decode figures with prefill, the printing or the tokens after the end in them."""
    model = Scripted(lambda row, position: 65)
    model.nap, figures = (0.3, 0.02), g.Figures()
    [row] = g.rows_for(model, tokenizer, [[1, 2]], 11)
    for _ in g.generate_rows(model, [row], Sampling(temperature=0), figures=figures):
        time.sleep(0.02)
    assert figures.decode_tokens == 10 and figures.new_tokens == 11 and figures.prompt_tokens == 2
    assert 0.3 <= figures.prefill_s < 0.36 and 0.2 <= figures.decode_s < 0.26


# ---- compiled graphs -------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_graph_serves_the_model_it_was_compiled_for_and_sees_its_cache_grow():
    """A compiled step looks at no layer again: models of equal shapes must have graphs of their own, and a larger cache
    must not be taken for the old one."""
    steps, models = g.compile_steps(), [random_model(), random_model(attention_scale=3.0)]
    answers = []
    for length in (20, 700):
        for model in models:
            g.make_room(model, 1, length)
            g.run_prefill(model, g.EAGER, [[i % 300 for i in range(length - 6)]])
            rest = torch.tensor([[7]]), torch.tensor([[length - 6]]), g.attended(model, length - 5)
            answers.append(steps.decode(model, *rest))
            torch.testing.assert_close(answers[-1], g.decode(model, *rest), rtol=1e-4, atol=1e-4)
    assert (answers[0] - answers[1]).abs().max() > 0.01


def test_a_second_start_compiles_nothing(tmp_path):
    """An operator or a note on the graph that keeps PyTorch from finding it again: every start would be a cold one."""
    code = """
from generate import compile_steps, generate, load_model
from torch._dynamo.utils import counters
model, tokenizer = load_model(dtype="bfloat16")
generate(model, tokenizer, ["Once"], max_new_tokens=3, temperature=0, steps=compile_steps())
print(*(counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss", "bypass")))
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for found in ("0 1 0", "1 0 0"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == found, done.stdout + done.stderr


def test_lengths_and_settings_do_not_recompile(tokenizer):
    """A graph per prompt length, per sampling setting or per call; and compiled tokens that differ from eager ones."""
    torch._dynamo.reset()
    model = random_model()
    of_prefill, of_decode = CompileCounter(), CompileCounter()
    steps = g.Steps(torch.compile(g.prefill, backend=of_prefill, fullgraph=True),
                    torch.compile(g.decode, backend=of_decode, fullgraph=True), g.PAD)
    for n in (1, 2, 3, 5, 15, 16, 17, 33, 64, 100, 150, 200, 220, 300, 380, 511, 513, 700, 900, 30):
        ids = [(3 * i + n) % 256 for i in range(n)]
        compiled = generate(model, tokenizer, [ids], max_new_tokens=8, steps=steps, **GREEDY)[0].ids
        assert compiled == generate(model, tokenizer, [ids], max_new_tokens=8, **GREEDY)[0].ids
    buckets = 3                                         # caches of 256, 512 and 1024 slots
    assert of_decode.frame_count <= buckets and of_prefill.frame_count <= buckets
    before = of_decode.frame_count
    for settings in FILTERS:
        generate(model, tokenizer, ["hello"], max_new_tokens=3, steps=steps, **settings)
    assert of_decode.frame_count == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_runs(tokenizer, dtype):
    """An operator that has no half precision on a CPU."""
    [row] = generate(random_model().to(dtype), tokenizer, ["hello"], max_new_tokens=4, **GREEDY)
    assert len(row.ids) == 4


def test_importing_changes_nothing():
    """A library import that sets flags, loads the compiler, or needs a package that is optional."""
    code = ("import torch, sys; before = (torch.get_num_threads(), torch.get_default_dtype(), "
            "torch.is_grad_enabled(), torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision()); "
            "import generate; after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), "
            "torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision()); assert before == after; "
            "assert not {'torch._dynamo', 'transformers', 'tiktoken', 'sentencepiece', 'jinja2'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
