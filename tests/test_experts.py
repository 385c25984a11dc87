"""Mixtures of experts against the plainest form there is: every expert on every token, weighed by what the router says.
(Families against transformers are in test_families.py.)"""
import copy
import json
import re

import pytest
import torch
import torch.nn as nn
from families import FAMILIES, Family, prompt, tensors, write
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

import experts
import figures
import gptq
import quantize_cli
from checkpoint import CheckpointError, load_checkpoint, weight_bytes
from generate import attended, compile_steps, decode, generate, make_room
from kernels import cpu
from model import FeedForward, ModelArgs, Transformer, run_experts
from quantize import Fp4Linear, Int4Linear, Int8Linear, QuantizedLinear
from speculate import Speculation
from tp_worker import NoText

D = 64


def args(X=6, A=2, F=48, **more) -> ModelArgs:
    return ModelArgs(90, D, 2, 4, n_kv_heads=2, ffn_dim=F, n_experts=X, active_experts=A, **more)


def random_model(dtype=torch.float32, mode="", seed=0, groupsize=32, **more) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(args(**more)).requires_grad_(False).eval()
    for p in model.parameters():
        p.normal_(0, 0.3 if p.dim() == 1 else 0.12)
    model = model.to(dtype)
    kinds = {"int8": (Int8Linear, 0), "int4": (Int4Linear, groupsize)}
    for name, module in list(model.named_modules()) if mode else []:
        if type(module) is nn.Linear:
            kind, group = kinds[mode]
            layer = kind.quantize(module.weight.data, group)
            layer.bias, layer.dtype = None if module.bias is None else module.bias.data, dtype
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    return model


def oracle(experts_: nn.ModuleList, x, weights, ids):
    """All experts on all tokens; what was not chosen weighs nothing."""
    y = torch.zeros(x.shape)
    for e, expert in enumerate(experts_):
        share = torch.where(ids == e, weights, 0.0).sum(1)
        y += share[:, None] * expert(x).float()
    return y.to(x.dtype)


def routes(T, X, A, kind="any", seed=1):
    g = torch.Generator().manual_seed(seed)
    if kind == "one":                       # all tokens on the same experts
        ids = torch.arange(A).expand(T, A).contiguous()
    elif kind == "unchosen":                # nobody wants the last ones
        ids = torch.stack([torch.randperm(max(X - 2, A), generator=g)[:A] for _ in range(T)])
    else:
        ids = torch.stack([torch.randperm(X, generator=g)[:A] for _ in range(T)])
    return torch.rand(T, A, generator=g), ids


# ---- the sum -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["any", "one", "unchosen"])
@pytest.mark.parametrize("X, A", [(6, 2), (1, 1), (4, 4), (16, 3)])
@pytest.mark.parametrize("T", [1, 2, 9, 64, 257])
def test_the_plain_loop(T, X, A, kind):
    """A row that meets another's expert, weights in another order, an expert nobody chose that still counts."""
    layer = random_model(X=X, A=A).layers[0].feed_forward
    x, (weights, ids) = torch.randn(T, D), routes(T, X, A, kind)
    torch.testing.assert_close(run_experts(layer.experts, x, weights, ids), oracle(layer.experts, x, weights, ids))


def packed(mode, **more):
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    model = random_model(torch.bfloat16, mode, **more)
    return model, experts.pack_model(model).layers[0].feed_forward


FORMS = [("", {}), ("int8", {}), ("int4", {}), ("int4", dict(groupsize=64)), ("", dict(ffn_bias=True, activation="silu_clamped")),
         ("int4", dict(ffn_bias=True, activation="silu_clamped")), ("int8", dict(F=40)), ("int4", dict(F=56))]


@pytest.mark.parametrize("kind", ["any", "one", "unchosen"])
@pytest.mark.parametrize("mode, more", FORMS, ids=str)
@pytest.mark.parametrize("T", [1, 2, 9, 64])
def test_the_kernel(T, mode, more, kind):
    """Another expert's scales, a bias that is weighed twice, a group that F does not fill."""
    _, layer = packed(mode, **more)
    assert isinstance(layer.run, experts.Stacked)
    x, (weights, ids) = torch.randn(T, D).bfloat16(), routes(T, 6, 2, kind)
    got, wanted = layer.run(layer.experts, x, weights, ids), run_experts(layer.experts, x, weights, ids)
    torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01 * wanted.abs().max().item())


@pytest.mark.parametrize("mode", ["", "int8", "int4"])
def test_a_token_gets_the_same_bits_alone_and_among_others(mode):
    _, layer = packed(mode)
    x, (weights, ids) = torch.randn(7, D).bfloat16(), routes(7, 6, 2)
    alone = [layer.run(layer.experts, x[t:t + 1], weights[t:t + 1], ids[t:t + 1]) for t in range(7)]
    assert torch.equal(layer.run(layer.experts, x, weights, ids), torch.cat(alone))


@pytest.mark.parametrize("mode, more", [f for f in FORMS if f[1].get("F") != 40], ids=str)
@pytest.mark.parametrize("T", [1, 4])
def test_gathering(T, mode, more):
    """What a GPU runs for a few tokens: rows of another expert, scales of another group."""
    layer = random_model(torch.bfloat16, mode, **more).layers[0].feed_forward
    x, (weights, ids) = torch.randn(T, D).bfloat16(), routes(T, 6, 2)
    wanted = run_experts(layer.experts, x, weights, ids)
    gathered = experts.Gathered(layer)
    torch.testing.assert_close(gathered.gather(x, weights, ids), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())
    assert torch.equal(run_experts(layer.experts, x, weights, ids), wanted)         # the layers keep views of the stacks


def test_gathering_what_a_rank_holds():
    """Inputs before a rank's first one, which lie in its first group, taken for its own."""
    layer = random_model(torch.bfloat16, "int4", F=96).layers[0].feed_forward
    for expert in layer.experts:            # the second of two ranks: inputs 48 ... 95 of 96, in groups of 32
        for leaf, (dim, spans) in expert.w2.cut(1, [(48, 96)]).items():
            if getattr(expert.w2, leaf) is not None:
                setattr(expert.w2, leaf, getattr(expert.w2, leaf)[:, spans[0][0]:spans[0][1]].contiguous())
        expert.w13 = Int4Linear.quantize(expert.w13.dequantize()[:96], 32)
    assert layer.experts[0].w2.skip == 16
    x, (weights, ids) = torch.randn(2, D).bfloat16(), routes(2, 6, 2)
    wanted = run_experts(layer.experts, x, weights, ids)
    torch.testing.assert_close(experts.Gathered(layer).gather(x, weights, ids), wanted, rtol=0.02,
                               atol=0.02 * wanted.abs().max().item())


@pytest.mark.parametrize("scale, beside", [(2.0 ** -40, False), (-1.0, True)])
def test_a_scale_that_does_not_lie_among_the_weights(scale, beside):
    """Of one expert: all have theirs beside then, and still run at once."""
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    layer = (model := random_model(torch.bfloat16, "int4")).layers[0].feed_forward
    layer.experts[2].w2.scales[5, 0] = scale
    experts.pack_model(model)
    assert isinstance(layer.run, experts.Stacked)
    assert all((e.w2.packed_scales.dtype == torch.bfloat16) == beside for e in layer.experts)
    assert all(e.w13.packed_scales.dtype == torch.int32 for e in layer.experts)
    x, (weights, ids) = torch.randn(7, D).bfloat16(), routes(7, 6, 2)
    got, wanted = layer.run(layer.experts, x, weights, ids), run_experts(layer.experts, x, weights, ids)
    torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01 * wanted.abs().max().item())


def test_unlike_experts_run_one_by_one():
    """A recipe that treats one expert otherwise: stacks would mix the formats up."""
    model = random_model(torch.bfloat16, "int8")
    layer = model.layers[0].feed_forward
    odd = layer.experts[3]
    odd.w2 = Int4Linear.quantize(odd.w2.dequantize(), 32)
    x, (weights, ids) = torch.randn(5, D).bfloat16(), routes(5, 6, 2)
    wanted = run_experts(layer.experts, x, weights, ids)
    assert experts.Gathered(layer).down is None
    experts.pack_model(model)
    assert isinstance(layer.run, experts.Opaque)
    torch.testing.assert_close(layer.run(layer.experts, x, weights, ids), wanted, rtol=0.02, atol=0.02 * wanted.abs().max())


@pytest.mark.parametrize("renormalize", [True, False])
def test_routing(renormalize):
    """Weights that do not add up where they should, ties that break otherwise from call to call."""
    layer = random_model(renormalize=renormalize, A=3).layers[0].feed_forward
    x = torch.randn(5, D)
    weights, ids = layer.route(x)
    p = layer.router(x).softmax(-1)
    top, wanted = p.topk(3)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(weights, top / top.sum(-1, keepdim=True) if renormalize else top)
    layer.router.weight.zero_()             # all tied: whichever are chosen, each is chosen once and always the same
    ids = layer.route(x)[1]
    assert all(len(set(row)) == 3 for row in ids.tolist()) and torch.equal(ids, layer.route(x)[1])


# ---- cost --------------------------------------------------------------------------------------------------

def test_a_token_runs_its_experts_and_no_others():
    model = random_model(X=8, A=3)
    ran = []
    for layer in experts.layers(model):
        for e, expert in enumerate(layer.experts):
            expert.register_forward_hook(lambda m, x, y, e=e: ran.append((e, len(x[0]))))
    model(torch.tensor([[5]]))
    assert len(ran) == 2 * 3 and all(n == 1 for _, n in ran)
    ran.clear()
    model(torch.randint(0, 90, (4, 60)))
    for block in range(2):                  # each at most once a chunk, each token in three of them
        first = next((i for i in range(1, len(ran)) if ran[i][0] <= ran[i - 1][0]), len(ran))
        part, ran = ran[:first], ran[first:]
        assert len({e for e, _ in part}) == len(part) and sum(n for _, n in part) == 3 * 240
    assert not ran


@pytest.mark.parametrize("mode", ["", "int8", "int4"])
def test_bytes_per_token_count_active_experts(mode):
    """A share of the bandwidth that counts weights nobody reads."""
    model = random_model(torch.bfloat16, mode, X=8, A=2, shared_dim=16, shared_gate=True, dense_layers=[1])
    one = weight_bytes(model.layers[0].feed_forward.experts[0])
    table, ropes = model.tok_embeddings.weight.nbytes, model.ropes[0].frequencies.nbytes
    assert figures.bytes_per_token(model) == weight_bytes(model) - table + ropes - 6 * one
    assert isinstance(model.layers[1].feed_forward, FeedForward)


def test_prefill_does_not_copy_weights():
    """Gathering the weights of every token: T * A * F * D numbers where T * A * D would do."""
    layer = random_model(X=8, A=2, F=512).layers[0].feed_forward
    x, (weights, ids) = torch.randn(256, D), routes(256, 8, 2)
    with torch.profiler.profile(profile_memory=True) as seen:
        run_experts(layer.experts, x, weights, ids)
    allocated = sum(e.cpu_memory_usage for e in seen.events() if e.cpu_memory_usage > 0)
    assert allocated < 20 * 256 * 2 * (D + 3 * 512)                                  # bytes; gathered weights: 200 MB


# ---- compiled ----------------------------------------------------------------------------------------------

def gather_always(model):
    for layer in experts.layers(model):
        layer.run = experts.Gathered(layer)
    return model


@pytest.mark.parametrize("form", ["kernel", "opaque", "gathered"])
def test_one_graph_for_all_routes(form):
    """Routing that breaks the graph, or compiles another for every set of experts."""
    if form == "kernel" and not cpu.available():
        pytest.skip("there is no C++ compiler")
    model = random_model(torch.bfloat16 if form == "kernel" else torch.float32, X=8, A=2)
    (gather_always if form == "gathered" else experts.pack_model)(model)
    make_room(model, 1, 40)
    counter = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(decode, fullgraph=True, backend=counter)
    with torch.no_grad():
        for position in range(12):
            rest = torch.tensor([[7 * position % 90]]), torch.tensor([[position]]), attended(model, position + 1)
            torch.testing.assert_close(step(model, *rest), decode(model, *rest), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["opaque", "gathered"])
def test_compiled_equals_eager(form):
    model = random_model(X=6, A=2, shared_dim=24)
    (gather_always if form == "gathered" else experts.pack_model)(model)
    make_room(model, 2, 40)
    steps = compile_steps(True, True)
    with torch.no_grad():
        for position in range(4):
            rest = torch.tensor([[3 + position], [9]]), torch.full((2, 1), position), attended(model, position + 1)
            torch.testing.assert_close(steps.decode(model, *rest), decode(model, *rest), rtol=1e-4, atol=1e-4)


# ---- quantized ---------------------------------------------------------------------------------------------

def test_gptq_shows_each_expert_its_own_tokens(capsys):
    """Hessians of all tokens for every expert, or of an earlier layer; an expert without tokens that ends the run."""
    exact = random_model(X=20, A=2)         # 20 tokens an expert; 8 are the least
    samples = [torch.randint(0, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 45, 70, 33)]
    tokens, errors = torch.randint(0, 90, (8, 40)), {}
    for method in ("nearest", "gptq"):
        model = copy.deepcopy(exact)

        def quantize(name, H):
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                return layer
            weight = layer.weight.data
            return Int4Linear.quantize(weight, 32) if H is None else gptq.round_weight(weight, H, 32)
        names = list(gptq.quantize_blocks(model, samples, lambda name: None, quantize, lambda name: method == "gptq"))
        assert len(names) == 2 + 2 * (2 + 2 * 20) and not any("router" in name for name in names)
        errors[method] = (model(tokens) - exact(tokens)).square().mean()
    assert errors["gptq"] < errors["nearest"]
    assert "saw too few tokens for GPTQ" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantize_a_folder_of_experts(mode, tmp_path):
    """A router that is rounded; an expert whose file cannot be read again."""
    path = write("qwen2-moe-some-dense", tmp_path / "m")
    assert quantize_cli.main(["--checkpoint_path", str(path), "--mode", mode, "--quiet", "--output",
                              str(tmp_path / "q.safetensors")]) == 0
    model, exact = load_checkpoint(tmp_path / "q.safetensors"), load_checkpoint(path)
    layer = experts.layers(model)[0]
    assert isinstance(layer.experts[1].w13, QuantizedLinear) and isinstance(layer.shared.w2, QuantizedLinear)
    assert torch.equal(layer.router.weight, experts.layers(exact)[0].router.weight)
    assert torch.equal(layer.shared_gate.weight, experts.layers(exact)[0].shared_gate.weight)
    plain = model(prompt())
    for name, m in list(model.named_modules()):
        if isinstance(m, QuantizedLinear):
            parent, _, leaf = name.rpartition(".")
            w = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)
            w.weight.data, w.bias = m.dequantize(), m.bias if m.bias is None else nn.Parameter(m.bias)
            setattr(model.get_submodule(parent), leaf, w)
    torch.testing.assert_close(plain, model(prompt()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "olmoe"])
def test_export_of_experts(name, tmp_path):
    """Experts under each other's names, read back as others' files are."""
    family = FAMILIES[name]
    path = write(Family(family.model_type, family.config | dict(intermediate_size=64)), tmp_path / "m")
    for form, more in (("exported", ["--format", "compressed-tensors"]), ("own.safetensors", ["--recipe", "output=none"])):
        assert quantize_cli.main(["--checkpoint_path", str(path), "--mode", "int4", "--quiet", "--output",
                                  str(tmp_path / form), *more]) == 0
    both = [load_checkpoint(tmp_path / form, dtype=torch.float32)(prompt()) for form in ("exported", "own.safetensors")]
    assert torch.equal(*both)


def test_stacked_experts_are_not_exported(tmp_path, capsys):
    path = write("granite-moe", tmp_path / "m")
    assert quantize_cli.main(["--checkpoint_path", str(path), "--mode", "int4", "--quiet", "--format", "compressed-tensors"]) == 2
    assert "stored one by one" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_speculation_on_experts(dtype):
    """Rows of a block that meet in an expert and change each other's numbers."""
    if dtype == torch.bfloat16 and not cpu.available():
        pytest.skip("there is no C++ compiler: only the kernels give one row and several the same bits")
    model, draft = (experts.pack_model(random_model(dtype, seed=seed)) for seed in (0, 1))
    for m in (model, draft):
        m.end_ids, m.generation_config, m.limit = set(), {}, 256
    prompts = [[5, 6, 7, 8, 5, 6, 7], list(range(3, 20))][:1 if dtype == torch.bfloat16 else 2]      # up to 9 rows at once
    plain = [row.ids for row in generate(model, NoText(), prompts, max_new_tokens=40, temperature=0)]
    for k, guesser in ((1, draft), (4, draft), (4, model), (4, None)):
        rows = generate(model, NoText(), prompts, max_new_tokens=40, temperature=0, speculation=Speculation(guesser, k))
        assert [row.ids for row in rows] == plain


# ---- files -------------------------------------------------------------------------------------------------

def stack_names(folder, transpose=False):
    """A folder's experts joined as transformers 5 holds them."""
    found = tensors(folder)
    for prefix in sorted({n.split("experts.")[0] for n in found if "experts.0." in n}):
        X = len({n.split(".")[5] for n in found if n.startswith(f"{prefix}experts.")})
        names = [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = next(n for n in names if f"{prefix}experts.0.{n[0]}.weight" in found)
        def take(e, w):
            return found.pop(f"{prefix}experts.{e}.{w}.weight")
        layer = prefix.replace("block_sparse_moe", "mlp")
        found[f"{layer}experts.gate_up_proj"] = torch.stack([torch.cat([take(e, gate), take(e, up)]) for e in range(X)])
        found[f"{layer}experts.down_proj"] = torch.stack([take(e, down) for e in range(X)])
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen2-moe-some-dense", "olmoe"])
def test_experts_in_one_tensor(name, tmp_path):
    wanted = load_checkpoint(write(name, tmp_path / "m"), dtype=torch.float32)(prompt())
    stack_names(tmp_path / "m")
    assert not any("experts.0." in n for n in tensors(tmp_path / "m"))
    assert torch.equal(load_checkpoint(tmp_path / "m", dtype=torch.float32)(prompt()), wanted)


def native_names(found: dict, X: int, form: str) -> dict:
    """Hugging Face's Mixtral under Mistral's own names, rope interleaved; experts one by one or stacked."""
    new = {}
    for name, t in found.items():
        name = name.removeprefix("model.").replace("self_attn.", "attention.").replace("_proj", "")
        for a, b in (("embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("input_layernorm", "attention_norm"),
                     ("post_attention_layernorm", "ffn_norm"), ("attention.q.", "attention.wq."), ("attention.k.", "attention.wk."),
                     ("attention.v.", "attention.wv."), ("attention.o.", "attention.wo."),
                     ("block_sparse_moe.", "block_sparse_moe." if form == "flat" else "feed_forward.")):
            name = name.replace(a, b)
        if ".wq." in name or ".wk." in name:
            t = t.unflatten(0, (-1, 2, 8)).transpose(1, 2).reshape(t.shape)          # heads of 16
        new[name] = t.contiguous()
    if form == "flat":
        for layer in range(4):
            for w in ("w1", "w2", "w3"):
                parts = [new.pop(f"layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight") for e in range(X)]
                new[f"layers.{layer}.block_sparse_moe.{w}"] = torch.cat([p.t() if w == "w2" else p for p in parts]).contiguous()
    return new


@pytest.mark.parametrize("form", ["experts", "flat"])
def test_mistrals_own_files(form, tmp_path):
    """consolidated.*.pth with params.json: experts by name, or all of a layer in three matrices; in one file or two."""
    X = FAMILIES["mixtral-8x7b"].config["num_local_experts"]
    path = write("mixtral-8x7b", tmp_path / "hf")
    wanted = load_checkpoint(path, dtype=torch.float32)(prompt())
    config = json.loads((path / "config.json").read_text())
    params = {"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 96, "norm_eps": 1e-3,
              "vocab_size": config["vocab_size"], "rope_theta": 1e6, "moe": {"num_experts": X, "num_experts_per_tok": 2}}
    new = list(native_names(tensors(path), X, form).items())
    for files in (1, 2):
        folder = tmp_path / f"native{files}"
        folder.mkdir()
        (folder / "params.json").write_text(json.dumps(params))
        for i in range(files):
            torch.save(dict(new[i::files]), folder / f"consolidated.{i:02}.pth")
        torch.testing.assert_close(load_checkpoint(folder, dtype=torch.float32)(prompt()), wanted, rtol=1e-4, atol=1e-4)


def mxfp4_folder(path, lossless: bool):
    """gpt-oss as released, experts in 4-bit floats, or the same numbers in float32 under the names of bfloat16 saves."""
    family = Family("gpt_oss", FAMILIES["gpt-oss"].config | dict(intermediate_size=64))
    write(family, path)
    found, g = tensors(path), torch.Generator().manual_seed(5)
    values = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6])
    for name in [n for n in found if n.endswith(("gate_up_proj", "down_proj"))]:
        X, K, N = found.pop(name).shape
        blocks = torch.randint(0, 256, (X, N, K // 32, 16), generator=g).to(torch.uint8)
        scales = torch.randint(118, 123, (X, N, K // 32), generator=g).to(torch.uint8)
        if lossless:
            codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()   # [X, N, K / 32, 32]
            found[name] = (values[codes] * torch.exp2(scales.float() - 127)[..., None]).flatten(2).transpose(1, 2).contiguous()
        else:
            found |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {} if lossless else {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_mxfp4_experts(tmp_path):
    """gpt-oss's own files, read as they are: nibbles swapped, gate and up mixed, a scale off by two."""
    exact = load_checkpoint(mxfp4_folder(tmp_path / "exact", True), dtype=torch.float32)
    model = load_checkpoint(mxfp4_folder(tmp_path / "released", False), dtype=torch.float32)
    layer = experts.layers(model)[1]
    assert isinstance(layer.experts[2].w13, Fp4Linear)
    assert torch.equal(layer.experts[2].w13.dequantize(), experts.layers(exact)[1].experts[2].w13.weight)
    assert torch.equal(layer.experts[2].w2.dequantize(), experts.layers(exact)[1].experts[2].w2.weight)
    torch.testing.assert_close(model(prompt()), exact(prompt()), rtol=0, atol=2e-5)
    experts.pack_model(model)
    if cpu.available():
        assert isinstance(layer.run, experts.Stacked)
    torch.testing.assert_close(model(prompt()), exact(prompt()), rtol=0, atol=1e-4)
    half = experts.pack_model(load_checkpoint(tmp_path / "released", dtype=torch.bfloat16))
    x, (weights, ids) = torch.randn(3, D).bfloat16(), routes(3, 6, 3)
    wanted = run_experts(layer.experts, x.float(), weights, ids)
    torch.testing.assert_close(experts.layers(half)[1].run(experts.layers(half)[1].experts, x, weights, ids).float(), wanted,
                               rtol=0.02, atol=0.02 * wanted.abs().max().item())


@pytest.mark.parametrize("change, word", [
    (lambda t: t.pop("model.layers.3.block_sparse_moe.experts.4.w1.weight"),
     "lacks tensor 'model.layers.3.block_sparse_moe.experts.4.w1.weight'"),
    (lambda t: t.pop("model.layers.2.block_sparse_moe.experts.1.w2.weight"),
     "lacks tensor 'model.layers.2.block_sparse_moe.experts.1.w2.weight'"),
    (lambda t: t.update({"model.layers.0.block_sparse_moe.experts.5.w2.weight": torch.zeros(64, 96)}), "experts.5.w2"),
    (lambda t: t.update({"model.layers.0.block_sparse_moe.gate.weight": torch.zeros(4, 64)}), r"\[4, 64\] where \[5, 64\]"),
], ids=["gate", "down", "too many", "router"])
def test_a_checkpoint_that_lacks_an_expert(change, word, tmp_path):
    path = write("mixtral-8x7b", tmp_path / "m")
    found = tensors(path)
    change(found)
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(word) if "[" not in word else word):
        load_checkpoint(path)


@pytest.mark.parametrize("edit, word", [
    (dict(num_experts_per_tok=6), "6 experts a token"), (dict(num_experts_per_tok=0), "0 experts a token")])
def test_more_experts_a_token_than_exist(edit, word, tmp_path):
    with pytest.raises(CheckpointError, match=word):
        load_checkpoint(write("mixtral-8x7b", tmp_path / "m", edit=lambda c: c | edit))


@pytest.mark.parametrize("kind, reason", [("deepseek_v3", "latent attention"), ("llama4", "chunks"), ("phimoe", "sparse-mixer"),
                                          ("glm4_moe", "routing")])
def test_what_is_refused_is_refused_by_name(kind, reason, tmp_path):
    write("mixtral-8x7b", tmp_path / "m", edit=lambda c: c | {"model_type": kind})
    with pytest.raises(CheckpointError, match=f"'{kind}' has .*{reason}"):
        load_checkpoint(tmp_path / "m")
