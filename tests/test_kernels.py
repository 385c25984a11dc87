"""The kernels of attention and of a step's small parts against their plain forms in model.py. (The linear kernel's tests
are in test_quantize.py, beside the layers that use it.)"""
import subprocess

import pytest
import torch

from generate import load_model
from kernels import cpu
from model import KVCache, ModelArgs, RMSNorm, attend, attention_mask, rotate
from quantize import KINDS
from sampling import Sampler, Sampling, choices

SHAPES = [  # B, H, K, T, S, E, window, cap
    (1, 6, 6, 1, 256, 48, 0, 0.0),          # E is not a power of two
    (2, 8, 2, 1, 300, 64, 0, 0.0),          # grouped heads, and slots that do not fill a vector
    (3, 8, 8, 5, 77, 128, 0, 0.0),          # rows at different positions
    (2, 8, 4, 3, 513, 256, 40, 50.0),       # a window, and a soft cap
    (1, 4, 1, 15, 1000, 16, 0, 30.0),       # several blocks of slots
    (2, 32, 8, 2, 700, 80, 100, 0.0),
]


def operands(B, H, K, T, S, E, window, dtype):
    g = torch.Generator().manual_seed(S)
    q = torch.randn(B, T, H, E, generator=g, dtype=dtype).transpose(1, 2)            # [B, H, T, E], as the model has it
    k, v = torch.randn(2, B + 1, K, S + 1, E, generator=g, dtype=dtype)[:, :B, :, :S]
    input_pos = torch.randint(0, S - T, (B, 1), generator=g) + torch.arange(T)
    return q, k, v, attention_mask(input_pos, torch.arange(S).expand(B, -1), window)


def needs_compiler():
    if not cpu.available():
        pytest.skip("there is no C++ compiler")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_plain_form(shape, dtype, tolerance):
    needs_compiler()
    *sizes, cap = shape
    q, k, v, mask = operands(*sizes, dtype)
    wanted = attend(q.float(), k.float(), v.float(), mask, 0.1, cap)
    got = cpu.attend(q, k, v, mask, 0.1, cap)
    assert got.shape == q.shape and got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_gets_the_same_bits_alone_and_among_others(shape):
    """Verification of several tokens must not round differently from the steps it replaces."""
    needs_compiler()
    *sizes, cap = shape
    q, k, v, mask = operands(*sizes, torch.bfloat16)
    alone = [cpu.attend(q[:, :, t:t + 1], k, v, mask[:, :, t:t + 1], 0.1, cap) for t in range(q.shape[2])]
    assert torch.equal(cpu.attend(q, k, v, mask, 0.1, cap), torch.cat(alone, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_nobody_sees_do_not_matter(dtype):
    """The kernel stops at the last visible slot: what a longer text left behind may be anything, NaN too."""
    needs_compiler()
    for T in (1, 3):
        q, k, v, mask = operands(1, 4, 2, T, 600, 64, 0, dtype)
        last = mask[0, 0].nonzero()[:, 1].max()
        wanted = cpu.attend(q, k, v, mask, 0.1)
        k, v = k.clone(), v.clone()
        k[:, :, last + 1:] = v[:, :, last + 1:] = torch.nan
        assert torch.equal(cpu.attend(q, k, v, mask, 0.1), wanted) and wanted.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e8, -1e8])
@pytest.mark.parametrize("T", [1, 20])
def test_scores_of_any_size(scale, T):
    """Who sees one slot gets its value, however large its score; so does who prefers one by far."""
    needs_compiler()
    q, k, v, _ = operands(1, 4, 2, T, 40, 32, 0, torch.bfloat16)
    alone = (torch.arange(40) == 7).expand(1, 1, T, 40).contiguous()
    assert torch.equal(cpu.attend(q, k, v, alone, scale), v[:, :, 7:8].repeat_interleave(2, 1).expand_as(q))
    everyone, wanted = torch.ones_like(alone), attend(q.float(), k.float(), v.float(), torch.ones_like(alone), scale)
    torch.testing.assert_close(cpu.attend(q, k, v, everyone, scale).float(), wanted, rtol=0, atol=2e-2)


# B, H, K, T, S, E, window, cap
PROMPTS = [(1, 4, 2, 20, 40, 32, 0, 0.0), (2, 6, 2, 61, 300, 64, 0, 0.0), (1, 4, 4, 300, 600, 96, 0, 0.0), (1, 8, 1, 130, 257, 128, 0, 30.0),
           (1, 2, 2, 270, 700, 256, 100, 0.0), (3, 3, 1, 20, 21, 64, 7, 0.0),
           (2, 6, 3, 100, 290, 48, 0, 0.0), (1, 2, 1, 40, 80, 16, 0, 0.0), (1, 2, 1, 40, 300, 240, 0, 0.0)]


@pytest.mark.parametrize("B, H, K, T, S, E, window, cap", PROMPTS)
def test_attention_of_prompts(B, H, K, T, S, E, window, cap):
    """Groups that fill no tile, slots that fill no block, windows that leave whole blocks unseen; what lies in unseen slots
    changes nothing."""
    needs_compiler()
    if not cpu.ABLE["prompts"]:
        pytest.skip("the processor does not multiply bfloat16")
    q, k, v, mask = operands(B, H, K, T, S, E, window, torch.bfloat16)
    wanted = attend(q.float(), k.float(), v.float(), mask, 0.1, cap)
    got = cpu.attend(q, k, v, mask, 0.1, cap)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=2e-2)
    k, v = (torch.where(mask.any(2)[..., None], t, 1e4) for t in (k, v))
    assert torch.equal(cpu.attend(q, k, v, mask, 0.1, cap), got)
    q[0, 0, -1], mask[0, 0, -1] = 0, mask[0, 0, 0]                                   # another query's matter
    assert torch.equal(cpu.attend(q, k, v, mask, 0.1, cap)[:, :, :-1], got[:, :, :-1])
    part = slice(T // 2 - 8, T // 2 + 9)
    assert torch.equal(cpu.attend(q[:, :, part], k, v, mask[:, :, part], 0.1, cap), got[:, :, part])
    if torch.ops.cpu_bfloat16.by_tiles(32, 16) and H > K:                            # then a step is a short prompt
        assert torch.equal(cpu.attend(q[:, :, :1], k, v, mask[:, :, :1], 0.1, cap), got[:, :, :1])


def test_portable_attention_agrees():
    """Built without the bfloat16 instructions, as on AVX2 or ARM."""
    try:
        torch.ops.load_library(cpu.build("attention.cpp", "-DPORTABLE", "-DLIBRARY=portable_attention", "-O1"))
    except (OSError, subprocess.SubprocessError):
        pytest.skip("there is no C++ compiler")
    for *sizes, cap in SHAPES:
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
            q, k, v, mask = operands(*sizes, dtype)
            wanted = attend(q.float(), k.float(), v.float(), mask, 0.1, cap)
            got = torch.ops.portable_attention.attend(q, k, v, mask, 0.1, cap)
            torch.testing.assert_close(got.float(), wanted, rtol=0, atol=tolerance)


def test_other_shapes_take_the_plain_form():
    """Heads that are not a multiple of 16 wide, many queries, half precision."""
    for T, E, dtype in ((1, 8, torch.float32), (40, 64, torch.float32), (40, 288, torch.bfloat16),
                        (1, 64, torch.float16)):
        q, k, v, mask = operands(1, 4, 2, T, 100, E, 0, dtype)
        assert torch.equal(cpu.attend(q, k, v, mask, 0.1), attend(q, k, v, mask, 0.1))


def test_a_loaded_model_uses_it():
    """Else every other test here would pass while generation is slow."""
    needs_compiler()
    model, _ = load_model()
    for layer in model.layers:
        assert (layer.attention.attend, layer.attention.rotate) == (cpu.attend, cpu.rotate)
        assert type(layer.attention.cache) is cpu.PackedCache and type(layer.ffn_norm) is cpu.PackedNorm
    assert type(model.norm) is cpu.PackedNorm


def test_attention_compiles_without_a_break():
    needs_compiler()
    q, k, v, mask = operands(1, 4, 2, 1, 100, 64, 0, torch.bfloat16)
    compiled = torch.compile(lambda *t: cpu.attend(*t, 0.1), fullgraph=True)
    assert torch.equal(compiled(q, k, v, mask), cpu.attend(q, k, v, mask, 0.1))


# ---- the small parts of a step -----------------------------------------------------------------------------

@pytest.fixture(params=["native", "portable"])
def step(request, monkeypatch):
    """The operators as built for this machine, and without its instructions."""
    needs_compiler()
    if request.param == "portable":
        torch.ops.load_library(cpu.build("step.cpp", "-DPORTABLE", "-DLIBRARY=portable_step", "-O1"))
        monkeypatch.setattr(torch.ops, "cpu_step", torch.ops.portable_step)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["llama", "float32", "gemma"])
def test_norm_in_one_call(style, dtype, step):
    """Widths that fill vectors or do not, views that are not in one piece; the roundings of each style."""
    for D in (64, 100, 5):
        norm = RMSNorm(D, ModelArgs(10, D, 1, 1, norm_style=style, norm_eps=1e-3))
        norm.weight = torch.nn.Parameter(torch.randn(D).to(dtype), requires_grad=False)
        for x in (torch.randn(1, 1, D), torch.randn(2, 3, 7, D).transpose(1, 2) * 30, torch.zeros(2, D)):
            y = cpu.PackedNorm(norm)(x.to(dtype))
            assert y.dtype == dtype
            torch.testing.assert_close(y, norm(x.to(dtype)), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_in_one_call(dtype, step):
    for B, H, T, E, r in ((1, 4, 1, 64, 64), (2, 6, 5, 64, 20), (3, 2, 4, 10, 6)):
        x = torch.randn(B, T, H, E).to(dtype).transpose(1, 2)
        cos, sin = torch.randn(2, B, 1, T, r // 2)
        torch.testing.assert_close(cpu.rotate(x, cos, sin), rotate(x, cos, sin), rtol=1e-2, atol=2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_entries_in_one_call(dtype, step):
    """Rows at unlike positions, fewer rows than the cache has, slots beyond its end."""
    plain, packed = (KVCache(ModelArgs(10, 64, 1, 4, n_kv_heads=2)) for _ in range(2))
    packed = cpu.PackedCache(packed)
    for cache in (plain, packed):
        cache.allocate(3, 20, torch.zeros(0, dtype=dtype))
    for T in (1, 4):
        k, v = torch.randn(2, 2, T, 2, 16).to(dtype).transpose(2, 3)
        pos = torch.tensor([[3], [11]]) + torch.arange(T)
        where = (torch.arange(2)[:, None, None], torch.arange(2)[:, None], pos[:, None])
        for a, b in zip(plain(where, k, v, 16), packed(where, k, v, 16)):
            assert torch.equal(a, b) and a.shape == (2, 2, 16, 16)
    assert torch.equal(plain.k, packed.k) and torch.equal(plain.v, packed.v)
    for at in (-1, 21):
        with pytest.raises(IndexError):
            packed((where[0], where[1], torch.full((2, 1, 4), at)), k, v, 16)


def test_argmax_is_the_first_of_the_largest(step):
    for V in (5, 64, 1003, 10007):
        x = torch.randint(-9, 9, (4, V)).float()
        x[1], x[2, V // 2:], x[3, -1] = -torch.inf, torch.inf, 10
        assert cpu.argmax(x).tolist() == x.argmax(-1).tolist() == [row.index(max(row)) for row in x.tolist()]
        assert cpu.argmax(x.t()).tolist() == x.argmax(0).tolist()
        assert torch.equal(cpu.argmax(x.view(2, 2, V)), x.argmax(-1).view(2, 2))
        assert 0 <= cpu.argmax(torch.full((1, V), torch.nan)).item() < V


DRAWS = [dict(), dict(top_k=1), dict(top_k=7, temperature=2.5), dict(top_k=30, top_p=0.8), dict(top_p=0.0), dict(top_p=1e-3), dict(min_p=0.2),
         dict(min_p=1.0), dict(temperature=1e-7), dict(temperature=0), dict(temperature=0, repetition_penalty=1.7),
         dict(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3)]


@pytest.mark.parametrize("given", DRAWS, ids=str)
def test_draws_in_one_call(given, step):
    """The same noise gives the ids that sampling.py's operators give, and the same ids are seen from then on. Vocabularies end
    within a part of 32, have fewer parts than are looked at, and more."""
    for V in (50, 233, 1003, 9999, 128_001):
        settings = Sampling(seed=5, **{"top_k": 40} | given)
        sampler = Sampler(settings, [[1, 2, 3], [4]], V, torch.device("cpu"))
        twin = sampler.copy()
        logits = torch.randn(2, V) * 4
        logits[1, V // 2:] = -torch.inf
        for _ in range(8):
            ids = torch.ops.cpu_step.draw(logits, *sampler.orders())
            expected = twin.draw(choices(logits, settings, twin.seen))
            assert sampler.known and ids.tolist() == expected.tolist()
            if twin.seen is not None:
                assert torch.equal(sampler.seen, twin.seen.scatter_(1, expected[:, None], True))


def test_draws_of_what_nobody_expects(step):
    """NaN; too many ties; one row of several whose logits are no piece of memory."""
    sampler = Sampler(Sampling(top_k=5), [[0]] * 2, 3000, torch.device("cpu"))
    noise, *rest = sampler.orders()
    assert all(0 <= i < 3000 for i in torch.ops.cpu_step.draw(torch.full((2, 3000), torch.nan), noise, *rest))
    logits = torch.randn(2, 3000)
    logits[:, ::2] = torch.nan
    assert all(i % 2 for i in torch.ops.cpu_step.draw(logits, noise, *rest).tolist())
    for same in (0.0, torch.inf, -torch.inf):
        assert all(0 <= i < noise.shape[1] for i in torch.ops.cpu_step.draw(torch.full((2, 3000), same), noise, *rest))
    logits, some = torch.full((2, 3000), -50.0), torch.full((2, 37), 0.5)           # so likely that the rest is lost beside it, but drawn
    logits[:, 7], logits[:, 3], some[:, 0], some[:, 1] = 0, -13.6, 1e-7, 1 - 2 ** -24
    assert torch.ops.cpu_step.draw(logits, some, *rest).tolist() == [3, 3]
    logits = torch.randn(3000, 2).t()
    assert torch.equal(torch.ops.cpu_step.draw(logits, noise, *rest), torch.ops.cpu_step.draw(logits.contiguous(), noise, *rest))
    for wrong in (noise[:1], noise[:, :4], torch.rand(2, 3001)):
        with pytest.raises(RuntimeError, match="noise of another shape"):
            torch.ops.cpu_step.draw(logits, wrong.contiguous(), *rest)
    with pytest.raises(RuntimeError, match="seen is of another shape"):
        torch.ops.cpu_step.draw(logits, noise, torch.zeros(2, 2999, dtype=torch.bool), *rest[1:])


def test_ties_for_the_last_place_are_drawn_alike(step):
    """Of ten equals for the last three of five places all stay: none is drawn twice as often as another."""
    logits = torch.full((1, 300), -9.0)
    logits[:, [5, 250]], logits[:, 100:110] = 1.5, 1.0
    sampler = Sampler(Sampling(top_k=5, temperature=1.0, seed=1), [[0]] * 4000, 300, torch.device("cpu"))
    counts = torch.bincount(torch.ops.cpu_step.draw(logits.expand(4000, -1), *sampler.orders()), minlength=300)
    assert counts.nonzero().flatten().tolist() == [5, *range(100, 110), 250]
    assert counts[100:110].max() < 2 * counts[100:110].min() and counts[[5, 250]].min() > counts[100:110].max()


# ---- pages -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, slow", [([0.0001] * 8, False), ([0.005, 0.0001] * 4, False), ([0.005] * 8, True)])
def test_large_pages_that_take_long_are_left_alone(seconds, slow, monkeypatch):
    """Seconds of loading for a few per cent of a step; one interruption that is taken for that."""
    if not hasattr(cpu.mmap, "MADV_HUGEPAGE"):
        pytest.skip("the system has no large pages")
    seconds = iter(seconds)
    monkeypatch.setattr(cpu, "HURRY", {})
    monkeypatch.setattr(cpu, "touch", lambda room, at: next(seconds))
    cpu.in_large_pages(9 << 20)                         # no hurry: nobody looks
    cpu.HURRY["pages are slow"] = False
    for _ in range(3):
        assert cpu.in_large_pages(9 << 20).fill_(1).sum() == 9 << 20
    assert cpu.HURRY["pages are slow"] == slow
    assert len(list(seconds)) == (6 if slow else 2)     # once it is known nobody looks again


def test_small_tensors_share_large_pages(monkeypatch):
    """Scales and narrow matrices move into one room, views of something larger stay, and products are what they were."""
    needs_compiler()
    layers = torch.nn.ModuleList(KINDS[mode].quantize(torch.randn(96, 64), 32).pack() for mode in ("int4", "int8", "int4"))
    layers[2].packed = torch.cat([layers[2].packed] * 2).chunk(2)[1]                 # as an expert's
    x, stays = torch.randn(2, 64), layers[2].packed.data_ptr()
    before = [layer(x) for layer in layers]
    monkeypatch.setattr(cpu, "LARGE_PAGE", 2048)
    cpu.gather_small(layers)
    moved = sorted(t.data_ptr() for layer in layers for t in (layer.packed, layer.packed_scales) if t.data_ptr() != stays)
    assert layers[2].packed.data_ptr() == stays and moved[-1] - moved[0] < 1 << 16
    assert all(map(torch.equal, before, (layer(x) for layer in layers)))
