"""The attention kernel against its plain form, `attend` in model.py. (The linear kernel's tests are in
test_quantize.py, beside the layers that use it.)"""
import subprocess

import pytest
import torch

from generate import load_model
from kernels import cpu
from model import attend, attention_mask

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


def test_slots_nobody_sees_do_not_matter():
    """The kernel stops at the last visible slot: what a longer text left behind may be anything, NaN too."""
    needs_compiler()
    q, k, v, mask = operands(1, 4, 2, 1, 600, 64, 0, torch.float32)
    last = mask[0, 0, 0].nonzero().max()
    wanted = cpu.attend(q, k, v, mask, 0.1)
    k, v = k.clone(), v.clone()
    k[:, :, last + 1:] = v[:, :, last + 1:] = 1e4
    assert torch.equal(cpu.attend(q, k, v, mask, 0.1), wanted)


def test_portable_attention_agrees():
    """Built without the bfloat16 instructions, as on AVX2 or ARM."""
    try:
        torch.ops.load_library(cpu.build(cpu.SOURCES[1], "-DPORTABLE", "-DLIBRARY=portable_attention", "-O1"))
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
    for T, E, dtype in ((1, 8, torch.float32), (40, 64, torch.float32), (1, 64, torch.float16)):
        q, k, v, mask = operands(1, 4, 2, T, 100, E, 0, dtype)
        assert torch.equal(cpu.attend(q, k, v, mask, 0.1), attend(q, k, v, mask, 0.1))


def test_a_loaded_model_uses_it():
    """Else every other test here would pass while generation is slow."""
    needs_compiler()
    model, _ = load_model()
    assert {layer.attention.attend for layer in model.layers} == {cpu.attend}


def test_attention_compiles_without_a_break():
    needs_compiler()
    q, k, v, mask = operands(1, 4, 2, 1, 100, 64, 0, torch.bfloat16)
    compiled = torch.compile(lambda *t: cpu.attend(*t, 0.1), fullgraph=True)
    assert torch.equal(compiled(q, k, v, mask), cpu.attend(q, k, v, mask, 0.1))


@pytest.mark.parametrize("seconds, slow", [([0.0001] * 8, False), ([0.005, 0.0001] * 4, False), ([0.005] * 8, True)])
def test_large_pages_that_take_long_are_left_alone(seconds, slow, monkeypatch):
    """Seconds of loading for a few per cent of a step; one interruption that is taken for that."""
    if not hasattr(cpu.mmap, "MADV_HUGEPAGE"):
        pytest.skip("the system has no large pages")
    seconds = iter(seconds)
    monkeypatch.setattr(cpu, "SLOW_PAGES", [])
    monkeypatch.setattr(cpu, "touch", lambda room, at: next(seconds))
    for _ in range(3):
        assert cpu.in_large_pages(9 << 20).fill_(1).sum() == 9 << 20
    assert bool(cpu.SLOW_PAGES) == slow
    assert len(list(seconds)) == (6 if slow else 2)     # once it is known nobody looks again
