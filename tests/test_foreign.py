"""Checkpoints that others quantized: every format packed here number by number, as its documentation says, and read
back bit for bit; and our export, read by the library of that format."""
import json
import subprocess
import sys

import families
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from checkpoint import CheckpointError, load_checkpoint
from foreign import marlin_order
from quantize import Int4Linear, Int8Linear, QuantizedLinear, SplitLinear, pack_model

LINEARS = [f"model.layers.{i}.{m}" for i in range(4) for m in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj")]
TOKENS = families.prompt()


def numbers(N, K, G, bits, seed, symmetric):
    """q, scales and zeros drawn at random, in their natural order."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2 ** bits, (N, K), generator=g)
    scales = (torch.rand(N, G, generator=g) * 0.02 + 0.001).half()
    zeros = torch.full((N, G), 2 ** (bits - 1)) if symmetric else torch.randint(1, 2 ** bits, (N, G), generator=g)
    return q, scales, zeros


def pack_rows(t, bits, order=None):
    """[n, m] -> int32 words [n, m * bits / 32], field by field."""
    per = 32 // bits
    order = order or list(range(per))
    out = torch.zeros(t.shape[0], -(-t.shape[1] // per), dtype=torch.int64)
    for i in range(t.shape[1]):
        out[:, i // per] |= t[:, i].long() << bits * order.index(i % per)
    return torch.where(out >= 2 ** 31, out - 2 ** 32, out).int()


def gptq(q, scales, zeros, g_idx, bits, version):
    stored = (zeros - 1) & (2 ** bits - 1) if version == "gptq" else zeros
    return {"qweight": pack_rows(q, bits).t(), "qzeros": pack_rows(stored.t(), bits), "scales": scales.t(),
            "g_idx": g_idx.int()}


def awq(q, scales, zeros, g_idx, bits, version):
    order = [0, 2, 4, 6, 1, 3, 5, 7]            # field j of a word holds this output of eight
    return {"qweight": pack_rows(q.t(), 4, order), "qzeros": pack_rows(zeros.t(), 4, order), "scales": scales.t()}


def compressed(q, scales, zeros, g_idx, bits, version):
    found = {"weight_packed": pack_rows(q, bits), "weight_scale": scales, "weight_shape": torch.tensor(q.shape)}
    return found | ({} if version == "symmetric" else {"weight_zero_point": pack_rows(zeros.t(), bits).t()})


def compressed_int8(q, scales, zeros, g_idx, bits, version):
    return {"weight": (q - 128).to(torch.int8), "weight_scale": scales}


def marlin(q, scales, zeros, g_idx, bits, version):
    """Tiles of 16 x 16, 1,024 nibbles a row of tiles permuted; scales in runs of 64, or of 32 if one a column."""
    (N, K), G = q.shape, scales.shape[1]
    tiles = q.t().reshape(K // 16, 16, N // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)[:, marlin_order()]
    run = [i + 8 * j for i in range(8) for j in range(8)] if G > 1 else \
        [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return {"B": pack_rows(tiles.reshape(K // 16, 16 * N), 4), "s": scales.t().reshape(-1, len(run))[:, run].view(G, N)}


def settings(method, bits=4, group=32, **more):
    return {"quant_method": method, "bits": bits, "group_size": group} | more


def groups(bits=4, group=32, symmetric=True, strategy="group", form="pack-quantized", **weights):
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": {
                "num_bits": bits, "type": "int", "group_size": group, "symmetric": symmetric, "strategy": strategy}
                | weights}}}


# name -> packer, version, bits, groupsize (0: a row), symmetric, act-order, config
CASES = {
    "gptq": (gptq, "gptq", 4, 32, False, False, settings("gptq", sym=False, desc_act=False)),
    "gptq-sym": (gptq, "gptq", 4, 32, True, False, settings("gptq", sym=True)),
    "gptq-v2": (gptq, "gptq_v2", 4, 32, False, False, settings("gptq", checkpoint_format="gptq_v2")),
    "gptq-act-order": (gptq, "gptq", 4, 32, False, True, settings("gptq", desc_act=True)),
    "gptq-column": (gptq, "gptq", 4, 0, True, False, settings("gptq", group=-1)),
    "gptq-8bit": (gptq, "gptq", 8, 32, False, False, settings("gptq", 8)),
    "awq": (awq, "gemm", 4, 32, False, False, settings("awq", version="gemm", zero_point=True)),
    "compressed": (compressed, "symmetric", 4, 32, True, False, groups()),
    "compressed-asymmetric": (compressed, "asymmetric", 4, 32, False, False, groups(symmetric=False)),
    "compressed-8bit": (compressed, "symmetric", 8, 32, True, False, groups(8)),
    "compressed-channel": (compressed, "symmetric", 4, 0, True, False, groups(group=None, strategy="channel")),
    "compressed-int8": (compressed_int8, "", 8, 0, True, False, groups(8, None, strategy="channel",
                                                                       form="int-quantized")),
    "marlin": (marlin, "", 4, 32, True, False, settings("gptq", checkpoint_format="marlin")),
    "marlin-column": (marlin, "", 4, 0, True, False, settings("gptq", group=-1, is_marlin_format=True)),
}


def write(folder, case, edit=lambda tensors, config: None, small=False):
    """A tiny Llama (for Marlin one of its widths) whose linears are replaced; returns what each one means."""
    packer, version, bits, group, symmetric, act_order, config = CASES[case]
    change = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=64)
    family = families.Family("llama", change if packer is marlin else {})
    families.write(family, folder)
    file = next(folder.glob("*.safetensors"))
    tensors, meaning = load_file(file), {}
    for i, name in enumerate(LINEARS):
        N, K = tensors.pop(f"{name}.weight").shape
        g = group or K
        q, scales, zeros = numbers(N, K, -(-K // g), bits, i, symmetric)
        like = 0 if name.endswith(("q_proj", "k_proj", "v_proj")) else 1 if "gate" in name or "up" in name else i
        shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(like))
        g_idx = (shuffled if act_order else torch.arange(K)) // g
        meaning[name] = (q - zeros[:, g_idx]).float() * scales.float()[:, g_idx]
        packed = packer(q, scales, zeros, g_idx, bits, version)
        tensors |= {f"{name}.{leaf}": t.contiguous() for leaf, t in packed.items()}
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    edit(tensors, settings)
    save_file(tensors, file)
    (folder / "config.json").write_text(json.dumps(settings))
    return meaning


@pytest.mark.parametrize("case", CASES)
def test_values_bit_for_bit(case, tmp_path):
    """Off by one in a zero point, or a nibble order, and the model talks nonsense."""
    meaning = write(tmp_path / "m", case)
    model = load_checkpoint(tmp_path / "m", dtype=torch.float32)
    for i, layer in enumerate(model.layers):
        of = {name.rpartition(".")[2]: w for name, w in meaning.items() if f".{i}." in name}
        wanted = {"wqkv": torch.cat([of["q_proj"], of["k_proj"], of["v_proj"]]), "wo": of["o_proj"],
                  "w13": torch.cat([of["gate_proj"], of["up_proj"]]), "w2": of["down_proj"]}
        for module in (layer.attention.wqkv, layer.attention.wo, layer.feed_forward.w13, layer.feed_forward.w2):
            name = next(n for n in wanted if getattr(layer.attention, n, getattr(layer.feed_forward, n, 0)) is module)
            assert isinstance(module, QuantizedLinear) and torch.equal(module.dequantize(), wanted[name]), name
            x = torch.randn(3, module.in_features)
            torch.testing.assert_close(module(x), x @ wanted[name].t())
            assert (module.zeros is None) == CASES[case][4]
    before = model(TOKENS)
    torch.testing.assert_close(pack_model(model)(TOKENS), before, rtol=1e-3, atol=1e-3)


def test_a_quantize_config_beside_says_the_same(tmp_path):
    """As AutoGPTQ wrote it before transformers put it into config.json."""
    def move(tensors, config):
        (tmp_path / "m" / "quantize_config.json").write_text(json.dumps(
            {"bits": 4, "group_size": 32, "desc_act": False}))
        del config["quantization_config"]
    write(tmp_path / "m", "gptq", move)
    assert isinstance(load_checkpoint(tmp_path / "m").layers[0].attention.wqkv, Int4Linear)


def test_parts_that_differ_stay_apart(tmp_path):
    """Fusing q, k and v that gather their inputs in unlike orders, or of which one is not quantized, would be wrong."""
    def shuffle(tensors, config):
        name = "model.layers.0.self_attn.k_proj.g_idx"
        tensors[name] = tensors[name].flip(0).contiguous()
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"model.layers.1.mlp.up_proj.{leaf}"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.randn(96, 64)
    meaning = write(tmp_path / "m", "gptq-act-order", shuffle)
    model = load_checkpoint(tmp_path / "m", dtype=torch.float32)
    wqkv, w13 = model.layers[0].attention.wqkv, model.layers[1].feed_forward.w13
    assert isinstance(wqkv, SplitLinear) and isinstance(w13, SplitLinear)
    assert torch.equal(wqkv.q.dequantize(), meaning["model.layers.0.self_attn.q_proj"])
    x = torch.randn(2, 64)
    wanted = torch.cat([x @ meaning["model.layers.1.mlp.gate_proj"].t(), w13.up(x)], -1)
    torch.testing.assert_close(w13(x), wanted)
    assert isinstance(model.layers[2].attention.wqkv, Int4Linear)
    assert pack_model(model)(TOKENS).isfinite().all()


def test_an_8_bit_layer_among_4_bit_ones(tmp_path):
    """GPTQModel's `dynamic`: the bits are read off the tensors."""
    def widen(tensors, config):
        name = "model.layers.0.mlp.down_proj"
        q, scales, zeros = numbers(64, 96, 3, 8, 5, False)
        tensors.update({f"{name}.{leaf}": t.contiguous() for leaf, t in
                        gptq(q, scales, zeros, torch.arange(96) // 32, 8, "gptq").items()})
    write(tmp_path / "m", "gptq", widen)
    assert isinstance(load_checkpoint(tmp_path / "m").layers[0].feed_forward.w2, Int8Linear)


REFUSED = [
    (settings("gptq", 3), "gptq with 3 bits"),
    (settings("awq", version="gemv"), "version 'gemv'"),
    (settings("bitsandbytes"), "method 'bitsandbytes'"),
    (settings("fp8"), "method 'fp8'"),
    (settings("exl2"), "method 'exl2'"),
    (settings("hqq"), "method 'hqq'"),
    (groups(form="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
    (groups(form="float-quantized", type="float"), "8 bits of type 'float'|of type 'float'"),
    (groups(3), "3 bits"),
]


@pytest.mark.parametrize("config, sentence", REFUSED, ids=[s for _, s in REFUSED])
def test_other_methods_are_refused_by_name(config, sentence, tmp_path):
    write(tmp_path / "m", "gptq", lambda t, c: c.update(quantization_config=config))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_checkpoint(tmp_path / "m")
    assert "\n" not in str(caught.value)


DAMAGE = [
    (lambda t: t.pop("model.layers.0.mlp.up_proj.scales"), "'model.layers.0.mlp.up_proj' lacks or garbles"),
    (lambda t: t.pop("model.layers.0.mlp.up_proj.qweight"), "up_proj.* has no place"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.scales": torch.ones(2, 5).half()}), "up_proj' .* its scales"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.g_idx": torch.zeros(64).int()}), "groups of unequal size"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.extra": torch.zeros(2)}), "extra' .* has no place"),
]


@pytest.mark.parametrize("change, sentence", DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_one_sentence(change, sentence, tmp_path):
    write(tmp_path / "m", "gptq", lambda t, c: [change(t), None][1])
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(tmp_path / "m")


# ---- our export ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_export_is_what_compressed_tensors_reads(mode, tmp_path):
    """vLLM and transformers go through this library."""
    library = pytest.importorskip("compressed_tensors", reason="the library of the format is not installed")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    families.write("llama-2-70b", tmp_path / "m")
    done = subprocess.run([sys.executable, "quantize.py", "--checkpoint_path", tmp_path / "m", "--mode", mode,
                           "--format", "compressed-tensors", "--recipe", "wo=none"], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "m" / (f"model_{mode}" + (".g32" if mode == "int4" else "") + "-compressed-tensors")
    tensors = load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(
        json.loads((folder / "config.json").read_text())["quantization_config"])
    [scheme] = config.config_groups.values()
    ours = load_checkpoint(folder, dtype=torch.float32)
    for i in range(4):
        rows = ours.layers[i].attention.wqkv.dequantize().split([64, 32, 32])
        for part, w in zip("qkv", rows):
            name = f"model.layers.{i}.self_attn.{part}_proj"
            assert name in scheme.targets and f"model.layers.{i}.self_attn.o_proj" in config.ignore
            state = {leaf: tensors[f"{name}.{leaf}"] for leaf in
                     ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
                     if f"{name}.{leaf}" in tensors}
            found = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
            torch.testing.assert_close(found.float(), w.to(found.dtype).float(), rtol=0, atol=0)
    assert library is not None


def test_export_needs_a_folder_and_whole_groups(tmp_path):
    families.write(families.Family("llama", dict(intermediate_size=80)), tmp_path / "m")
    words = [sys.executable, "quantize.py", "--format", "compressed-tensors", "--mode", "int4", "--checkpoint_path"]
    done = subprocess.run([*words, tmp_path / "m"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "needs whole groups" in done.stderr
    done = subprocess.run([*words, next((tmp_path / "m").glob("*.safetensors"))], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and "needs a Hugging Face folder" in done.stderr
