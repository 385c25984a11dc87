"""The Transformer against transformers, family by family; then the Transformer against itself.

For each row of `families.FAMILIES` a tiny random folder is written, loaded by us and compared, logit by logit, with the
model it was saved from. float32 differs by rounding only: at most 4e-6 was seen, so that TOLERANCE leaves a factor
of five for other machines, while the smallest real difference (`test_every_switch_matters`) is a hundred times larger.
"""
import copy
import dataclasses
import json

import pytest
import torch
from families import (BATCH, DIALECTS, FAMILIES, FULL, LENGTH, SLIDING, WINDOW, Family, build, prompt, reference, rope,
                      tensors, write)
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from architecture import args_from
from checkpoint import load_checkpoint
from model import ModelArgs, RopeArgs, RotaryEmbedding, Transformer, attend, attention_mask

TOLERANCE = 2e-5
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name, dialect): a family's folder, written once. Its own name lies about what is in it."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(name: str, dialect: str = "new"):
        if (name, dialect) not in made:
            made[name, dialect] = write(name, root / f"Llama-2-70b-chat-int4-{len(made)}", dialect)
        return made[name, dialect]
    return get


@pytest.fixture(scope="module")
def truth():
    """truth(name): what the model itself, which never went through a file, answers to prompt()."""
    known = {}

    def get(name: str) -> torch.Tensor:
        if name not in known:
            with torch.no_grad():
                known[name] = build(FAMILIES[name], name)(prompt()).logits
        return known[name]
    return get


def load(path, dtype=torch.float32) -> Transformer:
    return load_checkpoint(path, device="cpu", dtype=dtype)


def difference(a, b) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def spoil(model):
    """Fill the cache with large numbers: what is read before it is written will show."""
    for layer in model.layers:
        layer.attention.cache.k.fill_(7.0)
        layer.attention.cache.v.fill_(-7.0)


def at(*positions) -> torch.Tensor:
    return torch.tensor(positions)[:, None]


# ---- parity with transformers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dialect", DIALECTS)
@every_family
def test_whole_prompt(name, dialect, folder, truth):
    """A switch read wrongly, or not at all, from one of the spellings of config.json; weights joined in wrong order."""
    model = load(folder(name, dialect))
    with torch.no_grad():
        logits = model(prompt())
    assert logits.dtype == torch.float32
    assert difference(logits, truth(name)) < TOLERANCE


@every_family
def test_prefill_then_one_token_at_every_split(name, folder, truth):
    """A cache slot off by one, a rope table that starts at zero in each call, a window that forgets the cache."""
    model, tokens, wanted = load(folder(name)), prompt()[:1], truth(name)[:1]
    model.setup_caches(1, LENGTH, slots=LENGTH + 8)
    worst = 0.0
    with torch.no_grad():
        for split in range(1, LENGTH):
            spoil(model)
            logits = model(tokens[:, :split], torch.arange(split), slots=split)
            worst = max(worst, difference(logits, wanted[:, :split]))
            logits = model(tokens[:, split:split + 1], at(split), slots=split + 1)
            worst = max(worst, difference(logits[:, 0], wanted[:, split]))
    assert worst < TOLERANCE


@every_family
def test_rows_of_different_lengths(name, folder, truth):
    """Padding that is seen, positions shared by a batch, or a mask made for its longest row."""
    model, tokens, wanted = load(folder(name)), prompt(), truth(name)
    lengths = torch.tensor([5, 15, 1])
    padded = torch.where(torch.arange(15) < lengths[:, None], tokens[:, :15], 0)
    rows = torch.arange(BATCH)
    model.setup_caches(BATCH, LENGTH, slots=LENGTH + 8)
    spoil(model)
    with torch.no_grad():
        logits = model(padded, torch.arange(15), slots=16, logits_at=lengths[:, None] - 1)
        assert difference(logits[:, 0], wanted[rows, lengths - 1]) < TOLERANCE
        for step in range(LENGTH - 15):
            position = lengths + step
            logits = model(tokens[rows, position][:, None], position[:, None], slots=LENGTH)
            assert difference(logits[:, 0], wanted[rows, position]) < TOLERANCE


WINDOWED = [n for n, f in FAMILIES.items() if f.config.get("sliding_window") == WINDOW]


@pytest.mark.parametrize("name", WINDOWED)
def test_far_past_the_sliding_window(name, folder):
    """A window that is right while the prompt is short, or only within one call; ten windows long here."""
    length = 10 * WINDOW
    tokens = prompt(2, length)
    with torch.no_grad():
        wanted = build(FAMILIES[name], name)(tokens).logits
        model = load(folder(name))
        assert difference(model(tokens), wanted) < TOLERANCE
        model.setup_caches(2, length)
        cuts = [0, 2, WINDOW, *range(5 * WINDOW, length + 1)]
        for first, last in zip(cuts, cuts[1:]):
            logits = model(tokens[:, first:last], torch.arange(first, last), slots=last)
            assert difference(logits, wanted[:, first:last]) < TOLERANCE


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "ministral-one-window", "phi-3-mini-4k"])
def test_window_reaches_as_far_as_it_says(name, folder):
    """A window wider by one key: with W keys a layer sees W - 1 back, four layers see 4 (W - 1)."""
    model, tokens = load(folder(name)), prompt(1, 40)
    other = tokens.clone()
    other[0, 0] += 1
    with torch.no_grad():
        change = (model(tokens) - model(other)).abs().amax(-1)[0]
    reach = 4 * (WINDOW - 1)
    assert (change[reach + 1:] == 0).all() and change[reach] > 0


@every_family
def test_transformers_reads_every_dialect_alike(name, folder, truth):
    """Of these fixtures: a config.json rewritten into something else, which would make the tests above agree on it."""
    for dialect in DIALECTS[1:]:
        if FAMILIES[name].old_rope_type == "su":
            pytest.skip("transformers 5 cannot read this scaling by its first name")
        assert difference(reference(folder(name, dialect), prompt()), truth(name)) < TOLERANCE


SHAPES = {"vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "tied", "qkv_bias", "o_bias",
          "ffn_bias", "output_bias", "attention_norm", "ffn_norm", "post_attention_norm", "post_ffn_norm", "qk_norm",
          "n_experts", "expert_dim", "shared_dim", "shared_gate", "router_bias", "dense_layers", "attention_sinks"}
DULL = {"max_position": "a limit to warn at, or part of a rope", "norm_style": "of llama and float32: only rounding"}
INERT = {("llama-dynamic", "ropes"): "plain within its context", ("phi-4-mini", "layer_windows"): "wide",
         ("olmo-3-explicit", "layer_ropes"): "two equal ropes", ("gemma-3-multimodal", "norm_eps"): "the class default",
         ("qwen3-moe-plain", "renormalize"): "all experts are active"}
MOE = [n for n, f in FAMILIES.items() if {"num_experts", "num_local_experts"} & set(f.config)]


@every_family
def test_every_switch_matters(name, folder, truth):
    """Of these fixtures: a switch whose value, were it ignored, would not be missed (a window longer than the prompt,
    a scaling that leaves the few rotated pairs alone). What changes a shape is seen by strict loading."""
    model = load(folder(name))
    for field in dataclasses.fields(ModelArgs):
        value = getattr(model.args, field.name)
        if field.name in SHAPES or field.name in DULL or value == default_of(field, model.args):
            continue
        with torch.no_grad():
            change = difference(without(model, field.name)(prompt()), truth(name))
        if (name, field.name) not in INERT:
            assert change > 100 * TOLERANCE, f"{field.name} = {value} does not matter"


def default_of(field, args):
    zeros = [0] * args.n_layers
    return {"active_experts": min(args.n_experts, 1), "ropes": [RopeArgs(dim=args.head_dim)], "layer_ropes": zeros, "layer_windows": zeros,
            "attention_scale": args.head_dim ** -0.5}.get(field.name, field.default)


def without(model, switch: str) -> Transformer:
    """The same weights with one switch at its default."""
    field = next(f for f in dataclasses.fields(ModelArgs) if f.name == switch)
    args = copy.deepcopy(model.args)
    setattr(args, switch, default_of(field, model.args))
    if len(args.ropes) == 1:
        args.layer_ropes = [min(r, 0) for r in args.layer_ropes]
    other = Transformer(args)
    other.load_state_dict(model.state_dict())
    return other


# ---- half precision --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in MOE])      # rounding makes routers choose others
def test_bfloat16_greedy_text(name, folder, truth):
    """A cast in the wrong place (a norm's scale, the embedding's factor, a rope table in bfloat16): our greedy text is
    the reference's, except where its two best tokens lie closer than bfloat16 moves the reference's own logits."""
    path, steps = folder(name), LENGTH - 8
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    tokens[:, :8] = prompt()[:, :8]
    model = load(path, torch.bfloat16)
    model.setup_caches(BATCH, LENGTH)
    assert model.tok_embeddings.weight.dtype == model.layers[0].attention.cache.k.dtype == torch.bfloat16
    ours = []
    with torch.no_grad():
        logits = model(tokens[:, :8], torch.arange(8))[:, -1]
        for position in range(8, LENGTH):
            ours.append(logits)
            tokens[:, position] = logits.argmax(-1)
            logits = model(tokens[:, position:position + 1], at(position))[:, -1]
    ours = torch.stack(ours, 1)                                                      # [B, steps, V]
    theirs, exact = (reference(path, tokens, dtype)[:, 7:-1] for dtype in (torch.bfloat16, torch.float32))
    rounding = difference(theirs, exact)
    best = theirs.max(-1).values
    lost = best - theirs.gather(-1, tokens[:, 8:, None])[..., 0]                     # 0 where we agree
    assert lost.max() <= 2 * rounding
    top = theirs.topk(2).values
    assert (top[..., 0] - top[..., 1] > 2 * rounding).float().mean() > 0.5, "too few steps are decided"
    assert (ours - exact).square().mean() < 1.5 * (theirs - exact).square().mean()   # no less exact than they are


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_bfloat16_embedding_scale(model_type, tmp_path):
    """Gemma's root of the width in float32: it was trained with the bfloat16 one, which for 72 is 8.5, not 8.485."""
    family = Family(model_type, dict(hidden_size=72, head_dim=16))
    model = load(write(family, tmp_path / "m"), torch.bfloat16)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(prompt())
        wanted = build(family).to(torch.bfloat16)(prompt(), output_hidden_states=True).hidden_states[0]
    assert wanted.dtype == torch.bfloat16 and torch.equal(seen[0], wanted)


def test_bfloat16_keeps_float32_rope(folder):
    """Frequencies cast with the weights, which is wrong by radians at position 1000; also after .to() and .half()."""
    wanted = load(folder("llama-3.1")).ropes[0].frequencies
    for model in (load(folder("llama-3.1"), torch.bfloat16), load(folder("llama-3.1")).to(torch.bfloat16),
                  load(folder("llama-3.1")).half()):
        assert model.ropes[0].frequencies.dtype == torch.float32
        assert torch.equal(model.ropes[0].frequencies, wanted)
        assert model.ropes[0](at(5))[0].dtype == torch.float32
        assert model(prompt()).dtype == torch.float32


# ---- folders ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama-3.2", "qwen3", "phi-3-mini-4k", "gemma-3"])
@pytest.mark.parametrize("shards, binary", [(3, False), (1, True), (3, True)])
def test_shards_and_pickles(name, shards, binary, tmp_path, truth):
    """A tensor looked for in the first shard only; a fused weight with parts in two shards; a tied head in .bin."""
    path = write(name, tmp_path / "m", shards=shards, binary=binary)
    files = list(path.glob("*.bin" if binary else "*.safetensors"))
    assert len(files) >= shards
    assert difference(load(path)(prompt()), truth(name)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-2", "gemma-2", "olmo-2"])
def test_half_precision_files_in_float32(name, dtype, tmp_path):
    """Half precision bits taken for another type, or arithmetic done before the cast."""
    path = write(name, tmp_path / "m", dtype=dtype)
    assert difference(load(path)(prompt()), reference(path, prompt())) < TOLERANCE
    assert load_checkpoint(path).tok_embeddings.weight.dtype == dtype


@pytest.mark.parametrize("name", ["llama-3.2", "gemma-2", "qwen3-small"])
@pytest.mark.parametrize("kept", ["both", "head"])
def test_tied_pair_under_other_names(name, kept, tmp_path, truth):
    """A tied model whose file has the head too, or only the head (save_pretrained drops either of two shared)."""
    path = write(name, tmp_path / "m")
    found = tensors(path)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    if kept == "head":
        del found["model.embed_tokens.weight"]
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    assert difference(load(path)(prompt()), truth(name)) < TOLERANCE


@pytest.mark.parametrize("name, keys", [
    ("llama-2", ["num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings"]),
    ("llama-2-70b", ["num_key_value_heads", "head_dim"]),
    ("mistral-nemo", ["num_key_value_heads"]),
    ("gemma-3", ["rope_theta", "rope_local_base_freq", "layer_types"]),
    ("gemma-2", ["layer_types", "tie_word_embeddings", "rope_theta"]),
    ("olmo-3", ["rope_theta", "layer_types"]),
    ("qwen2-window", ["layer_types"]),
    ("smollm-3", ["no_rope_layers", "layer_types"]),
    ("smollm-3-explicit", ["rope_theta"]),
])
def test_absent_keys(name, keys, tmp_path, truth):
    """A class default that differs from ours: the theta of a family, its pattern of layers, its number of heads."""
    path = write(name, tmp_path / "m", "old", edit=lambda c: {k: v for k, v in c.items() if k not in keys})
    assert difference(load(path)(prompt()), truth(name)) < TOLERANCE


MODEL_TYPES = {family.model_type: name for name, family in FAMILIES.items() if not family.wrapper}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_class_defaults(model_type, tmp_path):
    """theta 10000 and epsilon 1e-6 for everyone: a config without a word on rope and norms, left to the class."""
    family = Family(model_type, {} if model_type != "ministral" else {"head_dim": 16})
    dropped = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "layer_types", "rms_norm_eps")
    path = write(family, tmp_path / "m", "old", edit=lambda c: {k: v for k, v in c.items() if k not in dropped})
    assert difference(load(path)(prompt()), reference(path, prompt())) < TOLERANCE


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bfloat16_norm_of_a_family(model_type, folder):
    """The right norm for another family: scaled before the cast or after it, which is rounding, but not the same."""
    name = MODEL_TYPES[model_type]
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 9
    theirs = build(FAMILIES[name], name).to(torch.bfloat16).model.norm
    assert torch.equal(load(folder(name), torch.bfloat16).norm(x), theirs(x))


@pytest.mark.parametrize("name, config", [
    ("every Qwen layer slides", Family("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW,
                                                     max_window_layers=0, rope_parameters=rope(1e6)))),
    ("SmolLM3 with windows", Family("smollm3", dict(use_sliding_window=True, sliding_window=WINDOW,
                                                    rope_parameters=rope(1e6)))),
    ("InternLM3's own head width", Family("internlm3", dict(head_dim=128, rms_norm_eps=1e-5))),
    ("Gemma 2 with other caps", Family("gemma2", dict(head_dim=32, attn_logit_softcapping=None, sliding_window=WINDOW,
                                                      final_logit_softcapping=None))),
    ("linear scaling of one kind for all layers", Family("qwen3", dict(
        head_dim=32, layer_types=[SLIDING, FULL] * 2, use_sliding_window=True, sliding_window=WINDOW,
        rope_parameters=rope(1e6, "linear", factor=4.0)))),
])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_rarer_configs(name, config, dialect, tmp_path):
    """A value that is false as a truth value and means something: 0 layers, a cap of null."""
    path = write(config, tmp_path / "m", dialect)
    assert difference(load(path)(prompt()), reference(path, prompt())) < TOLERANCE


# ---- refusals --------------------------------------------------------------------------------------------------

def refused(path) -> str:
    with pytest.raises(ValueError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    return message


@pytest.mark.parametrize("model_type", ["helium", "ernie4_5", "glm", "glm4", "cohere", "cohere2", "deepseek_v3",
                                        "nemotron", "stablelm", "starcoder2", "olmo", "apertus", "arcee", "phimoe"])
def test_unknown_families_are_refused(model_type, tmp_path):
    """Garbage instead of an error: helium and ernie4_5 carry Llama's tensor names with another rope."""
    path = write(Family(model_type, dict(head_dim=16) if model_type != "deepseek_v3" else DEEPSEEK), tmp_path / "m")
    assert model_type in refused(path)


DEEPSEEK = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_group=1,
                n_routed_experts=4, num_experts_per_tok=2, topk_group=1, moe_intermediate_size=32,
                num_key_value_heads=4)


@pytest.mark.parametrize("change, word", [
    (dict(model_type="zebra"), "zebra"),
    (dict(model_type=None), "model_type"),
    (dict(hidden_act="relu2"), "relu2"),
    (dict(rope_scaling=dict(rope_type="proportional", factor=2.0)), "proportional"),
    (dict(rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3])), "mrope"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
    (dict(clip_qkv=8.0), "clip_qkv"),
    (dict(attention_multiplier=0.3), "attention_multiplier"),
    (dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    (dict(layer_types=["full_attention", "chunked_attention"] * 2), "chunked_attention"),
    (dict(quantization_config=dict(quant_method="zq")), "zq"),
    (dict(num_attention_heads=3, num_key_value_heads=2), "3"),
])
def test_unknown_values_are_refused(change, word, tmp_path):
    """A value that is ignored: the model then loads and talks nonsense."""
    path = write("llama-2-70b", tmp_path / "m", "old", edit=lambda c: c | change)
    assert word in refused(path)


@pytest.mark.parametrize("change, word", [
    (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight"),
    (lambda t: t.update({"model.layers.1.self_attn.sinks": torch.zeros(4)}), "self_attn.sinks"),
    (lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.zeros(64)}), "model.layers.4"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(63)}), "model.norm.weight"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), "bias"),
], ids=["lacking", "unknown", "another layer", "another shape", "bias of one only"])
def test_strict_loading(change, word, tmp_path):
    """A parameter left at random, or a tensor left unread."""
    path = write("qwen3", tmp_path / "m")
    found = tensors(path)
    change(found)
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    assert word in refused(path)


# ---- real files ------------------------------------------------------------------------------------------------

def test_real_weights(shared_data):
    """All of the above on weights that were trained: greedy text of a stories model, known from float64."""
    known = json.loads((shared_data / "reference/stories260K_reference.json").read_text())
    model = load(shared_data / "weights/stories260K/hf")
    model.setup_caches(1, 256)
    with torch.no_grad():
        for case in known["greedy"]:
            prompt_ids, wanted = case["prompt_ids"], case["greedy_ids"]
            logits = model(torch.tensor([prompt_ids]), torch.arange(len(prompt_ids)))[0, -1]
            if case["prompt"] == known["last_logits_top10_for"]:
                top = logits.topk(10)
                assert top.indices.tolist() == [int(token) for token in known["top10"]]
                assert difference(top.values, torch.tensor(list(known["top10"].values()))) < 1e-4
            found = [int(logits.argmax())]
            for position in range(len(prompt_ids), len(prompt_ids) + len(wanted) - 1):
                found.append(int(model(torch.tensor([found[-1:]]), at(position))[0, -1].argmax()))
            assert found == wanted


REAL = {    # folders of real config.json and index files: parameters
    "CodeLlama-7b-hf": 6_738_546_688, "Llama-2-7B-fp16": 6_738_415_616, "Llama-2-70b-lzlv": 68_976_648_192,
    "Llama-3-8B-Lexi": 8_030_261_248, "Llama-3.1-8B-merge": 8_030_261_248, "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552, "Mistral-Small-24B-dolphin3": 23_572_423_680,
    "Phi-3-mini-merge": 3_821_079_552, "Qwen2.5-14B-cogito": 14_765_947_904, "Qwen3-1.7B": 1_720_574_976,
    "Yi-1.5-6B": 6_061_035_520, "deepseek-coder-6.7b-SemCoder": 6_740_512_768, "gemma-2-2b": 2_614_341_888,
    "gemma-2b-it": 2_506_172_416, "gemma-3-4b-text": 3_880_263_168, "open_llama_3b-zh": 3_426_480_000,
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs(name, shared_data):
    """A size read wrongly off a real config.json and the real tensor names; the counts are the files' own."""
    path = shared_data / "configs" / name
    names = json.loads(next(path.glob("*.index.json")).read_text())["weight_map"]
    args = args_from(json.loads((path / "config.json").read_text()), dict.fromkeys(names))[0]
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(p.numel() for p in model.parameters()) == REAL[name]


# ---- the Transformer on its own --------------------------------------------------------------------------------

def random_model(**switches) -> Transformer:
    """Every kind of layer at once, unless told otherwise."""
    torch.manual_seed(0)
    args = ModelArgs(**dict(vocab_size=97, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=48, max_position=64,
                            qk_norm="head", ropes=[RopeArgs(), RopeArgs(theta=300.0, dim=4)],
                            layer_ropes=[0, 1, -1, 0], layer_windows=[0, 5, 0, 3], post_ffn_norm=True) | switches)
    model = Transformer(args).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(float(p.dim() == 1), 0.3 if p.dim() == 1 else 0.15)
    return model


def ids(batch=1, length=20, seed=0):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, *cuts):
    """Logits of tokens fed through the cache in pieces, which end at `cuts`."""
    cuts = [*cuts, tokens.shape[1]]
    return torch.cat([model(tokens[:, a:b], torch.arange(a, b), slots=b) for a, b in zip([0, *cuts], cuts)], dim=1)


NEAR = 1e-5         # sums of another order; the logits are about one


@pytest.mark.parametrize("cuts", [(), (1,), (19,), (3, 4, 11), tuple(range(1, 20))], ids=str)
def test_pieces_equal_the_whole(cuts):
    """Chunked prefill that forgets the chunk before, or decode that differs from prefill."""
    model, tokens = random_model(), ids(2)
    wanted = model(tokens)
    model.setup_caches(2, 20, slots=32)
    spoil(model)
    assert difference(run(model, tokens, *cuts), wanted) < NEAR


def test_a_b_a_through_one_cache():
    """Something of the previous prompt that is still seen: bitwise the same the second time."""
    model, a, b = random_model(), ids(seed=1), ids(seed=2)
    model.setup_caches(1, 20)
    first = run(model, a, 7, 8, 9)
    assert difference(run(model, b, 12), first) > 0.01
    assert torch.equal(run(model, a, 7, 8, 9), first)


@pytest.mark.parametrize("before, after", [(3, 20), (20, 3)])
def test_a_prompt_of_another_length_before(before, after):
    """A short prompt that sees a long one's tail, or a long one in what was set up for a short."""
    model, tokens = random_model(), ids(length=after)
    wanted = model(tokens)
    model.setup_caches(1, before)
    run(model, ids(length=before, seed=5), before // 2)
    model.setup_caches(1, after)
    assert difference(run(model, tokens, after // 2), wanted) < NEAR


def test_rows_have_positions_of_their_own():
    """A batch that moves in step: each row continues its own text from its own position."""
    model, tokens = random_model(), ids(3)
    alone = model(tokens)
    model.setup_caches(3, 20)
    run(model, tokens[:, :12])
    position = torch.tensor([12, 4, 9])
    rows = torch.arange(3)
    for step in range(5):
        now = position + step
        logits = model(tokens[rows, now][:, None], now[:, None])
        assert difference(logits[:, 0], alone[rows, now]) < NEAR


def test_rows_are_independent():
    """Attention or a norm that mixes rows; a cache row that another row writes."""
    model, tokens = random_model(), ids(3)
    model.setup_caches(3, 20)
    together = run(model, tokens, 6, 7)
    for row in range(3):
        assert difference(run(model, tokens[row:row + 1], 6, 7), together[row:row + 1]) < NEAR


def test_a_regrown_cache_keeps_its_contents():
    """A conversation that forgets its beginning when more room is needed; a needless allocation, which would move the
    addresses that compiled graphs hold."""
    model, tokens = random_model(), ids(2)
    wanted = model(tokens)
    assert model.setup_caches(2, 8) is True
    run(model, tokens[:, :8])
    assert model.setup_caches(2, 20) is True
    assert difference(model(tokens[:, 8:], torch.arange(8, 20)), wanted[:, 8:]) < NEAR
    address = model.layers[0].attention.cache.k.data_ptr()
    assert model.setup_caches(1, 5) is False and model.setup_caches(2, 20) is False
    assert model.layers[0].attention.cache.k.data_ptr() == address
    assert model.setup_caches(3, 20) is True
    assert difference(model(tokens[:, 19:], at(19))[:, 0], wanted[:, 19]) < NEAR


def test_dropped_caches():
    """Memory kept after drop_caches, or a model that cannot work without."""
    model, tokens = random_model(), ids()
    wanted = model(tokens)
    model.setup_caches(1, 20)
    model.drop_caches()
    assert model.layers[0].attention.cache.k is None and model.cache_slots == 0
    assert torch.equal(model(tokens), wanted)
    assert not [n for n in model.state_dict() if "cache" in n or "rope" in n]


def test_padding_to_the_right_is_harmless():
    """Padding that is attended to, at once or by the tokens that come later."""
    model, tokens = random_model(), ids()
    wanted = model(tokens)
    model.setup_caches(1, 32)
    padded = torch.cat([tokens[:, :9], torch.full((1, 7), 96)], dim=1)
    assert difference(model(padded, torch.arange(16))[:, :9], wanted[:, :9]) < NEAR
    for position in range(9, 20):
        assert difference(model(tokens[:, position:position + 1], at(position))[:, 0], wanted[:, position]) < NEAR


def test_slots_equal_the_full_cache():
    """Looking at the filled part only must not change what is seen."""
    model, tokens = random_model(), ids()
    model.setup_caches(1, 64)
    run(model, tokens)
    full = model(tokens[:, 12:13], at(12))
    for slots in (13, 16, 64):
        assert difference(model(tokens[:, 12:13], at(12), slots=slots), full) < NEAR


def test_logits_at_equals_indexing():
    """The head run on another position than the one that was asked for."""
    model, tokens = random_model(output_softcap=3.0, output_scale=0.5), ids(3)
    where = torch.tensor([[0, 19], [7, 3], [5, 5]])
    wanted = model(tokens)[torch.arange(3)[:, None], where]
    assert difference(model(tokens, logits_at=where), wanted) < NEAR


def test_positions_default_to_the_beginning():
    model, tokens = random_model(), ids(2)
    assert torch.equal(model(tokens), model(tokens, torch.arange(20)))
    assert torch.equal(model(tokens), model(tokens, torch.arange(20).expand(2, 20)))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [0, 3])
def test_one_query_equals_many(heads, kv_heads, window):
    """The two ways in which attention is written out: heads paired with the wrong key heads in one of them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, 9, 8), torch.randn(2, kv_heads, 9, 8), torch.randn(2, kv_heads, 9, 8)
    position = torch.arange(9).expand(2, 9)
    mask = attention_mask(position, position, window)
    many = attend(q, k, v, mask, 0.3)
    for t in range(9):
        assert difference(attend(q[:, :, t:t + 1], k, v, mask[:, :, t:t + 1], 0.3), many[:, :, t:t + 1]) < NEAR
    assert difference(attend(q, k, v, mask, 0.3, cap=1e4), many) < NEAR             # a cap too high to be felt


def test_window_counts_the_query():
    """A window of W keys that holds W + 1, or leaves the query out."""
    position = torch.arange(6)[None]
    mask = attention_mask(position, position, 3)[0, 0]
    assert mask.sum(-1).tolist() == [1, 2, 3, 3, 3, 3] and mask.diagonal().all() and not mask.triu(1).any()


def test_norms_scale_where_their_family_does():
    """Gemma's and OLMo's scale before the cast, Llama's after; and nobody's statistics in bfloat16."""
    x = (torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 30).bfloat16()
    for style, theirs in (("llama", LlamaRMSNorm), ("gemma", GemmaRMSNorm), ("float32", Olmo2RMSNorm)):
        ours = random_model(norm_style=style, dim=256, norm_eps=1e-5).norm.bfloat16()
        norm = theirs(256, eps=1e-5).bfloat16()
        norm.weight.data = ours.weight.data
        assert torch.equal(ours(x), norm(x)), style


def test_args_survive_json():
    """A switch that a file forgets."""
    linear = RopeArgs(kind="linear", scaling={"factor": 2.0})
    args = random_model(tied=True, attention_softcap=3.0, ropes=[linear, linear]).args
    again = ModelArgs(**json.loads(json.dumps(args.to_dict())))
    assert again == args
    with pytest.raises(TypeError):
        ModelArgs(**args.to_dict(), bogus=1)


@pytest.mark.parametrize("switches, word", [
    (dict(ropes=[RopeArgs(kind="spiral")]), "spiral"), (dict(activation="relu"), "relu"), (dict(n_kv_heads=3), "3"),
    (dict(layer_windows=[0, 0]), "window")])
def test_impossible_args(switches, word):
    with pytest.raises(ValueError, match=word):
        random_model(**switches)


# ---- rotary embeddings -----------------------------------------------------------------------------------------

SHORT, LONG = [1 + 0.01 * j for j in range(64)], [1 + 0.37 * j for j in range(64)]
ROPES = {       # kind, theta, context, head width, rotated part, length, numbers
    "default": ("default", 5e5, 131072, 128, 1.0, 100000, {}),
    "partial": ("default", 1e4, 131072, 128, 0.75, 100000, {}),
    "linear": ("linear", 1e6, 131072, 256, 1.0, 100000, dict(factor=8.0)),
    "dynamic-within": ("dynamic", 1e4, 4096, 128, 1.0, 4096, dict(factor=2.0)),
    "dynamic-beyond": ("dynamic", 1e4, 4096, 128, 1.0, 100000, dict(factor=2.0)),
    "llama3": ("llama3", 5e5, 131072, 128, 1.0, 100000, dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)),
    "llama3-small": ("llama3", 5e5, 131072, 64, 1.0, 100000, dict(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)),
    "yarn": ("yarn", 1e6, 131072, 128, 1.0, 100000, dict(factor=4.0, original_max_position_embeddings=32768)),
    "yarn-given-factor": ("yarn", 5e5, 65536, 128, 1.0, 65536, dict(
        factor=8.0, original_max_position_embeddings=8192, attention_factor=1.2079, beta_fast=32.0, beta_slow=1.0)),
    "yarn-mscale": ("yarn", 1e6, 131072, 128, 1.0, 100000, dict(
        factor=16.0, original_max_position_embeddings=16384, mscale=0.7, mscale_all_dim=1.0)),
    "yarn-untruncated": ("yarn", 1.5e5, 131072, 64, 1.0, 100000, dict(
        factor=32.0, original_max_position_embeddings=4096, truncate=False)),
    "yarn-one-step": ("yarn", 1e4, 131072, 128, 1.0, 100000, dict(
        factor=4.0, original_max_position_embeddings=32768, beta_fast=2.0, beta_slow=2.0)),
    "yarn-beyond-the-last-pair": ("yarn", 1e4, 524288, 128, 1.0, 100000, dict(
        factor=4.0, original_max_position_embeddings=131072)),
    "longrope-short": ("longrope", 1e4, 131072, 128, 1.0, 4096, dict(
        short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=4096)),
    "longrope-long": ("longrope", 1e4, 131072, 128, 1.0, 100000, dict(
        short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=4096)),
    "longrope-partial": ("longrope", 1e4, 131072, 128, 0.75, 4097, dict(
        short_factor=SHORT[:48], long_factor=LONG[:48], original_max_position_embeddings=4096)),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_tables(name):
    """Frequencies that differ in the last bit: at position 100,000 that is already 2e-3 of cos and sin."""
    kind, theta, context, width, part, length, numbers = ROPES[name]
    phi = kind == "longrope" or part != 1.0             # these two kinds of rope are Phi's
    parameters = dict(rope_type=kind, rope_theta=theta, **numbers) | (dict(partial_rotary_factor=part) if phi else {})
    outside = {k: v for k, v in numbers.items() if phi and k == "original_max_position_embeddings"}
    config = AutoConfig.for_model("phi3" if phi else "llama", hidden_size=4 * width, num_attention_heads=4,
                                  max_position_embeddings=context, pad_token_id=0, rope_parameters=parameters,
                                  **outside)
    positions = torch.tensor([[0, 1, 2, 17, 1000, 4095, 8191, 33333, 65535, length - 1]]).clamp(max=length - 1)
    cos, sin = (Phi3RotaryEmbedding if phi else LlamaRotaryEmbedding)(config)(torch.zeros(1), positions)
    ours = RotaryEmbedding(RopeArgs(theta, kind, int(width * part), numbers), context)
    ours.set_length(length)
    half = cos.shape[-1] // 2
    for mine, theirs in zip(ours(positions), (cos, sin)):
        assert difference(mine[:, 0], theirs[..., :half]) < 1e-6


FACTORS = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 4.0, 8.0, 9.0], original_max_position_embeddings=16)


@pytest.mark.parametrize("kind, scaling", [("dynamic", {"factor": 4.0}), ("longrope", FACTORS)])
def test_length_dependent_ropes_go_back(kind, scaling):
    """Frequencies that stay stretched after one long prompt; caches that were settled for another length."""
    model = random_model(ropes=[RopeArgs(kind=kind, scaling=scaling)], layer_ropes=[], max_position=16)
    long = ids(length=40)
    short = long[:, :12]
    wanted = model(short), model(long)
    assert torch.equal(model(short), wanted[0])
    assert difference(wanted[1][:, :12], wanted[0]) > 0.01
    for tokens, logits in ((short, wanted[0]), (long, wanted[1]), (short, wanted[0])):
        model.setup_caches(1, tokens.shape[1], slots=64)
        assert difference(run(model, tokens, 5, 6), logits) < NEAR
    model.drop_caches()
    assert torch.equal(model(short), wanted[0])
