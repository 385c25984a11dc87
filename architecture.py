"""Which model is it: config.json and tensor names to ModelArgs, and each foreign tensor to its place in our
model.

What it is: the only file that knows model families, foreign config keys and foreign tensor names. Three nets
keep wrong models out: every tensor must have a place and every parameter all its rows; a model_type must be
in FAMILIES; keys that change the mathematics must be ones the family defines. What it is not: nothing here
opens a file or reads a weight, so that all of it can be checked on names alone.

Reading order: `FAMILIES`, `args_from` and what it calls (config.json to ModelArgs); `NAMES`, `place`,
`plan` (tensor names to parameters). Then checkpoint.py, which opens the files and copies what is planned
here.
"""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model import ModelArgs, RopeArgs, Transformer


class CheckpointError(ValueError):
    """One sentence for the user: what was found, where, and the way out."""


# ---- config.json -> ModelArgs ------------------------------------------------------------------------------

@dataclass
class Family:
    """What a model_type implies beyond its config.json and its tensors. `defaults`: keys its config may
    leave out."""
    defaults: dict = field(default_factory=dict)
    slides: Callable[[int, dict], bool] = lambda i, c: False    # layers with a window, if `layer_types` is absent
    norm_style: str = "llama"
    sqrt_embedding: bool = False
    plain_local_rope: bool = False                              # layers with a window do without rope scaling
    rope_needs_window: bool = False                    # with a window in the model, other layers have no rope
    renormalizes: bool = False                                  # its routing, whatever `norm_topk_prob` says
    clamps: bool = False                                        # its SwiGLU
    stacks_columns: bool = False                                # stacked experts are transposed, gate and up mixed
    keys: tuple[str, ...] = ()                                  # those of GUARDED it defines


def every(i, c):
    return True


def late(i, c):
    return i >= c["max_window_layers"]


def even(i, c):
    return i % 2 == 0


def even_late(i, c):                    # as transformers has it, though the config's name says otherwise
    return even(i, c) and i < c["max_window_layers"]


def patterned(i, c):
    """A period, whose last layer is full, or a string such as LLLG."""
    p = c["sliding_window_pattern"]
    return p[i % len(p)] == "L" if isinstance(p, str) else bool((i + 1) % p) if p else False


def has_rope(i, c):
    """SmolLM3's list, in which 1 means that the layer rotates, or its interval."""
    return c["no_rope_layers"][i] if c.get("no_rope_layers") else (i + 1) % c["no_rope_layer_interval"]


def without_rope(i, c):
    return not has_rope(i, c)


QWEN = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256}
GRANITE = ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling")
CAPS = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")
OLMO = {"rms_norm_eps": 1e-5}
GRANITE_MOE = {"num_local_experts": 8, "num_experts_per_tok": 2, "attention_multiplier": 1.0}
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}

FAMILIES = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 4096}, every),
    "ministral": Family({"sliding_window": 4096}, every),
    "mixtral": Family({"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
                       "num_local_experts": 8, "num_experts_per_tok": 2}, every, renormalizes=True),
    "qwen2": Family(QWEN, late),
    "qwen2_moe": Family(QWEN | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                                "shared_expert_intermediate_size": 5632}, even_late),
    "qwen3": Family(QWEN | {"head_dim": 128}, late),
    "qwen3_moe": Family({"sliding_window": None, "use_sliding_window": False, "num_experts": 128,
                         "num_experts_per_tok": 8, "moe_intermediate_size": 768}, every),
    "gpt_oss": Family({"sliding_window": 128, "head_dim": 64, "rope_theta": 1.5e5, "rms_norm_eps": 1e-5,
                       "rope_parameters": YARN, "num_local_experts": 128, "num_experts_per_tok": 4}, even,
                      "float32", renormalizes=True, clamps=True, stacks_columns=True),
    "gemma": Family(GEMMA, norm_style="gemma", sqrt_embedding=True),
    "gemma2": Family(GEMMA | {"sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
                              "final_logit_softcapping": 30.0}, even, "gemma", True, keys=CAPS),
    "gemma3_text": Family(GEMMA | {"sliding_window": 4096, "query_pre_attn_scalar": 256, "rope_theta": 1e6,
                                   "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
                          patterned, "gemma", True, plain_local_rope=True, keys=CAPS),
    "phi3": Family({"rms_norm_eps": 1e-5}, every),
    "smollm3": Family({"rope_theta": 2e6, "no_rope_layer_interval": 4, "use_sliding_window": False}, without_rope,
                      keys=("no_rope_layers",)),
    "olmo2": Family(OLMO, norm_style="float32"),
    "olmoe": Family(OLMO | {"num_experts": 64, "num_experts_per_tok": 8}),
    "olmo3": Family(OLMO | {"rope_theta": 5e5, "sliding_window": 4096, "sliding_window_pattern": 4}, patterned,
                    "float32", plain_local_rope=True),
    "granite": Family(keys=GRANITE),
    "granitemoe": Family(GRANITE_MOE, keys=GRANITE, renormalizes=True),
    "granitemoeshared": Family(GRANITE_MOE | {"shared_intermediate_size": 0}, keys=GRANITE, renormalizes=True),
    "seed_oss": Family({"head_dim": 128}),
    "internlm3": Family({"rms_norm_eps": 1e-5, "head_dim": 128}),
    "exaone4": Family({"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4}, patterned,
                      rope_needs_window=True),
}
DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4, "max_position_embeddings": 2048}
# What would need another block: refused with the reason
UNSUPPORTED = {"llama4": "attention in chunks", "llama4_text": "attention in chunks",
               "phimoe": "LayerNorm and sparse-mixer routing", "dbrx": "LayerNorm and fused blocks"} | dict.fromkeys(
    ("deepseek_v2", "deepseek_v3", "kimi_k2", "longcat_flash", "minicpm3", "glm4_moe_lite", "glm_moe_dsa"),
    "multi-head latent attention") | dict.fromkeys(
    ("glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2", "dots1"), "another kind of routing") | dict.fromkeys(
    ("qwen3_next", "granitemoehybrid", "jamba", "minimax", "bamba", "mamba", "nemotron_h"), "layers without attention")
WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}     # multimodal: the text part's model_type, if unsaid
VISION = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Keys that change the mathematics, and that a family without them would ignore silently
GUARDED = (*GRANITE, *CAPS, "no_rope_layers", "clip_qkv", "use_bidirectional_attention")
CLAMP = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}            # model.silu_clamped's; a config with others is refused


def args_from(config: dict, tensors: dict, trust: bool = False) -> tuple[ModelArgs, dict]:
    """config.json and tensors (name -> whatever has a shape, or None) -> ModelArgs, and the text part's
    tensors."""
    refuse(config)
    refuse_quantized(config)
    config, tensors = text_part(config, tensors)
    places = all_places(tensors, config.get("model_type"))
    family = find_family(config, trust)
    c = DEFAULTS | family.defaults | config
    check_guarded(c, family)
    try:
        c |= {k: v for k, v in sizes(c, places).items() if c.get(k) is None}
        ropes, layer_ropes, windows = layer_kinds(c, family, c["num_hidden_layers"])
        return ModelArgs(
            vocab_size=c["vocab_size"], dim=c["hidden_size"], n_layers=c["num_hidden_layers"],
            n_heads=c["num_attention_heads"], n_kv_heads=c["num_key_value_heads"], head_dim=c["head_dim"],
            ffn_dim=c["intermediate_size"], max_position=c["max_position_embeddings"], norm_eps=c["rms_norm_eps"],
            norm_style=family.norm_style, activation=activation(c, family), ropes=ropes, layer_ropes=layer_ropes,
            layer_windows=windows, **switches(c, places), **scalars(c, family), **experts(c, family, places)), tensors
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error}") from None


def all_places(tensors: dict, model_type: str | None) -> dict[tuple[str, str], tuple[int, ...] | None]:
    """Every (parameter, part) that the tensors fill, with its shape if it is known."""
    places = {check_place(name, tensors, model_type): stored and stored.shape for name, stored in tensors.items()}
    return {where: shape for where, shape in places.items() if where}


QUANTIZED = ("gptq", "awq", "compressed-tensors", "mxfp4")      # read by foreign.py; of others the tensors' meaning is unknown


def refuse(config: dict):
    for c in (config, config.get("text_config") or {}):
        if reason := UNSUPPORTED.get(str(c.get("model_type"))):
            raise CheckpointError(f"unsupported model: model_type '{c['model_type']}' has {reason}")


def refuse_quantized(config: dict):
    for c in (config, config.get("text_config") or {}):
        found = c.get("quantization_config") or c.get("quantization")
        if found:
            method = (found.get("quant_method") if isinstance(found, dict) else found) \
                or ("MLX" if "quantization" in c else "unnamed")
            if method not in QUANTIZED:
                raise CheckpointError(f"quantized checkpoints of method '{method}' cannot be loaded: use the "
                                      "repository with the bfloat16 weights, or a GPTQ or AWQ one")


def text_part(config: dict, tensors: dict) -> tuple[dict, dict]:
    """Of a multimodal model the language model: its config, and its tensors without the vision tower's.
    Such configs leave out whatever equals the class default, so that sizes come from the tensors."""
    if str(config.get("model_type")) not in WRAPPERS:
        return config, tensors
    if not isinstance(config.get("text_config"), dict):
        raise CheckpointError("config.json lacks 'text_config'")
    tensors = {name: t for name, t in tensors.items() if not VISION.match(name)}
    text = {"model_type": WRAPPERS[config["model_type"]]} | config["text_config"]
    text |= {k: config[k] for k in ("tie_word_embeddings",) if k in config}
    return measured(text, all_places(tensors, text["model_type"])) | text, tensors


def measured(config: dict, places: dict) -> dict:
    """The sizes that can be seen in the tensors' shapes."""
    def shape(parameter, part=""):
        return places.get((parameter, part)) or (0, 0)
    layers = [int(parameter.split(".")[1]) for parameter, _ in places if parameter.startswith("layers.")]
    q = shape("layers.0.attention.wqkv.weight", "q")[0]
    norm = shape("layers.0.attention.q_norm.weight")[0]         # over one head, or over all of them
    head_dim = config.get("head_dim") or (norm if norm != q else 0) \
        or FAMILIES.get(config.get("model_type"), Family()).defaults.get("head_dim") or 0
    found = {"vocab_size": shape("tok_embeddings.weight")[0], "hidden_size": shape("tok_embeddings.weight")[-1],
             "intermediate_size": shape("layers.0.feed_forward.w2.weight")[-1], "head_dim": head_dim,
             "num_hidden_layers": 1 + max(layers, default=-1)}
    if head_dim:
        found["num_attention_heads"] = q // head_dim
        found["num_key_value_heads"] = shape("layers.0.attention.wqkv.weight", "k")[0] // head_dim
    return {key: size for key, size in found.items() if size}


def sizes(config: dict, places: dict) -> dict:
    """Head width and key heads where config.json has null or nothing: from the tensors, else the usual
    rule."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or measured(config, places).get("head_dim") or config["hidden_size"] // heads
    kv_heads = measured(config | {"head_dim": head_dim}, places).get("num_key_value_heads")
    return {"head_dim": head_dim, "num_key_value_heads": kv_heads or heads}


def find_family(config: dict, trust: bool) -> Family:
    """The row of the table; an unknown model_type is an error even if its tensors look like Llama's,
    because other mathematics (interleaved rope, for one) can hide behind the same names."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("config.json lacks 'model_type'")
    if kind in FAMILIES:
        return FAMILIES[kind]
    if not trust:
        raise CheckpointError(f"unsupported model: model_type '{kind}' is unknown; its tensors are named like Llama's, "
                              "so --trust_architecture would load it as one, at your own risk")
    return Family()


def check_guarded(config: dict, family: Family):
    for key in GUARDED:
        value = config.get(key)
        if key not in family.keys and (value is True or value not in (None, False, 1, [])):
            raise CheckpointError(f"unsupported model: {key} = {value} in config.json (model_type "
                                  f"'{config['model_type']}')")


def activation(config: dict, family: Family) -> str:
    name = config.get("hidden_activation") or config["hidden_act"]
    if name not in ACTIVATIONS:
        raise CheckpointError(f"unsupported model: hidden_act '{name}'; known are {', '.join(ACTIVATIONS)}")
    if family.clamps:
        for key, known in CLAMP.items():
            if config.get(key, known) != known:
                raise CheckpointError(f"unsupported model: {key} = {config[key]} in config.json, only {known} is known")
        return "silu_clamped"
    return "gelu_tanh" if family.sqrt_embedding and name == "gelu" else ACTIVATIONS[name]   # early Gemma configs


def scalars(c: dict, family: Family) -> dict:
    query = c.get("query_pre_attn_scalar")
    return {"attention_scale": c.get("attention_multiplier") or (query ** -0.5 if query else 0.0),
            "attention_softcap": c.get("attn_logit_softcapping") or 0.0,
            "output_softcap": c.get("final_logit_softcapping") or 0.0,
            "embedding_scale": c["hidden_size"] ** 0.5 if family.sqrt_embedding
            else c.get("embedding_multiplier") or 1.0,
            "residual_scale": c.get("residual_multiplier") or 1.0,
            "output_scale": 1.0 / (c.get("logits_scaling") or 1.0)}


def switches(config: dict, places: dict) -> dict:
    """What the tensors themselves say: biases, norms, tied head."""
    there = {re.sub(r"^layers\.\d+\.", "", parameter): shape for (parameter, _), shape in places.items()}
    qk_norm = ""
    if "attention.q_norm.weight" in there:
        shape = there["attention.q_norm.weight"]
        qk_norm = "head" if shape is None or math.prod(shape) == config["head_dim"] else "full"
    norms = {norm: f"{norm}.weight" in there
             for norm in ("attention_norm", "ffn_norm", "post_attention_norm", "post_ffn_norm")}
    for half in ("attention", "ffn"):
        if not (norms[f"{half}_norm"] or norms[f"post_{half}_norm"]):
            raise CheckpointError(f"unsupported model: the {half} has no norm (model_type '{config['model_type']}')")
    stored_head = {"tok_embeddings.weight", "output.weight"} <= set(there)      # it counts, whatever the config says
    return norms | {"qk_norm": qk_norm,
                    "tied": not stored_head and config.get("tie_word_embeddings") is not False,
                    "qkv_bias": "attention.wqkv.bias" in there, "o_bias": "attention.wo.bias" in there,
                    "attention_sinks": "attention.sinks" in there, "output_bias": "output.bias" in there,
                    "ffn_bias": "feed_forward.w2.bias" in there or "feed_forward.experts.0.w2.bias" in there}


def experts(c: dict, family: Family, places: dict) -> dict:
    """Where there are routers: how many experts, how wide, and which layers do without."""
    sparse = {int(parameter.split(".")[1]) for parameter, _ in places if parameter.endswith("feed_forward.router.weight")}
    X = c.get("num_local_experts") or c.get("num_experts") or 0
    if not sparse:
        if X > 1:
            raise CheckpointError(f"config.json says {X} experts, but there is no router among the tensors")
        return {}
    there = {re.sub(r"^layers\.\d+\.", "", parameter) for parameter, _ in places}
    shared = "feed_forward.shared.w2.weight" in there
    A = c["num_experts_per_tok"]
    if not 0 < A <= X:
        raise CheckpointError(f"config.json wants {A} experts a token (num_experts_per_tok), but there are {X}")
    return {"n_experts": X, "active_experts": A, "expert_dim": c.get("moe_intermediate_size") or c["intermediate_size"],
            "shared_dim": (c.get("shared_expert_intermediate_size") or c["shared_intermediate_size"]) if shared else 0,
            "shared_gate": "feed_forward.shared_gate.weight" in there,
            "renormalize": family.renormalizes or bool(c.get("norm_topk_prob")),
            "router_bias": "feed_forward.router.bias" in there,
            "dense_layers": [i for i in range(c["num_hidden_layers"]) if i not in sparse]}


def layer_kinds(c: dict, family: Family, layers: int) -> tuple[list[RopeArgs], list[int], list[int]]:
    """ropes, and per layer the rope and the window. Two ropes where layers with a window have their own."""
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    types = c.get("layer_types") or ["sliding_attention" if window and family.slides(i, c) else "full_attention"
                                     for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise CheckpointError(f"unsupported model: layer_types has '{sorted(unknown)[0]}'")
    local = [t == "sliding_attention" for t in types]
    if any(local) and not c.get("sliding_window"):
        raise CheckpointError("config.json has layers with a sliding window, but no 'sliding_window'")
    full, sliding = rope_settings(c, family)
    ropes = [rope_args(full, c)] + ([rope_args(sliding, c)] if sliding else [])
    layer_ropes = [int(slides and bool(sliding)) for slides in local]
    if "no_rope_layer_interval" in family.defaults:
        layer_ropes = [0 if has_rope(i, c) else -1 for i in range(layers)]
    if family.rope_needs_window and c.get("sliding_window"):
        layer_ropes = [0 if slides else -1 for slides in local]
    return ropes, layer_ropes, [c["sliding_window"] if slides else 0 for slides in local]


def rope_settings(c: dict, family: Family) -> tuple[dict, dict | None]:
    """The rope of full layers and, if it differs, of those with a window, out of either dialect:
    rope_theta and rope_scaling, or rope_parameters, which may be nested by layer type."""
    found = c.get("rope_parameters") or {}
    nested = {k: v for k, v in found.items() if isinstance(v, dict)}
    theta = {"rope_theta": c["rope_theta"]}
    full = theta | (nested.get("full_attention") or {} if nested else found) | (c.get("rope_scaling") or {})
    if not family.plain_local_rope:
        return full, None
    local = {"rope_theta": c.get("rope_local_base_freq") or full["rope_theta"]}
    return full, local | (nested.get("sliding_attention") or {})


ROPE_KEYS = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": (),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
             "longrope": ("short_factor", "long_factor")}


def rope_args(settings: dict, c: dict) -> RopeArgs:
    """One rope; `settings` is a rope_parameters dict with its rope_theta."""
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "su" or kind == "yarn" and c["model_type"] == "phi3":
        kind = "longrope"
    if kind not in ROPE_KEYS:
        raise CheckpointError(f"unsupported model: rope kind '{kind}'; known are {', '.join(ROPE_KEYS)}")
    partial = settings.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    scaling = {k: v for k, v in settings.items() if v is not None
               and k not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")}
    if kind != "default" and c.get("original_max_position_embeddings"):     # at the top it wins
        scaling["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    missing = [k for k in ROPE_KEYS[kind] if k not in scaling]
    if missing:
        raise CheckpointError(f"config.json lacks '{missing[0]}' for its rope of kind '{kind}'")
    dim = int(c["head_dim"] * partial)
    for key in ("short_factor", "long_factor"):
        if kind == "longrope" and len(scaling[key]) != dim // 2:
            raise CheckpointError(f"config.json has {len(scaling[key])} numbers in {key}; {dim // 2} are needed")
    return RopeArgs(theta=settings["rope_theta"], kind=kind, dim=dim, scaling=scaling if kind != "default" else {})


# ---- tensor names ------------------------------------------------------------------------------------------

NAMES = {   # within a layer: foreign module -> our module and its part, "" for the whole
    "self_attn.q_proj": ("attention.wqkv", "q"),
    "self_attn.k_proj": ("attention.wqkv", "k"),
    "self_attn.v_proj": ("attention.wqkv", "v"),
    "self_attn.qkv_proj": ("attention.wqkv", ""),
    "self_attn.o_proj": ("attention.wo", ""),
    "self_attn.q_norm": ("attention.q_norm", ""),
    "self_attn.k_norm": ("attention.k_norm", ""),
    "mlp.gate_proj": ("feed_forward.w13", "gate"),
    "mlp.up_proj": ("feed_forward.w13", "up"),
    "mlp.gate_up_proj": ("feed_forward.w13", ""),
    "mlp.down_proj": ("feed_forward.w2", ""),
    "mlp.gate": ("feed_forward.router", ""),
    "mlp.router": ("feed_forward.router", ""),
    "block_sparse_moe.gate": ("feed_forward.router", ""),
    "block_sparse_moe.router.layer": ("feed_forward.router", ""),
    "mlp.shared_expert.gate_proj": ("feed_forward.shared.w13", "gate"),
    "mlp.shared_expert.up_proj": ("feed_forward.shared.w13", "up"),
    "mlp.shared_expert.down_proj": ("feed_forward.shared.w2", ""),
    "mlp.shared_expert_gate": ("feed_forward.shared_gate", ""),
    "shared_mlp.input_linear": ("feed_forward.shared.w13", ""),
    "shared_mlp.output_linear": ("feed_forward.shared.w2", ""),
    "input_layernorm": ("attention_norm", ""),
    "post_attention_layernorm": ("ffn_norm", ""),               # unless there is a post_feedforward_layernorm
    "pre_feedforward_layernorm": ("ffn_norm", ""),
    "post_feedforward_layernorm": ("post_ffn_norm", ""),
}
NATIVE_NAMES = {    # Meta, Mistral, llama2.c, gpt-fast; all with interleaved rope
    "attention.wq": ("attention.wqkv", "q"),
    "attention.wk": ("attention.wqkv", "k"),
    "attention.wv": ("attention.wqkv", "v"),
    "attention.wqkv": ("attention.wqkv", ""),
    "attention.wo": ("attention.wo", ""),
    "feed_forward.w1": ("feed_forward.w13", "gate"),
    "feed_forward.w3": ("feed_forward.w13", "up"),
    "feed_forward.w2": ("feed_forward.w2", ""),
    "feed_forward.gate": ("feed_forward.router", ""),
    "attention_norm": ("attention_norm", ""),
    "ffn_norm": ("ffn_norm", ""),
}
EXPERT = re.compile(r"^(?:mlp|block_sparse_moe|feed_forward)\.experts\.(\d+)\.(\w+)$")
EXPERT_NAMES = {"gate_proj": ("w13", "gate"), "up_proj": ("w13", "up"), "gate_up_proj": ("w13", ""),
                "down_proj": ("w2", ""), "w1": ("w13", "gate"), "w3": ("w13", "up"), "w2": ("w2", "")}
# All experts of a layer in one tensor: module -> what one expert's would be called
STACKED = {"mlp.experts.gate_up_proj": "gate_up_proj", "mlp.experts.down_proj": "down_proj",
           "block_sparse_moe.input_linear": "gate_up_proj", "block_sparse_moe.output_linear": "down_proj"} | {
               f"block_sparse_moe.{middle}{w}": w for middle in ("", "cond_ffn.") for w in ("w1", "w2", "w3")}
OUTER = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}
NATIVE_OUTER = {"tok_embeddings": "tok_embeddings", "norm": "norm", "output": "output"}
PREFIX = re.compile(r"^(_orig_mod\.|module\.|model\.|language_model\.)*")
LEFTOVERS = re.compile(r"rotary_emb\.inv_freq$|rope\.freqs$|(^|\.)freqs_(cos|sin|cis)$|\.attn\.masked_bias$")


LEAVES = ("weight", "bias", "sinks", "scales", "zeros", "perm")         # the last three: of quantized layers


@dataclass
class Stored:
    """A tensor on disk, unread. `pieces` are its reads, joined along `dim` (Meta's files are cut for
    several GPUs); what a read returns is mapped from the file where the format allows."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Callable[[], Tensor]]
    dim: int = 0

    def narrow(self, dim: int, start: int, stop: int) -> "Stored":
        """Its part start ... stop along `dim`, unread as well. Pieces are of one size."""
        if (start, stop) == (0, self.shape[dim]):
            return self
        size = self.shape[dim] // (len(self.pieces) if dim == self.dim else 1)
        spans = [(i * size if dim == self.dim else 0, read) for i, read in enumerate(self.pieces)]
        cut = [(read, max(start - at, 0), min(stop - at, size)) for at, read in spans]
        pieces = [lambda read=read, a=a, b=b: read().narrow(dim, a, b - a) for read, a, b in cut if a < b]
        return Stored((*self.shape[:dim], stop - start, *self.shape[dim + 1:]), self.dtype, pieces, self.dim)


    def turned(self, transposed: bool, first: bool, mixed: bool) -> "Stored":
        """As it is, or: the only one of the first dimension; transposed; even rows first, then odd ones."""
        def read(rows: slice) -> Tensor:
            t = torch.cat([read() for read in self.pieces], self.dim) if len(self.pieces) > 1 else self.pieces[0]()
            t = t[0] if first else t
            return (t.t() if transposed else t)[rows]
        shape = self.shape[1:] if first else self.shape
        orders = [slice(0, None, 2), slice(1, None, 2)] if mixed else [slice(None)]
        return Stored(shape[::-1] if transposed else shape, self.dtype, [lambda r=r: read(r) for r in orders])


@dataclass
class Part:
    """Rows start ... stop of a parameter come from tensor `source`, from its row `first` on. head_dim: its
    rows are in interleaved order, head by head; 0: they are as ours."""
    source: str
    start: int
    stop: int
    first: int = 0
    head_dim: int = 0
    columns: tuple[int, int] = ()       # of the source that are wanted; (): all


def cut_parts(parts: list[Part], dim: int, ranges: list[tuple[int, int]]) -> list[Part]:
    """What remains of a parameter's parts where of its rows (dim 0) or columns (1) only these ranges are kept."""
    if dim == 1:
        return [replace(part, columns=ranges[0]) for part in parts]
    kept, at = [], 0
    for start, stop in ranges:
        for part in parts:
            a, b = max(start, part.start), min(stop, part.stop)
            if a < b:
                kept.append(replace(part, start=at + a - start, stop=at + b - start, first=part.first + a - part.start))
        at += stop - start
    return kept


def unstack(tensors: dict[str, Stored], config: dict) -> dict[str, Stored]:
    """Tensors that hold all experts of a layer, as one for each expert, unread."""
    found = {}
    for name, stored in tensors.items():
        match = re.match(r"(.*?layers\.\d+\.)([\w.]+?)(_bias|\.weight|)$", name)
        if not match or match[2] not in STACKED:
            found[name] = stored
            continue
        layer, leaf = match[1], "bias" if match[3] == "_bias" else "weight"
        flat = len(stored.shape) == 2 and leaf == "weight"      # Mistral's files: [X * F, D], the last one transposed
        X = config.get("num_local_experts") or config.get("num_experts") or 1 if flat else stored.shape[0]
        columns = FAMILIES.get(str(config.get("model_type")), Family()).stacks_columns
        for e in range(X):
            one = stored.narrow(0, e * stored.shape[0] // X, (e + 1) * stored.shape[0] // X)
            one = one.turned(flat and match[2].endswith("w2") or columns and leaf == "weight", not flat,
                             columns and "gate_up" in match[2])
            found[f"{layer}mlp.experts.{e}.{STACKED[match[2]]}.{leaf}"] = one
    return found


def place(name: str, names) -> tuple[str, str] | None:
    """A foreign tensor's (parameter, part) in our model; None for a known leftover; KeyError if it has no
    place."""
    if LEFTOVERS.search(name):
        return None
    inner = PREFIX.sub("", name)
    module, _, leaf = inner.rpartition(".")
    if leaf not in LEAVES:
        raise KeyError(name)
    if not module.startswith("layers."):
        return f"{(OUTER | NATIVE_OUTER)[module]}.{leaf}", ""
    _, layer, module = module.split(".", 2)
    if found := EXPERT.match(module):
        ours, part = EXPERT_NAMES[found[2]]
        return f"layers.{layer}.feed_forward.experts.{int(found[1])}.{ours}.{leaf}", part
    ours, part = (NAMES | NATIVE_NAMES | {"self_attn": ("attention", "")})[module]
    if module == "post_attention_layernorm" and \
            name.replace("post_attention_layernorm", "post_feedforward_layernorm") in names:
        ours = "post_attention_norm"
    return f"layers.{layer}.{ours}.{leaf}", part


def check_place(name: str, names, model_type: str | None) -> tuple[str, str] | None:
    try:
        return place(name, names)
    except (KeyError, ValueError):
        raise no_place(name, model_type) from None


def no_place(name: str, model_type: str | None) -> CheckpointError:
    kind = f" (model_type '{model_type}')" if model_type else ""
    return CheckpointError(f"unsupported model: tensor '{name}'{kind} has no place in this Transformer")


def plan(model: Transformer, names, model_type: str | None = None, own: bool = False,
         split: set[str] = frozenset()) -> dict[str, list[Part]]:
    """For every tensor of `model` (on any device) the parts it is made of, from the names alone. Strict: a
    name without a place, or a parameter without all its rows, raises CheckpointError. split: modules whose
    parts (q, k, v; gate, up) stay apart, as children of these names."""
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    steps = {name: [] for name in shapes}
    tied_to = "tok_embeddings.weight" if model.args.tied else "output.weight"
    for name in names:
        where = (name, "") if own else check_place(name, names, model_type)
        if where is None:
            continue
        parameter, part = where
        module, _, leaf = parameter.rpartition(".")
        if module in split:
            parameter, part = f"{module}.{part}.{leaf}", ""
        parameter = tied_to if parameter == "output.weight" else parameter
        if parameter not in shapes:
            raise no_place(name, model_type)
        if leaf == "perm":                                      # of inputs: the parts of a fused layer share one
            steps[parameter] = [Part(name, 0, shapes[parameter][0])]
            continue
        interleaved = not own and ".attention.w" in name and parameter.split(".")[-2] == "wqkv"
        span = part_rows(model.args, shapes[parameter][0]).get(part) or (0, shapes[parameter][0])
        steps[parameter] += parts_of(name, span, part, interleaved, model.args)
    for parameter, parts in steps.items():
        check_cover(parameter, parts, shapes[parameter][0], part_rows(model.args, shapes[parameter][0]), names, own)
    return steps


def part_rows(args: ModelArgs, size: int = 0) -> dict[str, tuple[int, int]]:
    """The rows of each part; gate and up are the halves of `size`."""
    q, kv, f = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, size // 2
    return {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv), "gate": (0, f), "up": (f, 2 * f)}


def parts_of(name: str, span: tuple[int, int], part: str, interleaved: bool, args: ModelArgs) -> list[Part]:
    if not interleaved:
        return [Part(name, *span)]
    if part:
        return [Part(name, *span, head_dim=args.head_dim if part in "qk" else 0)]
    rows = part_rows(args)                                      # fused: q and k are reordered, v is not
    return [Part(name, *rows[p], first=rows[p][0], head_dim=args.head_dim if p in "qk" else 0) for p in "qkv"]


def check_cover(parameter: str, parts: list[Part], size: int, rows: dict, names, own: bool):
    """Every row once."""
    at = 0
    for part in sorted(parts, key=lambda p: p.start):
        if part.start < at:
            raise CheckpointError(f"two tensors fill the same rows of '{parameter}': '{part.source}' is one too many")
        if part.start > at:
            break
        at = part.stop
    if at != size:
        lacking = next((p for p, span in rows.items() if parts and span[0] == at
                        and (p in "qkv") == ("wqkv" in parameter)), "")
        name = parameter if own else foreign_name(parameter, lacking, names)
        raise CheckpointError(f"the checkpoint lacks tensor '{name}'")


def foreign_name(parameter: str, part: str, names) -> str:
    """Our parameter under the name it would have among `names`; an expert's is its neighbour's with its numbers."""
    if ".experts." in parameter:
        numbers = iter(re.findall(r"\d+", parameter))
        part = part or ("gate" if ".w13." in parameter else "")
        like = next((n for n in names if ".experts." in n and EXPERT_NAMES.get(n.split(".")[-2]) in
                     [(parameter.split(".")[-2], p) for p in (part, "")]), parameter)
        layer, expert = next(numbers), next(numbers)
        return re.sub(r"experts\.\d+", f"experts.{expert}", re.sub(r"layers\.\d+", f"layers.{layer}", like))
    native = any(".attention.w" in n for n in names)
    module, _, leaf = parameter.rpartition(".")
    if leaf == "sinks":
        return "model." + parameter.replace("attention", "self_attn")
    prefix = "" if native or module == "output" else "model."
    if not module.startswith("layers."):
        outer = {ours: theirs for theirs, ours in (NATIVE_OUTER if native else OUTER).items()}
        return f"{prefix}{outer.get(module, module)}.{leaf}"
    _, layer, module = module.split(".", 2)
    part = part or {"attention.wqkv": "q", "feed_forward.w13": "gate"}.get(module, "")
    inner = {ours: theirs for theirs, ours in reversed((NATIVE_NAMES if native else NAMES).items())}
    return f"{prefix}layers.{layer}.{inner.get((module, part), module)}.{leaf}"
