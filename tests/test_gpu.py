"""The kernels for GPUs under Triton's interpreter, on a CPU: their numbers, not their speed."""
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")

MULTIPLY = """
import torch
from kernels import cpu, gpu
from quantize import Int4Linear, Int8Linear
cpu.available = lambda *_, **__: False
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
        assert torch.equal(layer(many), torch.nn.functional.linear(many[:, layer.perm], w[:, layer.perm].bfloat16()))
        layer(many[:2].float())
        assert len(calls) == before         # these are written out
        assert not gpu.counters(many.device).any()
print(len(calls))
"""

ATTEND = """
import torch
from kernels import gpu, gpu_attention
from model import attend, attention_mask
calls = []
gpu_attention.attend_few, plain = lambda *a: calls.append(a) or plain(*a), gpu_attention.attend_few
torch.manual_seed(0)
for B, H, K, T, E, S, window, cap, sunk in ((1, 4, 2, 1, 64, 256, 0, 0.0, False), (2, 8, 2, 5, 32, 700, 0, 0.0, False),
                                            (2, 4, 4, 1, 128, 300, 100, 30.0, True), (3, 8, 1, 3, 16, 64, 0, 0.0, True),
                                            (1, 8, 8, 4, 64, 130, 7, 50.0, False), (40, 8, 8, 1, 16, 70, 0, 0.0, False)):
    k, v = (torch.randn(B, K, S + 1, E).bfloat16()[:, :, :S] for _ in range(2))
    q = torch.randn(B, H, T, E).bfloat16()
    at = torch.randint(0, S - T, (B, 1)) + torch.arange(T)
    mask, sinks = attention_mask(at, torch.arange(S).expand(B, -1), window), torch.randn(H) if sunk else None
    wanted = attend(q.float(), k.float(), v.float(), mask, E ** -0.5, cap, sinks)
    y = gpu_attention.attend(q, k, v, mask, E ** -0.5, cap, sinks)
    assert y.shape == q.shape and y.dtype == q.dtype
    assert (y - wanted).abs().max() < 0.01 * wanted.abs().max(), (B, H, K, T, E, S)
    for unseen in (k, v):               # what no query sees is not looked at
        unseen.masked_fill_(~mask.any(2)[..., None].expand_as(unseen), float("nan") if unseen is k else 1e30)
    assert torch.equal(gpu_attention.attend(q, k, v, mask, E ** -0.5, cap, sinks), y)
before, gpu_attention.COUNTERS = len(calls), 2
for E, T in ((80, 1), (64, 16), (64, 1)):       # no power of two; a prompt; more key heads than are counted
    q, k = torch.randn(2, 2, T, E).bfloat16(), torch.randn(2, 2, 64, E).bfloat16()
    gpu_attention.attend(q, k, k, torch.ones(2, 1, T, 64, dtype=torch.bool), 1.0)
assert len(calls) == before and not gpu.counters(q.device).any()
print(before)
"""

FUSED = """
import itertools
import torch
from kernels import cpu, gpu, gpu_block
from model import ACTIVATIONS, ModelArgs, RMSNorm
from quantize import Int4Linear, Int8Linear
cpu.available = lambda *_, **__: False
torch.manual_seed(0)
K, F, M = 256, 96, 3

def close(y, wanted, what):
    assert y.shape == wanted.shape and y.dtype == torch.bfloat16, what
    for mine, its in zip(y.float(), wanted):            # row by row: they differ in size
        assert (mine - its).abs().max() < 0.01 * its.abs().max(), what

def layers(N, K):
    yield torch.nn.Linear(K, N, bias=True, dtype=torch.bfloat16)
    for kind, group in ((Int4Linear, 32), (Int4Linear, 128), (Int8Linear, 0)):
        layer = kind.quantize(torch.randn(N, K) * 0.1, group)
        layer.bias = torch.randn(N).bfloat16()
        yield layer.pack()

def exact(layer, x):
    w = layer.weight.float() if type(layer) is torch.nn.Linear else layer.dequantize()
    return x @ w.T + layer.bias.float()

with torch.no_grad():
    for layer, style in itertools.product(layers(2 * F, K), ("llama", "float32", "gemma")):
        norm = RMSNorm(K, ModelArgs(8, 8, 1, 1, norm_style=style, norm_eps=0.01))
        norm.weight.data = torch.randn(K).bfloat16()
        x = (torch.randn(M, K) * torch.tensor([[0.1], [1], [10]])).bfloat16()
        normed = RMSNorm.forward(norm, x.float())
        for name, activate in ACTIVATIONS.items():
            close(gpu_block.product(layer, x, norm, name), activate(*exact(layer, normed).chunk(2, -1)), (layer, style, name))
        close(gpu_block.product(layer, x, norm), exact(layer, normed), (layer, style))
    for layer in layers(40, 1152):              # shared by two programs
        x, rest = torch.randn(M, 1152).bfloat16(), torch.randn(M, 40).bfloat16()
        close(gpu_block.product(layer, x, residual=rest, alpha=0.3), rest.float() + 0.3 * exact(layer, x.float()), layer)
        assert not gpu.counters(x.device).any()
"""

ROTATE = """
import itertools
import torch
from kernels.gpu_attention import rotate_and_keep
from model import KVCache, ModelArgs, RMSNorm, rotate
torch.manual_seed(0)
B, T, H, K, E, S = 3, 2, 4, 2, 32, 40
at = torch.tensor([[3, 4], [0, 1], [38, 39]])
with torch.no_grad():
    for r, style in itertools.product((E, 16, 0), ("", "llama", "gemma")):
        args = ModelArgs(8, H * E, 1, H, K, norm_style=style or "llama")
        norms, caches = [RMSNorm(E, args) for _ in range(2)], [KVCache(args) for _ in range(2)]
        for norm, cache in zip(norms, caches):
            norm.weight.data = torch.randn(E)
            cache.allocate(4, S, torch.zeros(1).to(torch.float32 if cache is caches[0] else torch.bfloat16))
        qkv, angles = torch.randn(B, T, (H + 2 * K) * E).bfloat16(), torch.rand(B, 1, T, r // 2) * 9
        q, k, v = (t.view(B, T, -1, E).transpose(1, 2) for t in qkv.float().split([H * E, K * E, K * E], -1))
        if style:
            q, k = norms[0](q), norms[1](k)
        if r:
            q, k = (rotate(t, angles.cos(), angles.sin()) for t in (q, k))
        caches[0]((torch.arange(B)[:, None, None], torch.arange(K)[:, None], at[:, None]), k, v, S)
        mine = rotate_and_keep(qkv, *((angles.cos(), angles.sin()) if r else (None, None)), at, caches[1].k, caches[1].v,
                               *([n.weight for n in norms] if style else [None, None]), style, 1e-5)
        for y, wanted in ((mine, q), (caches[1].k, caches[0].k), (caches[1].v, caches[0].v)):
            assert y.shape == wanted.shape and (y - wanted).abs().max() < 0.01 * wanted.abs().max(), (r, style)
"""

BLOCK = """
import copy
import sys
import torch
from kernels import gpu_block
from model import ModelArgs, Transformer
from quantize import Int4Linear, Int8Linear, pack_model
torch.manual_seed(0)

def made(kind, **form):
    model = Transformer(ModelArgs(100, 128, 2, 4, 2, 32, 192, layer_windows=[0, 5], layer_ropes=[0, 0], **form))
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.3) + (p.dim() == 1)
    model = model.bfloat16().eval()
    for name, m in list(model.named_modules()) if kind else []:
        if type(m) is torch.nn.Linear and "layers" in name:
            parent, _, leaf = name.rpartition(".")
            layer = kind.quantize(m.weight.data, 32)
            layer.bias = m.bias
            setattr(model.get_submodule(parent), leaf, layer)
    return model

def answers(model):
    model.setup_caches(3, 40)
    ids, starts = torch.arange(60).view(3, 20) % 97, torch.tensor([[20], [11], [7]])
    model(ids, torch.arange(20))
    return torch.cat([model(ids[:, :1], starts, slots=30), model(ids[:, 3:7], starts + 1 + torch.arange(4), slots=36)], 1)

FORMS = [dict(), dict(qk_norm="head", norm_style="float32"),
         dict(norm_style="gemma", post_attention_norm=True, post_ffn_norm=True, embedding_scale=8.0, activation="gelu_tanh"),
         dict(residual_scale=0.22, qkv_bias=True, o_bias=True, ffn_bias=True, attention_sinks=True, activation="silu_clamped"),
         dict(attention_norm=False, ffn_norm=False, post_attention_norm=True, post_ffn_norm=True, attention_softcap=20.0),
         dict(n_experts=4, active_experts=2, expert_dim=64)]
with torch.no_grad():
    for i, form in enumerate(FORMS):
        plain = made([None, Int4Linear, Int8Linear][i % 3] if len(form) else Int4Linear, **form)
        fused, exact = pack_model(copy.deepcopy(plain)), copy.deepcopy(plain).float()
        for m in exact.modules():
            m.dtype = torch.float32
        assert all(type(block) is gpu_block.FusedBlock for block in fused.layers), form
        packed = [layer.packed for block in fused.layers for layer in gpu_block.layers_of(block) if hasattr(layer, "packed")]
        assert packed == [None] * len(packed)           # nothing lies there twice
        wanted = answers(exact)
        error, usual = ((answers(m) - wanted).abs().max() / wanted.abs().max() for m in (fused, plain))
        assert error < 2 * usual + 0.005, (form, error, usual)
    trials = len(gpu_block.TRIED)
    pack_model(made(Int4Linear))
    assert len(gpu_block.TRIED) == trials == len(FORMS)          # one form is tried once
    def broken(*_):
        raise ValueError("out of resource: shared memory")
    rotate, gpu_block.rotate_and_keep = gpu_block.rotate_and_keep, broken
    model = pack_model(made(None, residual_scale=0.5))
    assert type(model.layers[0]) is Transformer(model.args).layers[0].__class__ and model.layers[0].attention.cache.k is None
    for form in (dict(qk_norm="full"), dict(head_dim=48)):       # not what the kernels know
        model = Transformer(ModelArgs(100, 128, 1, 4, **form)).bfloat16()
        assert type(pack_model(model).layers[0]) is not gpu_block.FusedBlock
"""

COMPILED = """
import torch
from generate import attended, compile_step, decode, make_room
from kernels import gpu_block
from model import ModelArgs, Transformer
from quantize import pack_model
torch.manual_seed(0)
with torch.no_grad():
    model = pack_model(Transformer(ModelArgs(100, 128, 2, 4, 2, 32, 192)).bfloat16().eval())
    assert type(model.layers[1]) is gpu_block.FusedBlock
    make_room(model, 2, 40)
    ids = torch.arange(40).view(2, 20)
    model(ids, torch.arange(20))
    rest = ids[:, :1], torch.full((2, 1), 20), attended(model, 21)
    wanted = decode(model, *rest)
    kept = model.layers[1].attention.cache.k.clone()
    model.layers[1].attention.cache.k[:, :, 20] = 0
    y = compile_step(decode)(model, *rest)
    assert (y - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert torch.equal(model.layers[1].attention.cache.k, kept)
"""

MODEL = """
import torch
from generate import load_model, generate
from kernels import gpu_attention
model, tokenizer = load_model(dtype="bfloat16")
assert all(layer.attention.attend is gpu_attention.attend for layer in model.layers)
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


def test_what_stands_around_a_product():
    """Norms before, activations and residuals behind it: every kind of weights with every kind of those."""
    done = run(FUSED)
    assert done.returncode == 0, done.stderr


def test_queries_and_keys_are_turned_and_kept():
    done = run(ROTATE)
    assert done.returncode == 0, done.stderr


def test_a_fused_block_is_as_close_to_float32_as_a_plain_one():
    """Windows, norms of every kind and place, biases, sinks, soft caps, a mixture; one token and several."""
    done = run(BLOCK, CPU_KERNELS="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: a GPU kernel does not run here (out of resource: shared memory)") == 1


def test_a_compiled_step_writes_the_cache_in_place():
    """The compiler must take six launches a layer as they are, and copy no cache around them."""
    done = run(COMPILED, CPU_KERNELS="0", TORCH_LOGS="post_grad_graphs", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert done.returncode == 0, done.stderr
    lines = [line.split("] ")[-1] for line in done.stderr.splitlines()]
    def calls(what):
        return sum(f"= torch.ops.{what}" in line for line in lines)
    assert [calls(f"gpu_kernels.{name}") for name in ("linear", "rotate_and_keep", "attend")] == [8, 2, 2]
    copies = re.findall(r"aten.copy_.default\((\w+), (\w+)\)", done.stderr)        # a tensor onto itself is none
    assert copies and calls("aten.clone") == 0 and all(to == source for to, source in copies)


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
    """To assembly for sm_90, as an H100 or H200 has it: what the interpreter accepts, a GPU may not. Products run on tensor
    cores, and their weights are fetched ahead, past the cache (which Triton 3.6 cannot ask for)."""
    code = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from kernels import gpu, gpu_attention

def assembly(kernel, types, warps=4, stages=3, **fixed):
    names = kernel.arg_names
    types = dict(zip(names, types)) | dict.fromkeys(fixed, "constexpr")
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*" or types[name] == "i32"}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, attrs=even,
                                       constexprs={(names.index(name),): value for name, value in fixed.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}).asm["ptx"]

for bits, zeros, group, norm, act, split, shape in (
        (4, True, 32, "llama", "silu", 1, 0), (4, True, 128, "", "", 4, 1), (8, False, 4096, "gemma", "gelu", 1, 2),
        (16, False, 0, "float32", "gelu_tanh", 1, 3), (16, False, 0, "", "", 2, 0), (4, False, 64, "", "silu_clamped", 1, 1)):
    stored, config = {4: "*u8", 8: "*i8", 16: "*bf16"}[bits], gpu.SHAPES[shape]
    types = ("*bf16", stored, "*bf16", stored, *["*bf16"] * 4, "*fp32", "*i32", *["i32"] * 4, "fp32", "fp32")
    made = assembly(gpu.multiply.fn, types, config.num_warps, config.num_stages, BITS=bits, ZEROS=zeros, BIAS=True, NORM=norm,
                    ACT=act, ADD=split > 1, GROUP=group, TILE=128, BLOCK_M=16, SPLIT=split, DOT=tl.bfloat16, MATH=tl.bfloat16,
                    **config.kwargs)
    print("mma" in made and "cp.async" in made and ("evict_first" in made or triton.__version__.startswith("3.6.")))
for rows, width, more in ((16, 64, False), (32, 128, True), (16, 256, False)):
    types = (*["*bf16"] * 3, "*u8", *["*bf16"] * 2, *["*fp32"] * 3, "*i32", *["i32"] * 11, "fp32", "fp32")
    print("mma" in assembly(gpu_attention.attend_part, types, CAPPED=more, SINKS=more, ROWS=rows, E=width, SLOTS=64,
                            DOT=tl.bfloat16))
types = ("*u8", "*bf16", "*u8", "*bf16", *["i32"] * 3)
print("cvt" in assembly(gpu.write_out, types, BITS=4, ZEROS=True, GROUP=32, TILE=128, BLOCK_N=32))
types = ("*bf16", "*fp32", "*fp32", "*i64", *["*bf16"] * 5, *["i32"] * 9, "fp32", "i32")
print("sqrt" in assembly(gpu_attention.rotate_and_keep_one, types, NORM="llama", ROPE=True, E=128))
"""
    done = run(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 11
