"""quantize.py, the CPU kernel, gptq.py and the command: each packed path against the dequantized weights."""
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import gptq
import quantize_cli
from checkpoint import CheckpointError, load_checkpoint, save_checkpoint, weight_bytes
from generate import generate, load_model
from kernels import cpu
from model import ModelArgs, Transformer
from quantize import Fp4Linear, Int4Linear, Int8Linear, QuantizedLinear, empty_layer, pack_model

STORIES = ROOT / "checkpoints" / "stories"
FORMATS = [(Int8Linear, 0), (Int8Linear, 32), *((Int4Linear, g) for g in (32, 64, 128, 256))]
WIDTHS = [32, 33, 100, 288, 320]        # a group, none, none, half a one over, several
formats = pytest.mark.parametrize("kind, group", FORMATS, ids=lambda v: getattr(v, "__name__", v))


def weight(N, K, dtype=torch.float32, seed=0):
    """Rows of unlike size, one of them zero, one of one sign."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 1, N)[:, None]
    w[1] = 0
    w[2] = w[2].abs() + 1
    return w.to(dtype)


def inputs(M, K, dtype=torch.float32):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


def close(y, reference, dtype):
    """Equal but for the rounding of the inputs' and the output's dtype."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    scale = reference.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert ((y.float() - reference) / scale).abs().max() < tolerance


def by_tiles(M):
    """Whether the processor's tiles multiply so many rows, as they are."""
    return torch.ops.cpu_kernels.by_tiles(M, 8)


# ---- rounding --------------------------------------------------------------------------------------------------

@formats
@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_half_a_step(kind, group, K, dtype):
    """A scale rounded down, or a zero point out of range, clips the ends of a group."""
    w = weight(40, K, dtype)
    layer = kind.quantize(w, group)
    step = layer.scales.float().repeat_interleave(layer.groupsize, 1)[:, :K]
    assert ((layer.dequantize() - w.float()).abs() <= step * (0.5 + 1e-5)).all()


def test_bytes_are_what_arithmetic_says():
    for (kind, group), limit in zip(FORMATS, (1.0, 1.13, 0.625, 0.547, 0.524, 0.512)):
        layer = kind.quantize(weight(64, 2048), group)
        assert weight_bytes(layer) / (64 * 2048) <= limit * 1.01
        packed = layer.pack()
        assert sum(b.nbytes for b in packed.buffers()) <= weight_bytes(kind.quantize(weight(64, 2048), group))


@formats
def test_large_weights_are_rounded_in_pieces(kind, group, monkeypatch):
    """The pieces must join."""
    import quantize
    w = weight(50, 96)
    whole = kind.quantize(w, group).dequantize()
    monkeypatch.setattr(quantize, "CHUNK", 7 * 96)
    assert torch.equal(kind.quantize(w, group).dequantize(), whole)


# ---- multiplying -----------------------------------------------------------------------------------------------

@pytest.fixture(params=["kernel", "rounded", "stock", "plain"])
def path(request, monkeypatch):
    """A way to multiply; without the compiler there is no kernel, and without the operators only the plain one."""
    if request.param not in ("kernel", "rounded"):
        monkeypatch.setattr(cpu, "available", lambda *_, **__: False)
    elif not cpu.available(quantized=True):
        pytest.skip("there is no C++ compiler")
    elif not torch.ops.cpu_kernels.round_activations(request.param == "rounded") and request.param == "rounded":
        pytest.skip("this processor has no dot product of bytes")
    if request.param == "plain":
        monkeypatch.setattr(QuantizedLinear, "pack", lambda self: self)
    yield request.param
    if request.param == "kernel":
        torch.ops.cpu_kernels.round_activations(True)


def rounded(x):
    """What the kernel makes of bfloat16: 32 inputs share a scale, by which they become -127 ... 127."""
    blocks = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) * (1 / 127)
    return ((blocks / scale.clamp(min=1e-30)).round() * scale).flatten(-2)[..., :x.shape[-1]]


@formats
@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_path_multiplies_the_dequantized_weights(kind, group, K, dtype, path):
    """The oracle is w itself; a packed layout that is off by a lane gives garbage only at some widths and rows."""
    layer = kind.quantize(weight(48, K, seed=K), group)
    layer.dtype = dtype
    w = layer.dequantize()
    layer.pack()
    for M in (1, 2, 3, 4, 5, 7, 12, 13, 16, 33, 70, 530):
        x = inputs(M, K, dtype)
        seen = rounded(x) if path == "rounded" and dtype == torch.bfloat16 and not by_tiles(M) else x.float()
        close(layer(x.view(M, 1, K)).view(M, -1), seen @ w.t(), dtype)
    ids = torch.tensor([[0, 47, 3], [16, 15, 1]])
    assert torch.equal(layer(ids), w[ids].to(dtype))
    assert torch.equal(layer.dequantize(), w)


@formats
def test_bias_and_order_of_inputs(kind, group, path):
    K = 96
    w, perm = weight(32, K), torch.randperm(K, generator=torch.Generator().manual_seed(1))
    layer = kind.quantize(w[:, perm], group)
    layer.perm, layer.bias, layer.dtype = perm.int(), inputs(1, 32)[0], torch.float32
    wanted = layer.dequantize()
    assert (wanted - w).abs().max() < (layer.scales.float().max())
    layer.pack()
    close(layer(inputs(3, K)), inputs(3, K) @ wanted.t() + layer.bias, torch.float32)
    assert torch.equal(layer(torch.arange(32)), wanted)


@pytest.mark.parametrize("bits, lowest, highest, beside", [(8, -128, 127, 2), (8, -128, 127, 3), (4, -7, 8, 0), (4, -7, 8, 1), (4, -7, 8, 2)])
@pytest.mark.parametrize("path", ["rounded"], indirect=True)
def test_weights_of_zero_give_exactly_zero(bits, lowest, highest, beside, path):
    """Value and offset that cancel, beside inputs of any size and sign: what a block's sum starts from."""
    K, N = 224, 40
    offsets = torch.randint(lowest, highest + 1, (N, K // 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    if bits == 8:
        offsets[offsets == -128] = 127                     # whose value would be 128
    offsets[1] = 0
    values = -offsets.repeat_interleave(32, 1)
    values[1] = 1
    if bits == 4 and beside == 2:
        offsets[1], values[1] = -8, 7                      # one that does not fit
    scales = torch.full((N, K // 32), 0.1, dtype={1: torch.float16, 3: torch.float32}.get(beside, torch.bfloat16))
    packed = cpu.pack_scaled(values if bits == 8 else (values + 8).to(torch.uint8), scales, offsets, bits, 32)
    assert (packed[1].dtype == torch.int32) == (beside == 0) and (packed[2] is None) == (beside < 2)
    for M in (1, 2, 5, 8, 9, 32, 100):
        x = inputs(M, K, torch.bfloat16) * torch.logspace(-3, 3, M)[:, None].bfloat16()
        y = cpu.linear(x, *packed, N, bits, 32)
        assert not y[:, [0, *range(2, N)]].any() and y[:, 1].all()


@pytest.mark.parametrize("kind, group", [(Int8Linear, 0), (Int4Linear, 32), (Int4Linear, 64), (Fp4Linear, 32)])
@pytest.mark.parametrize("M", [1, 3, 9, 12, 13, 16, 31, 100, 1030])
@pytest.mark.parametrize("path", ["rounded"], indirect=True)
def test_rounded_activations_lose_little_and_rows_do_not_mix(kind, group, M, path):
    """Half a step in 127 of a block's largest input; and a row's bits are the same alone and among others, or of 17 and more rows
    where tiles multiply them."""
    K, N = 200, 40
    if kind is Fp4Linear:
        layer = Fp4Linear(K, N, group, device="cpu")
        layer.weight.random_(256), layer.scales.fill_(0.25)
    else:
        layer = kind.quantize(weight(N, K), group)
    w = layer.dequantize()
    layer.pack()
    x = inputs(M, K, torch.bfloat16)
    x[0, :32], x[0, 32:64], x[0, 70] = 0, 1e-30, 300
    y = layer(x)
    close(y, (x.float() if by_tiles(M) else rounded(x)) @ w.t(), torch.bfloat16)
    blocks = F.pad(x.float().abs(), (0, -K % 32)).unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)[:, :K]
    assert ((y.float() - x.float() @ w.t()).abs() <= (blocks / 254) @ w.abs().t() + y.float().abs() / 128).all()
    among = 17 if by_tiles(M) else 1
    assert all(torch.equal(layer(x[m:m + 1].expand(among, -1))[0], y[m]) for m in range(0, M, max(1, M // 40)))
    x[0, 40], x[M // 2, K - 1] = math.inf, math.nan
    z = layer(x)
    assert not z[0].isfinite().any() and z[M // 2].isnan().all() and torch.equal(z[M // 2 + 1:], y[M // 2 + 1:])


def test_an_operator_that_is_missing_is_told_once(monkeypatch, capsys):
    """Another torch may lack the operator; the layer must then multiply all the same."""
    monkeypatch.setattr(cpu, "available", lambda *_, **__: False)

    def gone(*_):
        raise NotImplementedError("no such operator here")
    monkeypatch.setattr(Int8Linear, "stock_multiply", gone)
    for _ in range(2):
        layer = Int8Linear.quantize(weight(32, 64))
        w = layer.dequantize()
        close(layer.pack()(inputs(3, 64)), inputs(3, 64) @ w.t(), torch.float32)
    assert capsys.readouterr().err.count("no such operator here") == 1


def test_no_compiler_is_one_notice(tmp_path):
    """A machine without g++ must run, and say why it is slow."""
    code = "from generate import load_model, generate; m, t = load_model(); print(len(generate(m, t, ['Once'], " \
           "max_new_tokens=3)[0].ids))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={"PATH": "/usr/bin:/bin", "CXX": "no-such-compiler", "HOME": str(tmp_path),
                               "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.strip() == "3", done.stderr
    assert done.stderr.count("note: the CPU kernels could not be built") == 1


@pytest.mark.parametrize("group", [0, 32])
def test_the_portable_kernel_agrees(group, tmp_path):
    """Built without the bfloat16 instructions, as on AVX2 or ARM, in bfloat16 too."""
    try:
        library = cpu.build("linear.cpp", "-DPORTABLE", f"-DLIBRARY=portable_kernels{group}", "-O1")
    except (OSError, subprocess.SubprocessError):
        pytest.skip("there is no C++ compiler")
    torch.ops.load_library(library)
    linear = getattr(torch.ops, f"portable_kernels{group}").linear
    for kind in (Int8Linear, Int4Linear):
        layer = kind.quantize(weight(40, 96), group)
        w = layer.dequantize()
        layer.pack_for_kernel()
        for M in (1, 3, 5, 40):
            x = inputs(M, 96, torch.bfloat16)
            y = linear(x, layer.packed, layer.packed_scales, layer.packed_offsets, 40, layer.bits, layer.kernel_group())
            close(y, x.float() @ w.t(), torch.bfloat16)


@pytest.mark.parametrize("kind, group", [(None, 0), (Int8Linear, 0), (Int8Linear, 96), (Int4Linear, 32), (Int4Linear, 96), (Fp4Linear, 32)])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows(kind, group, threads):
    """Rows, inputs and outputs that fill no tile, group or piece of a panel; and weights that do not fit the caches."""
    if not cpu.available(quantized=True):
        pytest.skip("there is no C++ compiler")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.ops.cpu_kernels.round_activations(False)
    try:
        for N, K in ((7, 8), (70, 288), (300, 1160), (48, 2048), (2080, 2048), (2083, 2048)):
            layer = kind(K, N, group, device="cpu") if kind is Fp4Linear else kind and kind.quantize(weight(N, K), group)
            if kind is Fp4Linear:
                layer.weight.random_(256), layer.scales.fill_(0.25)
            wanted = layer.dequantize().float() if kind else weight(N, K).bfloat16().float()
            layer = layer.pack() if kind else cpu.PackedLinear(wanted.bfloat16())
            for M in (1, 5, 10, 16, 17, 31, 33, 530):
                x = inputs(M, K, torch.bfloat16)
                lost = (layer(x).float() - x.float() @ wanted.t()).abs()                # at most the weights' rounding and y's
                assert (lost <= x.float().abs() @ wanted.abs().t() / 128 + 1e-5).all()
    finally:
        torch.set_num_threads(before)
        torch.ops.cpu_kernels.round_activations(True)


def test_vectors_serve_where_there_could_be_tiles():
    """What a system that does not give a program its tiles leaves."""
    if not (cpu.available(quantized=True) and by_tiles(17)):
        pytest.skip("there is no C++ compiler, or no tiles")
    tests = ["tests/test_quantize.py::test_many_rows", *(f"tests/test_kernels.py::test_{name}" for name in (
        "attention_equals_the_plain_form", "a_token_gets_the_same_bits_alone_and_among_others", "slots_nobody_sees_do_not_matter",
        "attention_of_prompts"))]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, env=os.environ | {"CPU_KERNELS": "vectors"})
    assert done.returncode == 0 and set(done.stdout.split()[0]) == {"."}, done.stdout


@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("kind, lowest, least, beside", [
    (Int4Linear, -7, 2 ** -31, ()), (Int4Linear, -8, 2 ** -31, ("scales", "offsets")), (Int4Linear, -7, -1.0, ("scales",)),
    (Fp4Linear, None, 2 ** -31, ()), (Int4Linear, None, 2 ** -31, ()), (Int4Linear, None, -1.0, ("scales",))])
def test_scales_and_offsets_go_among_the_weights_where_they_fit(kind, group, lowest, least, beside):
    """GPTQ files have zero points of 1 ... 16, and 16 is no nibble; 12 bits are 32 powers of two. The last group may be short."""
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    layer = kind(168, 100, group, zeros=lowest is not None)
    layer.weight.random_(256)
    layer.scales.copy_(torch.rand(layer.scales.shape).clamp(min=1e-3))
    layer.scales[5, -1], layer.scales[6, -1] = least, 1.9921875
    if lowest is not None:
        layer.zeros.random_(16)
        layer.zeros[3, -1], layer.zeros[4, -1] = 8 - lowest, 0
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    w = layer.dequantize()
    layer.pack()
    assert (layer.packed_scales.dtype == torch.int32) == (not beside) and (layer.packed_offsets is None) == ("offsets" not in beside)
    ids = torch.tensor([[99, 5]])
    assert torch.equal(layer.dequantize(), w) and torch.equal(layer.dequantize(ids), w[ids])
    for M, dtype in ((1, torch.float32), (40, torch.bfloat16), (5, torch.bfloat16)):
        x = inputs(M, 168, dtype)
        close(layer(x), (rounded(x) if dtype == torch.bfloat16 and not by_tiles(M) else x.float()) @ w.t(), dtype)
    layer.unpack_from_kernel()
    assert before.keys() == layer.state_dict().keys()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_a_scale_that_is_nothing_beside_the_largest():
    """Rows that were never trained: their scales, some 1e-25, become 2^-32 of the largest one."""
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    w = weight(64, 96)
    w[40] *= 1e-25
    layer = Int4Linear.quantize(w, 32)
    before = layer.dequantize()
    layer.pack()
    after = layer.dequantize()
    assert layer.packed_scales.dtype == torch.int32 and layer(inputs(2, 96, torch.bfloat16)).isfinite().all()
    after[40], before[40] = after[40] / w.abs().max() < 1e-8, True
    assert torch.equal(after, before)


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_broken_scale_spoils_no_other(scale):
    """The largest sets what the others are counted from, and nothing is counted from these."""
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    layer = Int4Linear.quantize(weight(64, 96), 32)
    layer.scales[40, 1] = scale
    before = layer.dequantize()
    layer.pack()
    torch.testing.assert_close(layer.dequantize(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_head_is_what_weights_h_says(groups):
    numbers = torch.arange(40 * groups).view(40, groups)
    heads = cpu.pack_heads(numbers * 29, (numbers % 16 - 7).to(torch.int8))
    assert heads.shape == (2, groups, 64)
    for n in range(40):
        for g in range(groups):
            head, shift = heads[n // 32, g].tolist(), n % 32 // 16 * 4
            assert head[n % 32] | (head[32 + n % 16] >> shift & 15) << 8 == numbers[n, g] * 29
            assert head[48 + n % 16] >> shift & 15 == numbers[n, g] % 16


@pytest.mark.parametrize("N, K", [(32, 64), (100, 33), (40, 2056)])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_layout_is_what_weights_h_says(N, K, bits):
    """Written out: the place of every input of every output. And `rows` reads it back."""
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    values = weight(N, K, torch.bfloat16) if bits == 16 else torch.randint(-128, 128, (N, K), dtype=torch.int8)
    values = values & 15 if bits == 4 else values
    full = F.pad(values, (0, -K % 8, 0, -N % 32)).view(-1, 2, 16, -(-K // 8), 8)    # panel, half, output, unit, input
    if bits == 16:
        plain = full.unflatten(-1, (4, 2)).permute(0, 3, 1, 4, 2, 5).flatten()
    elif bits == 8:
        quads = full[..., [0, 4, 1, 5, 2, 6, 3, 7]].unflatten(-1, (2, 4))
        plain = quads.permute(0, 3, 1, 4, 2, 5).flatten().view(torch.uint8) ^ 128
    else:
        low, high = (full[..., order] for order in ([0, 4, 1, 5], [2, 6, 3, 7]))
        plain = (low | high << 4).permute(0, 3, 1, 2, 4).flatten().view(torch.uint8)
    packed = cpu.pack(values, bits)
    assert torch.equal(packed, plain)
    assert torch.equal(cpu.rows(packed, torch.arange(N), N, bits)[:, :K], values)


@pytest.mark.parametrize("N, K", [(32, 64), (100, 33), (5, 2056)])
def test_packed_bfloat16_equals_linear(N, K):
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    w, b = weight(max(N, 5), K, torch.bfloat16)[:N], inputs(1, N, torch.bfloat16)[0]
    layer = cpu.PackedLinear(w, b)
    for M in (1, 4, 12, 33, 100, 530):
        x = inputs(M, K, torch.bfloat16)
        close(layer(x), F.linear(x.float(), w.float(), b.float()), torch.bfloat16)
    assert torch.equal(cpu.PackedTable(w)(torch.arange(N)), w)


def test_compiled_without_a_break():
    """fullgraph raises at a break."""
    layers = [Int8Linear.quantize(weight(64, 96)).pack(), Int4Linear.quantize(weight(64, 96), 32).pack()]
    layers += [cpu.PackedLinear(weight(64, 96, torch.bfloat16))] if cpu.available() else []

    def f(x):
        return sum(layer(x) for layer in layers)
    x = inputs(2, 96, torch.bfloat16)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x).float(), f(x).float(), rtol=2e-2, atol=2e-2)


# ---- GPTQ ------------------------------------------------------------------------------------------------------

def correlated(K, n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, K, generator=g) @ torch.randn(K, K, generator=g)
    return x, x.t() @ x


def hessian_error(layer, w, H):
    d = layer.dequantize() - w
    return ((d @ H) * d).sum().item()


@pytest.mark.parametrize("K, group, options", [
    (64, 32, {}), (96, 64, {}), (100, 32, {}), (320, 128, {}), (256, 256, {}), (96, 32, {"act_order": True}),
    (96, 32, {"blocksize": 20}), (320, 256, {"blocksize": 64}), (96, 32, {"percdamp": 0.1})])
def test_gptq_beats_rounding_and_the_clip_search_never_hurts(K, group, options):
    w, (_, H) = weight(24, K), correlated(K)
    plain = hessian_error(Int4Linear.quantize(w, group), w, H)
    unclipped = gptq.round_weight(w, H, group, gptq.Settings(clip=False, **options))
    clipped = gptq.round_weight(w, H, group, gptq.Settings(**options))
    assert hessian_error(unclipped, w, H) < 0.6 * plain
    assert hessian_error(clipped, w, H) <= hessian_error(unclipped, w, H) * (1 + 1e-4)


def test_gptq_with_no_correlation_is_rounding():
    """With H = 1 an error cannot be made good elsewhere; and dead inputs must not divide by zero."""
    w = weight(16, 64)
    layer = gptq.round_weight(w, torch.eye(64), 32, gptq.Settings(clip=False))
    assert torch.equal(layer.dequantize(), Int4Linear.quantize(w, 32).dequantize())
    H = correlated(64)[1]
    H[:, 5] = H[5] = 0
    assert gptq.round_weight(w, H, 32).dequantize().isfinite().all()


def test_hessian_counts_real_tokens_only():
    """Padding must not weigh in, nor the order of samples."""
    layer, x = nn.Linear(8, 4), torch.randn(2, 5, 8)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    H = gptq.hessians({"layer": layer}, [lambda: layer(x)], [valid])["layer"]
    real = torch.cat([x[0, :3], x[1]])
    torch.testing.assert_close(H, real.t() @ real)


def perplexity(path, texts):
    """Each story on its own, as the model was trained."""
    model, tokenizer = load_model(path, dtype="float32")
    nats = tokens = 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor(tokenizer.encode(text)[:model.args.max_position])
            nats += F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
            tokens += len(ids) - 1
    return math.exp(nats / tokens)


@pytest.fixture(scope="module")
def texts(shared_data):
    """Stories the bundled model was trained on, to look at, and stories it has not seen, to judge."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from train_stories import read_stories, split_held_out
    return split_held_out(read_stories(shared_data / "text" / "tinystories", talk=False))


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The bundled model where it may be written beside."""
    folder = tmp_path_factory.mktemp("m") / "stories"
    folder.mkdir()
    for file in STORIES.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def command(*words):
    return subprocess.run([sys.executable, "quantize.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture(scope="module")
def quantized(stories, texts):
    """mode -> file, by the command."""
    sample = stories.parent / "calibration.jsonl"
    sample.write_text("\n".join(json.dumps({"text": text}) for text in texts[0][:500]))
    files = {}
    for mode in ("int8", "int4", "int4-gptq"):
        extra = ["--calibration_file", sample, "--calibration_limit", 200, "--calibration_seq_length", 256,
                 "--pad_calibration_inputs"] if mode == "int4-gptq" else []
        done = command("--checkpoint_path", stories, "--mode", mode, *extra)
        assert done.returncode == 0, done.stderr
        files[mode] = done.stdout.strip()
    return files


def test_the_cost_in_perplexity(quantized, stories, texts):
    """int8 loses next to nothing; GPTQ wins back a third or more of what rounding to the nearest loses."""
    exact = perplexity(stories / "model.safetensors", texts[1])
    loss = {mode: perplexity(file, texts[1]) - exact for mode, file in quantized.items()}
    assert abs(loss["int8"]) < 0.002 * exact
    assert loss["int4-gptq"] < 2 / 3 * loss["int4"] < 0.02 * exact


def test_gptq_is_deterministic(stories, tmp_path):
    for file in STORIES.glob("tokenizer*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = tmp_path / "t.jsonl"
    lines = (STORIES / "held_out.txt").read_text().split("\n")
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines if len(line) > 20))
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        o = quantize_cli.parser().parse_args(["--checkpoint_path", str(stories), "--mode", "int4-gptq", "--output",
                                              str(file), "--calibration_file", str(text), "--calibration_limit", "8",
                                              "--quiet", "--act_order"])
        quantize_cli.check(o)
        quantize_cli.run(o)
    assert files[0].read_bytes() == files[1].read_bytes()
    model, tokenizer = load_model(files[0])
    assert model.layers[0].feed_forward.w2.perm is not None
    assert generate(model, tokenizer, ["Once upon a time"], max_new_tokens=8, temperature=0)[0].text


# ---- the command -----------------------------------------------------------------------------------------------

def test_names_and_contents(quantized, stories):
    names = {mode: file.rpartition("/")[2] for mode, file in quantized.items()}
    assert names == {"int8": "model_int8.safetensors", "int4": "model_int4.g32.safetensors",
                     "int4-gptq": "model_int4-gptq.g32.safetensors"}
    sizes = {mode: (stories / name).stat().st_size for mode, name in names.items()}
    plain = (stories / "model.safetensors").stat().st_size
    assert sizes["int8"] < 0.52 * plain and sizes["int4"] < 0.31 * plain


def test_a_quantized_file_needs_no_flag_and_no_name(quantized, tmp_path):
    """Nothing may be read off the path."""
    for mode, file in quantized.items():
        folder = tmp_path / f"x{mode[3:]}"
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(open(file, "rb").read())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((STORIES / name).read_bytes())
        done = subprocess.run([sys.executable, "generate.py", "--checkpoint_path", folder, "--json", "--max_new_tokens",
                               "8", "--temperature", "0"], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["quant"] == ("int8" if mode == "int8" else "int4.g32") and found["params"] == 3049920
        assert found["text"].startswith(", there was a little")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_saved_and_loaded_bit_by_bit(suffix, mode, tmp_path):
    args = ModelArgs(vocab_size=50, dim=64, n_layers=2, n_heads=4, ffn_dim=100, qkv_bias=True)
    torch.manual_seed(0)
    model = Transformer(args).eval().requires_grad_(False)
    save_checkpoint(model, tmp_path / f"m{suffix}")
    file = quantize_cli.main(["--checkpoint_path", str(tmp_path / f"m{suffix}"), "--mode", mode, "--quiet"])
    assert file == 0
    name = f"model_{mode}" + ("" if mode == "int8" else ".g32") + suffix
    first, again = load_checkpoint(tmp_path / name), load_checkpoint(tmp_path / name)
    w = model.layers[1].feed_forward.w2.weight
    kind, group = (Int8Linear, 0) if mode == "int8" else (Int4Linear, 32)
    assert torch.equal(first.layers[1].feed_forward.w2.dequantize(), kind.quantize(w, group).dequantize())
    tokens = torch.randint(50, (2, 9))
    assert torch.equal(first(tokens), again(tokens))
    torch.testing.assert_close(pack_model(again)(tokens), first(tokens), rtol=1e-4, atol=1e-4)
    assert (model(tokens) - first(tokens)).abs().max() < 0.5 * model(tokens).std()


def test_recipe(stories, tmp_path):
    out = tmp_path / "r.safetensors"
    done = command("--checkpoint_path", stories, "--mode", "int4", "--groupsize", 64, "--output", out,
                   "--recipe", r"layers\.0\.=none", "--recipe", "w2=int8", "--recipe", "wo=int4.g128",
                   "--recipe", "tok_emb=int8")
    assert done.returncode == 0, done.stderr
    model = load_checkpoint(out)
    assert type(model.layers[0].feed_forward.w2) is nn.Linear
    assert type(model.layers[1].feed_forward.w2) is Int8Linear and type(model.tok_embeddings) is Int8Linear
    assert model.layers[1].attention.wo.groupsize == 128 and model.layers[1].attention.wqkv.groupsize == 64
    assert re.search(r"tok_embeddings \(also the head\) +int8", done.stderr)
    assert re.search(r"feed_forward.w2 +bfloat16 +1 x", done.stderr)


def test_an_untied_table_stays_unless_named(tmp_path):
    args = ModelArgs(vocab_size=64, dim=32, n_layers=1, n_heads=2, ffn_dim=64)
    save_checkpoint(Transformer(args), tmp_path / "m.safetensors")
    for recipe, table in (([], False), (["--recipe", "tok_embeddings=int8"], True)):
        out = str(tmp_path / f"q{table}.safetensors")
        assert quantize_cli.main(["--checkpoint_path", str(tmp_path / "m.safetensors"), "--mode", "int4", "--quiet",
                                  "--output", out, *recipe]) == 0
        model = load_checkpoint(out)
        assert isinstance(model.tok_embeddings, QuantizedLinear) == table
        assert isinstance(model.output, Int4Linear)
        assert pack_model(model)(torch.arange(5)[None]).isfinite().all()


def test_peak_memory(tmp_path):
    """A model of 180 MB in float32: the source is mapped, and rounding must not hold a second copy."""
    args = ModelArgs(vocab_size=4096, dim=512, n_layers=13, n_heads=8, ffn_dim=1408, tied=True)
    save_checkpoint(Transformer(args), tmp_path / "m.safetensors")
    code = ("import sys, resource; sys.path.insert(0, '.'); import torch, quantize_cli\n"
            "def anon(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
            "import threading, time; peak = [0]; before = anon()\n"
            "def watch():\n"
            "    while True: peak[0] = max(peak[0], anon()); time.sleep(0.002)\n"
            "threading.Thread(target=watch, daemon=True).start()\n"
            f"assert quantize_cli.main(['--checkpoint_path', {str(tmp_path / 'm.safetensors')!r}, '--quiet']) == 0\n"
            "print((peak[0] - before) * 1024)")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    output = (tmp_path / "model_int8.safetensors").stat().st_size
    assert int(done.stdout.split()[-1]) < 1.2 * output + 80e6        # 80 MB: rows in float32, and what malloc keeps


def test_interrupted_nothing_is_half_written(stories, tmp_path, monkeypatch):
    calls = []

    def stop(done, total, name):
        calls.append(name)
        if done == 5:
            raise KeyboardInterrupt
    monkeypatch.setattr(quantize_cli, "progress_bar", stop)
    out = tmp_path / "x.safetensors"
    assert quantize_cli.main(["--checkpoint_path", str(stories), "--output", str(out)]) == 130
    assert len(calls) == 5 and list(tmp_path.iterdir()) == []


def test_disk_full(stories, tmp_path, capsys):
    import checkpoint

    def no_space(*_):
        raise OSError(28, "No space left on device")
    patch = pytest.MonkeyPatch()
    patch.setitem(checkpoint.__dict__, "write_safetensors", no_space)
    try:
        assert quantize_cli.main(["--checkpoint_path", str(stories), "--quiet", "--output",
                                  str(tmp_path / "x.safetensors")]) == 1
    finally:
        patch.undo()
    assert "No space left on device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def damaged(folder, change):
    """The bundled model quantized, with its tensors and description changed."""
    from safetensors import safe_open
    import checkpoint
    file = folder / "model_int4.g32.safetensors"
    if not file.exists():
        assert quantize_cli.main(["--checkpoint_path", str(folder), "--mode", "int4", "--quiet"]) == 0
    with safe_open(file, framework="pt") as f:
        state = {name: f.get_tensor(name) for name in f.keys()}
        about = json.loads(f.metadata()[checkpoint.FORMAT_KEY])
    change(state, about)
    checkpoint.write_safetensors(state, about, folder / "damaged.safetensors")
    return folder / "damaged.safetensors"


BAD_FILES = [
    (lambda t, a: t.pop("layers.0.attention.wo.scales"), "lacks tensor 'layers.0.attention.wo.scales'"),
    (lambda t, a: t.update({"layers.0.attention.wo.scales": torch.ones(3, 2)}),
     r"'layers.0.attention.wo.scales' has shape \[3, 2\] where \[192, 6\]"),
    (lambda t, a: t.update({"layers.0.attention.wo.weight": torch.ones(192, 96)}), "stored as torch.float32"),
    (lambda t, a: a.update(version=99), "format version 99; this program reads version 1"),
    (lambda t, a: a["quantization"]["layers"]["layers.0.attention.wo"].update(mode="int3"), "weight format 'int3'"),
    (lambda t, a: a["quantization"]["layers"].update(nowhere={"mode": "int4"}), "quantized layer 'nowhere'"),
]


@pytest.mark.parametrize("change, sentence", BAD_FILES, ids=range(len(BAD_FILES)))
def test_damaged_files_are_one_sentence(change, sentence, stories):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_checkpoint(damaged(stories, change))
    assert "\n" not in str(caught.value)


def test_nan_is_named(tmp_path, capsys):
    model = Transformer(ModelArgs(vocab_size=32, dim=32, n_layers=1, n_heads=2, ffn_dim=64))
    with torch.no_grad():
        model.layers[0].feed_forward.w2.weight[3, 4] = float("nan")
    save_checkpoint(model, tmp_path / "m.safetensors")
    assert quantize_cli.main(["--checkpoint_path", str(tmp_path / "m.safetensors"), "--quiet"]) == 1
    assert "'layers.0.feed_forward.w2.weight'" in capsys.readouterr().err


BAD_WORDS = [
    (["--mode", "int3"], 2, "unknown mode 'int3'"),
    (["--mode", "int4", "--groupsize", "48"], 2, "unknown group size 48"),
    (["--recipe", "nothing_like_it=int8"], 2, "matches no layer"),
    (["--recipe", "w2"], 2, "is not REGEX=MODE"),
    (["--recipe", "(=int8"], 2, "regular expression"),
    (["--recipe", "w2=int5"], 2, "unknown mode 'int5'"),
    (["--mode", "int4-gptq"], 2, "--calibration_file"),
    (["--mode", "int4-gptq", "--calibration_file", "nowhere.txt"], 1, "nowhere.txt"),
    (["--mode", "int4-gptq", "--calibration_file", str(ROOT / "requirements.txt")], 2, "fewer than one sample of"),
    (["--output", "model.bin"], 2, "must end in .safetensors or .pth"),
    (["--percdamp", "-1"], 2, "percdamp is -1"),
    (["--checkpoint_path", "no/where/at/all"], 1, "no file or folder"),
]


@pytest.mark.parametrize("words, code, sentence", BAD_WORDS, ids=range(len(BAD_WORDS)))
def test_bad_arguments_are_one_sentence(words, code, sentence, stories, capsys):
    assert quantize_cli.main(["--checkpoint_path", str(stories), *words]) == code
    told = capsys.readouterr().err.strip()
    assert sentence in told and told.startswith("error: ") and "\n" not in told


def test_quantizing_twice_is_refused(quantized, capsys):
    assert quantize_cli.main(["--checkpoint_path", quantized["int8"]]) == 1
    assert "is quantized already" in capsys.readouterr().err


def test_unknown_layers_are_refused():
    with pytest.raises(ValueError, match="int2"):
        empty_layer(32, 32, "int2")
