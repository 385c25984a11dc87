"""kernels/gpu.py under Triton's interpreter, on a CPU: its numbers, not its speed."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")

MULTIPLY = """
import torch
from kernels import cpu, gpu
from quantize import Int4Linear, Int8Linear
cpu.available = lambda: False
calls = []
gpu.linear, plain = lambda *a: calls.append(a) or plain(*a), gpu.linear
torch.manual_seed(0)
for kind, group, zeros in ((Int4Linear, 32, True), (Int4Linear, 128, True), (Int4Linear, 64, False), (Int4Linear, 0, True),
                           (Int8Linear, 0, False), (Int8Linear, 32, False)):
    for N, K in ((100, 256), (64, 1152), (33, 32)):
        layer = kind.quantize(torch.randn(N, K) * torch.logspace(-2, 1, N)[:, None], group)
        layer.zeros = layer.zeros if zeros else None
        layer.perm, layer.bias = torch.randperm(K).int(), torch.randn(N).bfloat16()
        w = layer.dequantize()
        layer.pack()
        assert layer.skinny, (kind, group, K)
        for M in (1, 5, 16, 17, 32):
            x = torch.randn(M, K).bfloat16()
            wanted = x.float() @ w.t() + layer.bias.float()
            for y in (gpu.multiply_layer(layer, x), layer(x.view(1, M, K))[0]):
                error = ((y.float() - wanted).abs() / (x.float().abs() @ w.t().abs() + layer.bias.abs())).max()
                assert error < 5e-3, (kind, group, N, K, M, error)
        layer.bias, many, before = None, torch.randn(33, K).bfloat16(), len(calls)
        layer(many), layer(many[:2].float())
        assert len(calls) == before         # these are dequantized
print(len(calls))
"""

ATTEND = """
import torch
from kernels import gpu
from model import attend, attention_mask
calls = []
gpu.attend_in_parts, plain = lambda *a: calls.append(a) or plain(*a), gpu.attend_in_parts
torch.manual_seed(0)
for B, H, K, T, E, S, window, cap, sunk in ((1, 4, 2, 1, 64, 256, 0, 0.0, False), (2, 8, 2, 5, 32, 700, 0, 0.0, False),
                                            (2, 4, 4, 1, 128, 300, 100, 30.0, True), (3, 8, 1, 3, 16, 64, 0, 0.0, True),
                                            (1, 8, 8, 4, 64, 130, 7, 50.0, False), (40, 8, 8, 1, 16, 70, 0, 0.0, False)):
    k, v = (torch.randn(B, K, S + 1, E).bfloat16()[:, :, :S] for _ in range(2))
    q = torch.randn(B, H, T, E).bfloat16()
    at = torch.randint(0, S - T, (B, 1)) + torch.arange(T)
    mask, sinks = attention_mask(at, torch.arange(S).expand(B, -1), window), torch.randn(H) if sunk else None
    wanted = attend(q.float(), k.float(), v.float(), mask, E ** -0.5, cap, sinks)
    y = gpu.attend(q, k, v, mask, E ** -0.5, cap, sinks)
    assert y.shape == q.shape and y.dtype == q.dtype
    assert (y - wanted).abs().max() < 0.01 * wanted.abs().max(), (B, H, K, T, E, S)
    for unseen in (k, v):               # what no query sees is not looked at
        unseen.masked_fill_(~mask.any(2)[..., None].expand_as(unseen), float("nan") if unseen is k else 1e30)
    assert torch.equal(gpu.attend(q, k, v, mask, E ** -0.5, cap, sinks), y)
before = len(calls)
for E, T in ((80, 1), (64, 16)):                # no power of two; a prompt
    q, k = torch.randn(1, 2, T, E).bfloat16(), torch.randn(1, 2, 64, E).bfloat16()
    gpu.attend(q, k, k, torch.ones(1, 1, T, 64, dtype=torch.bool), 1.0)
assert len(calls) == before
print(before)
"""

MODEL = """
import torch
from generate import load_model, generate
from kernels import gpu
model, tokenizer = load_model(dtype="bfloat16")
assert all(layer.attention.attend is gpu.attend for layer in model.layers)
[row] = generate(model, tokenizer, ["Once upon a time"], max_new_tokens=12, temperature=0)
print(row.text)
"""

REFUSED = """
import torch
from kernels import gpu
from quantize import Int4Linear
layer = Int4Linear.quantize(torch.randn(32, 100), 64)        # the last group is shorter
assert not gpu.works(layer)
layer = Int4Linear.quantize(torch.randn(32, 128), 64)
def broken(*_):
    raise RuntimeError("no such target")
gpu.linear = broken
assert not gpu.works(layer) and not gpu.works(layer)
"""


def run(code, **environment):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment})


def test_few_rows_equal_the_dequantized_weights():
    """Every form, with a bias and another order of inputs; a layer calls the kernel for few rows of bfloat16 alone."""
    done = run(MULTIPLY)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 6 * 3 * 5


def test_attention_equals_the_plain_form():
    """Groups of heads, rows at unlike positions, windows, soft caps, sinks, more slots than are filled."""
    done = run(ATTEND)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 12


def test_a_model_attends_with_it():
    with_it, without = run(MODEL), run(MODEL.replace("assert all", "assert not any"), GPU_KERNELS="0")
    assert with_it.returncode == without.returncode == 0, with_it.stderr + without.stderr
    assert with_it.stdout == without.stdout and len(with_it.stdout.split()) > 5


def test_what_it_cannot_do_is_left_to_pytorch():
    done = run(REFUSED)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: a GPU kernel does not run here (no such target)") == 1


def test_it_can_be_turned_off():
    code = "import torch; from kernels import gpu; from quantize import Int8Linear; " \
           "print(gpu.works(Int8Linear.quantize(torch.randn(32, 128))))"
    assert run(code).stdout.strip() == "True"
    assert run(code, GPU_KERNELS="0").stdout.strip() == "False"


def test_it_compiles_for_a_gpu_that_is_not_here():
    """To a cubin's assembly for sm_90, as an H100 or H200 has it: what the interpreter accepts, a GPU may not."""
    code = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from kernels import gpu
names = gpu.multiply.arg_names
for bits, zeros, tile, rows in ((4, True, 32, 16), (4, True, 128, 32), (8, False, 128, 16)):
    fixed = dict(BITS=bits, ZEROS=zeros, TILE=tile, BLOCK_N=64, BLOCK_M=rows, SPLIT=4, DOT=tl.bfloat16)
    stored = "*u8" if bits == 4 else "*i8"
    types = dict(zip(names, ("*bf16", stored, "*bf16", stored, "*fp32", *["i32"] * 5))) | dict.fromkeys(fixed, "constexpr")
    source = triton.compiler.ASTSource(fn=gpu.multiply, signature=types,
                                       constexprs={(names.index(name),): value for name, value in fixed.items()})
    print("mma" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""
    attend = """
names = gpu.attend_part.arg_names
for rows, width, capped in ((16, 64, False), (32, 128, True), (16, 256, False)):
    fixed = dict(CAPPED=capped, ROWS=rows, E=width, SLOTS=64, DOT=tl.bfloat16)
    types = dict(zip(names, (*["*bf16"] * 3, "*u8", *["*fp32"] * 3, *["i32"] * 10, "fp32", "fp32"))) | dict.fromkeys(fixed, "constexpr")
    source = triton.compiler.ASTSource(fn=gpu.attend_part, signature=types,
                                       constexprs={(names.index(name),): value for name, value in fixed.items()})
    print("mma" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""
    done = run(code + attend, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 6
