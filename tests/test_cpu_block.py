"""A step, and a block, in one call against what they stand for in model.py: the same packed layers, one operator after
another."""
import copy
import re

import pytest
import torch

from experts import pack_model
from generate import EAGER, Steps, compile_steps, decode, decode_n_tokens, load_model, make_room
from kernels import cpu
from kernels.cpu_block import PLACE, OneCall, WholeStep
from model import FEW, ModelArgs, RopeArgs, TokenTable, Transformer, TransformerBlock
from quantize import KINDS, QuantizedLinear
from sampling import Sampler, Sampling
from speculate import SpeculativeSteps, compile_speculation

FAMILIES = {  # what a block may have beside Llama's
    "llama": {},
    "biases": dict(qkv_bias=True, o_bias=True, ffn_bias=True),
    "head norms": dict(qk_norm="head", norm_style="float32"),
    "norms over all heads, behind": dict(qk_norm="full", attention_norm=False, ffn_norm=False, post_attention_norm=True,
                                         post_ffn_norm=True),
    "gemma": dict(norm_style="gemma", activation="gelu_tanh", post_attention_norm=True, post_ffn_norm=True, qk_norm="head",
                  attention_softcap=1.0, layer_windows=[6, 0], attention_scale=0.1),
    "granite": dict(residual_scale=0.3),
    "a layer without rotation": dict(layer_ropes=[0, -1]),
    "half of a head turned": dict(ropes=[RopeArgs(dim=16)]),
    "exact gelu": dict(activation="gelu"),                                           # its second half stays outside
    "scales": dict(embedding_scale=11.3, output_scale=0.125, output_softcap=0.5),
    "a slow rope and a fast one": dict(ropes=[RopeArgs(1e6, "yarn", scaling={"factor": 4.0}), RopeArgs()], layer_ropes=[0, 1]),
    "tied": dict(tied=True),
    "mixture": dict(n_experts=4, active_experts=2, dense_layers=[1]),
}


def rounded(weight: torch.Tensor, mode: str) -> QuantizedLinear:
    if mode != "mxfp4":
        return KINDS[mode].quantize(weight, 32 if mode == "int4" else 0)
    layer = KINDS[mode](weight.shape[1], weight.shape[0], 32)                        # these are read, never made
    layer.weight.random_(256), layer.scales.uniform_(0.02, 0.1)
    return layer


def packed_model(mode: str = "", **more) -> Transformer:
    if not cpu.available(quantized=True):
        pytest.skip("there is no C++ compiler")
    torch.manual_seed(0)
    model = Transformer(ModelArgs(96, 128, 2, 4, n_kv_heads=2, **{"ffn_dim": 192} | more)).bfloat16().eval()
    for p in model.parameters():
        p.requires_grad_(False).add_(torch.randn_like(p) * 0.1)
    for parent in [m for m in model.modules() if mode]:
        for name, layer in list(parent.named_children()):
            if type(layer) in (torch.nn.Linear, TokenTable) and (layer is not model.tok_embeddings or model.output is None):
                setattr(parent, name, rounded(layer.weight.data, mode))
                getattr(parent, name).bias = getattr(layer, "bias", None)
    pack_model(model)
    return model


@torch.no_grad()
def steps_of(model: Transformer, step=None) -> torch.Tensor:
    """Logits of a prompt of two rows, of 3 tokens as speculation verifies them, and of one, at unlike positions."""
    make_room(model, 3, 40)
    step = step or (lambda tokens, pos: model(tokens, pos, slots=40))
    tokens = torch.arange(2 * FEW + 8).view(2, -1)
    logits, at = [model(tokens, slots=40)[:, -1]], torch.tensor([[FEW + 4], [FEW]])
    for T in (3, 1):
        logits.append(step(tokens[:, :T].contiguous(), at + torch.arange(T))[:, -1])
        at = at + T
    return torch.stack(logits)


def as_blocks(model: Transformer) -> Transformer:
    for block in model.layers:
        block.__class__ = TransformerBlock
    return model


@pytest.mark.parametrize("mode", ["", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model(family, mode):
    model = packed_model(mode, **FAMILIES[family])
    assert all(type(block) is OneCall for block in model.layers)
    assert (model.step is None) == (family in ("exact gelu", "mixture"))
    one, model.step = steps_of(model), None
    assert not torch.equal(one[1], one[2])
    for twin, tolerance in ((model, 0.02 if mode else 0.01), (as_blocks(model), 0.02)):    # 0.01: a logit rounded twice
        torch.testing.assert_close(one, steps_of(twin), rtol=tolerance, atol=tolerance * one.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_portable(family, monkeypatch):
    """Without this machine's instructions."""
    model = packed_model(**FAMILIES[family])
    torch.ops.load_library(cpu.build("step.cpp", "-DPORTABLE", "-DLIBRARY=portable_step", "-O1"))
    torch.ops.portable_step.connect(torch.ops.cpu_attention.address(), torch.ops.cpu_bfloat16.address(), 0)
    wanted = steps_of(model)
    monkeypatch.setattr(torch.ops, "cpu_step", torch.ops.portable_step)
    torch.testing.assert_close(steps_of(model), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_many_rows_of_wide_layers():
    """So wide that threads share the rows between the products too."""
    model = packed_model(ffn_dim=14336)
    make_room(model, 16, 40)
    tokens, pos = torch.arange(16)[:, None], torch.full((16, 1), 7)
    with torch.no_grad():
        one, plain = model(tokens, pos, slots=40), as_blocks(model)(tokens, pos, slots=40)
    torch.testing.assert_close(one, plain, rtol=0.02, atol=0.02 * one.abs().max().item())


def test_what_does_not_fit_stays_a_block():
    """Learned sinks, another dtype, a layer or a norm that somebody put there."""
    assert type(packed_model(attention_sinks=True).layers[0]) is TransformerBlock
    assert all(type(block) is TransformerBlock for block in load_model(dtype="float32")[0].layers)
    model = packed_model()
    model.layers[0].attention.wo = torch.nn.Identity()
    assert [type(block) for block in pack_model(model).layers] == [TransformerBlock, OneCall]
    model.layers[1].ffn_norm = torch.nn.LayerNorm(128)
    assert [type(block) for block in pack_model(model).layers] == [TransformerBlock, TransformerBlock]


def test_packed_again_it_has_the_new_layers():
    model, other = packed_model(), packed_model("int4")
    model.layers[0].feed_forward.w2 = torch.nn.Linear(192, 128, bias=False, dtype=torch.bfloat16)
    model.layers[1].attention.wqkv = other.layers[1].attention.wqkv
    one = steps_of(pack_model(model))
    assert all(type(block) is OneCall for block in model.layers)
    torch.testing.assert_close(one, steps_of(as_blocks(model)), rtol=0.02, atol=0.02 * one.abs().max().item())


def test_a_model_that_was_moved_is_made_of_blocks_again():
    """Its weights lie elsewhere: the old addresses would be read."""
    model = packed_model()
    before = steps_of(model)
    moved = model.float().bfloat16()
    assert all(type(block) is TransformerBlock for block in moved.layers)
    torch.testing.assert_close(steps_of(moved), before, rtol=0.02, atol=0.02 * before.abs().max().item())
    assert all(type(block) is OneCall for block in pack_model(moved).layers)
    assert torch.equal(steps_of(moved), before)


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_threads_make_no_difference(threads):
    """One has no team; five are more than there are processors here."""
    model, before = packed_model("int4", ffn_dim=4096), torch.get_num_threads()
    wanted = steps_of(model)
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            assert torch.equal(steps_of(model), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["", *KINDS])
@pytest.mark.parametrize("more", [dict(tied=True), dict(tied=True, embedding_scale=2.5), dict(output_bias=True), dict(output_scale=0.3)])
def test_ends_are_the_same_bits(mode, more):
    """A step without blocks: embeddings, a norm, the head."""
    model = packed_model(mode, **more)
    make_room(model, 3, 40)
    tokens, pos = torch.arange(12).view(3, 4) * 8, torch.arange(4).expand(3, -1)
    model.step.forms = model.step.forms[:0]
    with torch.no_grad():
        x = model.tok_embeddings(tokens)
        x = x * torch.tensor(model.args.embedding_scale, dtype=x.dtype)
        assert torch.equal(model(tokens, pos, slots=40), model.head(model.norm(x)))
        at = torch.tensor([[3, 1], [0, 0], [2, 3]])
        assert torch.equal(model(tokens, pos, slots=40, logits_at=at), model.head(model.norm(x.gather(1, at[..., None].expand(-1, -1, 128)))))


def test_what_is_not_known_of_a_model_leaves_it_its_blocks():
    """A norm or a head that somebody put there; a table in another dtype."""
    for name, part in (("norm", torch.nn.LayerNorm(128)), ("output", torch.nn.Identity()), ("tok_embeddings", torch.nn.Embedding(96, 128))):
        model = packed_model()
        assert isinstance(model.step, WholeStep)
        setattr(model, name, part)
        assert pack_model(model).step is None and all(type(block) is OneCall for block in model.layers)


def test_a_head_of_another_width():
    model = packed_model()
    model.output = torch.nn.Linear(128, 40, bias=False, dtype=torch.bfloat16)
    wanted = steps_of(as_blocks(pack_model(model)))
    assert wanted.shape[-1] == 40
    torch.testing.assert_close(steps_of(pack_model(model)), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_what_it_does_not_take_goes_through_the_blocks():
    """Ids of 32 bits; caches of floats, which the last norm's dtype asks for."""
    model = packed_model()
    make_room(model, 1, 40)
    tokens, pos = torch.tensor([[5, 6]]), torch.tensor([[0, 1]])
    with torch.no_grad():
        wanted = model(tokens, pos, slots=40)
        torch.testing.assert_close(model(tokens.int(), pos, slots=40), wanted, rtol=1e-2, atol=1e-2)
        model.drop_caches()
        model.norm.float()
        make_room(model, 1, 40)
        assert model.layers[0].attention.cache.k.dtype == torch.float32 and not model.step.takes(tokens)


@torch.no_grad()
def test_nothing_to_do_is_done():
    model = packed_model()
    make_room(model, 2, 40)
    tokens, pos = torch.arange(6).view(2, 3), torch.arange(3).expand(2, 3)
    for shape, inputs in (((2, 0, 96), dict(logits_at=torch.zeros(2, 0, dtype=torch.long))), ((0, 3, 96), dict(rows=0)), ((2, 0, 96), dict(tokens=0))):
        rows, columns = inputs.pop("rows", 2), inputs.pop("tokens", 3)
        assert model(tokens[:rows, :columns], pos[:rows, :columns], slots=40, **inputs).shape == shape


def test_a_broken_model_shows():
    """NaN does not become a number that looks like one."""
    model = packed_model(output_softcap=5.0)
    model.norm.weight.data.fill_(torch.nan)
    assert steps_of(model).isnan().all()
    model = packed_model(attention_softcap=5.0)
    model.layers[0].attention.wqkv.packed.view(-1)[:64] = torch.nan
    assert steps_of(model).isnan().all()


def test_there_is_nothing_to_compile_in_one_call():
    assert compile_steps(model=packed_model()) == EAGER
    assert (compile_steps(True, True, packed_model()) == EAGER) == cpu.ABLE["prompts"]
    assert compile_steps(True, True, packed_model(head_dim=272)).prefill is not EAGER.prefill
    assert compile_steps(model=packed_model(activation="gelu")).decode is not EAGER.decode
    assert compile_steps(model=packed_model().to(torch.bfloat16)).decode is not EAGER.decode
    assert compile_speculation(packed_model()) == compile_speculation(packed_model(), packed_model()) == SpeculativeSteps()
    assert compile_speculation(packed_model(), packed_model(activation="gelu")).draft is not SpeculativeSteps().draft


def test_a_cache_that_grows_or_goes_is_where_the_call_looks():
    model = packed_model()
    before = steps_of(model)
    make_room(model, 5, 600)
    assert torch.equal(steps_of(model), before)
    model.layers[1].attention.cache.to(torch.float32)
    with pytest.raises(RuntimeError, match="pack it again"), torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[4]]), slots=40)
    model.layers[1].attention.cache.to(torch.bfloat16)
    assert torch.equal(steps_of(model), before)
    model.drop_caches()
    assert not model.layers[0].form[0, -PLACE:].any()
    tokens = torch.arange(3)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens), as_blocks(model)(tokens))


def test_packed_in_inference_mode_it_runs_outside():
    with torch.inference_mode():
        model = packed_model()
    assert torch.isfinite(steps_of(model)).all()


@torch.no_grad()
@pytest.mark.parametrize("given", [dict(temperature=0), dict(top_k=20), dict(top_k=0), dict(temperature=0, repetition_penalty=1.5),
                                   dict(top_k=20, repetition_penalty=1.5)], ids=str)
def test_steps_that_draw_draw_what_others_do(given, monkeypatch):
    """Rows at unlike positions, in a cache that has more, over the end of a bucket."""
    model, settings = packed_model("int8"), Sampling(seed=7, **given)
    make_room(model, 3, 300)
    model(torch.arange(2 * 96).view(2, -1) % 96, torch.arange(96).expand(2, -1), slots=300)
    def ids(steps):
        sampler, at = Sampler(settings, [[1], [2]], 96, torch.device("cpu")), torch.tensor([60, 96])
        return torch.stack([t.clone() for t in decode_n_tokens(model, steps, torch.tensor([3, 4]), at, 250, 12, sampler)])
    asked = []
    def slowly(*args):
        asked.append(args)
        return decode(*args)
    at_once, call = [], WholeStep.next
    monkeypatch.setattr(WholeStep, "next", lambda *args: (at_once.append(args), call(*args))[1])
    found, expected = ids(EAGER), ids(Steps(decode=slowly))
    assert len(at_once) == (0 if given.get("top_k") == 0 else 12) and len(asked) == 12 and torch.equal(found, expected) and len(found.unique()) > 2


def test_steps_that_draw_tell_what_is_wrong():
    model = packed_model()
    make_room(model, 1, 40)
    sampler, zero = Sampler(Sampling(temperature=0), [[1]], 96, torch.device("cpu")), torch.zeros(1, dtype=torch.long)
    for tokens, at, ahead, told in ((zero, zero + 250, 20, "position 270 in a cache"), (zero + 96, zero, 0, "id 96 in a vocabulary"),
                                    (zero.expand(2), zero.expand(2), 0, "2 rows in a cache of 1"), (zero.expand(2), zero, 0, "another number of rows")):
        with pytest.raises((IndexError, RuntimeError), match=told):
            model.step.next(tokens, at, ahead, 40, sampler)
    assert model.step.next(zero, zero, 0, 40, sampler).shape == (1,)
    step = model.step
    model.float()
    with pytest.raises(RuntimeError, match="pack it again"):
        step.next(zero, zero, 0, 40, sampler)


def test_who_still_has_an_old_form_is_told():
    model = packed_model()
    make_room(model, 1, 40)
    step, zero = model.step, torch.zeros(1, 1, dtype=torch.long)
    model.float()
    assert not step.takes(zero)
    with pytest.raises(RuntimeError, match="pack it again"):
        step(zero, zero, 40, None)


def test_what_lies_outside_is_told():
    model = packed_model()
    make_room(model, 1, 40)
    with pytest.raises(IndexError, match="position 4000 in a cache of"):
        model(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[4000]]), slots=40)
    with pytest.raises(IndexError, match="2 rows in a cache of 1"):
        model(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[4], [4]]), slots=40)
    with pytest.raises(IndexError, match="id 96 in a vocabulary of 96"):
        model(torch.tensor([[96]]), torch.tensor([[4]]), slots=40)
    with pytest.raises(IndexError, match="token 1 of 1"):
        model(torch.tensor([[3]]), torch.tensor([[4]]), slots=40, logits_at=torch.tensor([[1]]))
    make_room(model, 2, 40)
    with pytest.raises(RuntimeError, match="another number of rows"):
        model(torch.tensor([[3], [3]]), torch.tensor([[4], [4]]), slots=40, logits_at=torch.tensor([[0]]))


def test_a_copy_has_its_own_weights():
    model = packed_model()
    before, twin = steps_of(model), copy.deepcopy(model)
    assert all(type(block) is TransformerBlock for block in (*twin.layers, copy.copy(model.layers[0])))
    assert twin.step is None
    twin.layers[0].attention.wo.packed.zero_()
    assert torch.equal(steps_of(model), before)
    assert not torch.equal(steps_of(pack_model(twin)), before)


@pytest.mark.parametrize("more, call", [({}, "step"), (dict(layer_windows=[6, 0]), "step"), (dict(activation="gelu"), "block"),
                                        (dict(n_experts=4, active_experts=2), "block")])
def test_compiled_steps_call_it_and_copy_no_cache(more, call):
    model = packed_model("int8", **more)
    make_room(model, 2, 40)
    from torch._inductor.utils import run_and_get_code
    steps = compile_steps()
    def step(tokens, pos):
        return model(tokens, pos, slots=40) if tokens.shape[1] > 1 else steps.decode(model, tokens, pos, torch.arange(40))[:, None]
    with torch._inductor.utils.fresh_cache():
        compiled, code = run_and_get_code(steps_of, model, step)
    torch.testing.assert_close(compiled, steps_of(as_blocks(model)), rtol=0.03, atol=0.03 * compiled.abs().max().item())
    assert sum(len(re.findall(rf'"cpu_step::{call}"', text)) for text in code) == (1 if call == "step" else 2)
    assert not any(re.search(r"(?<!to)_copy_|\bcopy_", text) for text in code)         # a conversion is to_copy
