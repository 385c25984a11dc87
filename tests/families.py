"""Tiny random Hugging Face folders, one for each model family: what the parity tests load.

A family is its `model_type` and the config keys in which it differs from `SMALL`. transformers builds the model, every
parameter is drawn at random (a norm of ones or a bias of zeros would hide that nobody reads it), and `write` saves the
folder in any of the forms that are found in the wild: three spellings of config.json, one shard or three, safetensors
or .bin, float32 or half precision. `reference` reads a folder back with transformers; it knows nothing of our code.

Nothing here is a test; any test file may import it. Nothing here touches the network.
"""
import contextlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, BATCH, LENGTH = 160, 3, 24           # windows, original contexts and the like are chosen around LENGTH
WINDOW = 6
# The norm's epsilon is large so that one who reads a default instead is seen.
SMALL = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-3,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(theta: float, kind: str = "default", **numbers) -> dict:
    return dict(rope_type=kind, rope_theta=float(theta), **numbers)


def llama3(theta: float, factor: float) -> dict:
    return rope(theta, "llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64)


def longrope(pairs: int, original: int, **numbers) -> dict:
    """A short and a long factor for each pair; `original` below LENGTH makes the long ones count."""
    return rope(10000, "longrope", short_factor=[1.0 + 0.1 * j for j in range(pairs)],
                long_factor=[2.0 + 0.7 * j for j in range(pairs)], original_max_position_embeddings=original, **numbers)


@dataclass(frozen=True)
class Family:
    model_type: str
    config: dict = field(default_factory=dict)
    released: dict = field(default_factory=dict)    # keys that the published config.json spells otherwise
    old_rope_type: str = ""                         # the scaling's name in the older dialect, where it was another
    wrapper: str = ""                               # the multimodal model_type that holds this text model


FAMILIES = {
    # Llama and what is built like it
    "llama-2": Family("llama", dict(num_key_value_heads=4, rope_parameters=rope(10000))),
    "llama-2-70b": Family("llama", dict(rope_parameters=rope(10000))),
    "llama-2-early": Family("llama", dict(num_key_value_heads=4, rope_parameters=rope(10000)),
                            dict(num_key_value_heads=None, head_dim=None, rope_scaling=None)),
    "codellama": Family("llama", dict(vocab_size=171, num_key_value_heads=4, rope_parameters=rope(1e6))),
    "tinyllama": Family("llama", dict(num_key_value_heads=1, rope_parameters=rope(10000))),
    "yi": Family("llama", dict(rope_parameters=rope(5e6))),
    "open-llama": Family("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-6, rope_parameters=rope(10000))),
    "deepseek-coder": Family("llama", dict(rope_parameters=rope(1e5, "linear", factor=4.0))),
    "llama-3": Family("llama", dict(rope_parameters=rope(5e5))),
    "llama-3.1": Family("llama", dict(rope_parameters=llama3(5e5, 8.0))),
    "llama-3.2": Family("llama", dict(head_dim=32, tie_word_embeddings=True, rope_parameters=llama3(5e5, 32.0))),
    "llama-3.3": Family("llama", dict(num_attention_heads=8, rope_parameters=llama3(5e5, 8.0))),
    "r1-distill-llama": Family("llama", dict(rope_parameters=llama3(5e5, 8.0))),
    "llama-biases": Family("llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=rope(10000))),
    "llama-gelu": Family("llama", dict(hidden_act="gelu", rope_parameters=rope(10000))),
    "llama-dynamic": Family("llama", dict(rope_parameters=rope(10000, "dynamic", factor=2.0))),
    "llama-dynamic-beyond": Family("llama", dict(max_position_embeddings=16,
                                                 rope_parameters=rope(10000, "dynamic", factor=2.0))),
    "smollm-2": Family("llama", dict(tie_word_embeddings=True, rope_parameters=rope(1e5))),
    "internlm-3": Family("internlm3", dict(head_dim=32, attention_bias=True, mlp_bias=True,
                                           rope_parameters=rope(5e7, "dynamic", factor=6.0))),
    # Mistral
    "mistral-7b-v0.1": Family("mistral", dict(sliding_window=WINDOW, rope_parameters=rope(10000))),
    "mistral-7b-v0.2": Family("mistral", dict(sliding_window=None, rope_parameters=rope(1e6))),
    "mistral-7b-v0.3": Family("mistral", dict(vocab_size=168, sliding_window=None, rope_parameters=rope(1e6))),
    "mistral-nemo": Family("mistral", dict(head_dim=32, sliding_window=None, rope_parameters=rope(1e6))),
    "mistral-small": Family("mistral", dict(head_dim=24, sliding_window=None, rope_parameters=rope(1e8))),
    "mistral-small-3.1": Family("mistral", dict(head_dim=32, sliding_window=None, rope_parameters=rope(1e9)),
                                wrapper="mistral3"),
    "ministral-8b": Family("ministral", dict(head_dim=32, sliding_window=WINDOW, rope_parameters=rope(1e8),
                                             layer_types=[FULL] + 3 * [SLIDING])),
    "ministral-one-window": Family("ministral", dict(head_dim=16, sliding_window=WINDOW, rope_parameters=rope(1e8))),
    # Qwen
    "qwen2": Family("qwen2", dict(rope_parameters=rope(1e6))),
    "qwen2.5-small": Family("qwen2", dict(tie_word_embeddings=True, rope_parameters=rope(1e6)),
                            dict(use_sliding_window=False, sliding_window=WINDOW, max_window_layers=2)),
    "qwen2.5-yarn": Family("qwen2", dict(rope_parameters=rope(1e6, "yarn", factor=4.0,
                                                              original_max_position_embeddings=64))),
    "qwen2-window": Family("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2,
                                         rope_parameters=rope(1e6))),
    "r1-distill-qwen": Family("qwen2", dict(rope_parameters=rope(10000))),
    "qwen3": Family("qwen3", dict(head_dim=32, rope_parameters=rope(1e6))),
    "qwen3-small": Family("qwen3", dict(head_dim=24, tie_word_embeddings=True, rope_parameters=rope(1e6))),
    "qwen3-yarn-mscale": Family("qwen3", dict(head_dim=32, attention_bias=True, rope_parameters=rope(
        1e6, "yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0))),
    "qwen3-yarn-attention-factor": Family("qwen3", dict(head_dim=32, rope_parameters=rope(
        1e6, "yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.2, truncate=False,
        beta_fast=4.0, beta_slow=0.5))),
    # Gemma
    "gemma-1": Family("gemma", dict(head_dim=32, num_key_value_heads=1, rope_parameters=rope(10000)),
                      dict(hidden_act="gelu")),
    "gemma-1.1": Family("gemma", dict(head_dim=32, rope_parameters=rope(10000)),
                        dict(hidden_act="gelu_pytorch_tanh", hidden_activation=None)),
    "gemma-2": Family("gemma2", dict(head_dim=32, query_pre_attn_scalar=24, sliding_window=WINDOW,
                                     attn_logit_softcapping=5.0, final_logit_softcapping=2.0,
                                     rope_parameters=rope(10000))),
    "gemma-3": Family("gemma3_text", dict(head_dim=32, query_pre_attn_scalar=24, sliding_window=WINDOW,
                                          num_hidden_layers=7, rope_parameters={
                                              FULL: rope(1e6, "linear", factor=8.0), SLIDING: rope(10000)})),
    "gemma-3-pattern": Family("gemma3_text", dict(head_dim=32, sliding_window=WINDOW, sliding_window_pattern=2,
                                                  rope_parameters={FULL: rope(1e6), SLIDING: rope(3e4)}),
                              dict(sliding_window_pattern=2)),
    "gemma-3-multimodal": Family("gemma3_text", dict(head_dim=256, num_attention_heads=8, num_key_value_heads=4,
                                                     sliding_window=WINDOW, num_hidden_layers=7, rms_norm_eps=1e-6,
                                                     rope_parameters={
                                                         FULL: rope(1e6, "linear", factor=8.0), SLIDING: rope(10000)}),
                                 wrapper="gemma3"),
    # Phi
    "phi-3-mini-4k": Family("phi3", dict(num_key_value_heads=4, sliding_window=WINDOW, rope_parameters=rope(10000))),
    "phi-3-mini-128k": Family("phi3", dict(num_key_value_heads=4, original_max_position_embeddings=64,
                                           rope_parameters=longrope(8, 64)), old_rope_type="su"),
    "phi-3.5-mini-beyond": Family("phi3", dict(num_key_value_heads=4, original_max_position_embeddings=16,
                                               rope_parameters=longrope(8, 16))),
    "phi-3-yarn-alias": Family("phi3", dict(original_max_position_embeddings=16, rope_parameters=longrope(8, 16)),
                               old_rope_type="yarn"),
    "phi-4": Family("phi3", dict(sliding_window=None, rope_parameters=rope(250000))),
    "phi-4-mini": Family("phi3", dict(tie_word_embeddings=True, sliding_window=4096,
                                      original_max_position_embeddings=64,
                                      rope_parameters=longrope(6, 64, partial_rotary_factor=0.75))),
    "phi-4-mini-beyond": Family("phi3", dict(tie_word_embeddings=True, original_max_position_embeddings=16,
                                             rope_parameters=longrope(6, 16, partial_rotary_factor=0.75))),
    # SmolLM3, OLMo, Granite and others
    "smollm-3": Family("smollm3", dict(rope_parameters=rope(5e6))),
    "smollm-3-explicit": Family("smollm3", dict(no_rope_layers=[0, 1, 1, 0], rope_parameters=rope(2e6))),
    "olmo-2": Family("olmo2", dict(rope_parameters=rope(5e5))),
    "olmo-3": Family("olmo3", dict(sliding_window=WINDOW, rope_parameters={
        FULL: rope(5e5, "yarn", factor=8.0, original_max_position_embeddings=32, attention_factor=1.2079,
                   beta_fast=32.0, beta_slow=1.0), SLIDING: rope(5e5)})),
    "olmo-3-explicit": Family("olmo3", dict(sliding_window=WINDOW, layer_types=[FULL, SLIDING, SLIDING, FULL],
                                            rope_parameters={FULL: rope(5e5), SLIDING: rope(5e5)})),
    "granite-3": Family("granite", dict(embedding_multiplier=6.0, residual_multiplier=0.7, logits_scaling=3.0,
                                        attention_multiplier=0.4, tie_word_embeddings=True,
                                        rope_parameters=rope(1e7))),
    "granite-3-biases": Family("granite", dict(embedding_multiplier=2.0, residual_multiplier=0.22, logits_scaling=0.5,
                                               attention_multiplier=0.1, attention_bias=True, mlp_bias=True,
                                               rope_parameters=rope(10000))),
    "seed-oss": Family("seed_oss", dict(head_dim=32, rope_parameters=rope(1e7))),
    "seed-oss-biases": Family("seed_oss", dict(head_dim=32, attention_out_bias=True, mlp_bias=True,
                                               rope_parameters=rope(1e7))),
    "exaone-4": Family("exaone4", dict(sliding_window=WINDOW, rope_parameters=llama3(1e6, 16.0))),
    "exaone-4-small": Family("exaone4", dict(sliding_window=None, tie_word_embeddings=True, rope_parameters=rope(1e6),
                                             layer_types=4 * [FULL])),
    # Mixtures of experts
    "mixtral-8x7b": Family("mixtral", dict(num_local_experts=5, rope_parameters=rope(1e6))),
    "mixtral-window": Family("mixtral", dict(num_local_experts=4, num_experts_per_tok=3, sliding_window=WINDOW,
                                             rope_parameters=rope(1e6))),
    "qwen1.5-moe": Family("qwen2_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40,
                                            shared_expert_intermediate_size=56, rope_parameters=rope(1e6))),
    "qwen2-moe-some-dense": Family("qwen2_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40,
                                                     shared_expert_intermediate_size=56, decoder_sparse_step=2,
                                                     mlp_only_layers=[3], use_sliding_window=True, max_window_layers=3,
                                                     sliding_window=WINDOW, rope_parameters=rope(1e6))),
    "qwen3-30b-a3b": Family("qwen3_moe", dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=32,
                                              norm_topk_prob=True, rope_parameters=rope(1e6))),
    "qwen3-moe-plain": Family("qwen3_moe", dict(num_experts=4, num_experts_per_tok=4, moe_intermediate_size=24,
                                                mlp_only_layers=[0], head_dim=32, rope_parameters=rope(1e6))),
    "olmoe": Family("olmoe", dict(num_experts=8, num_experts_per_tok=4, rope_parameters=rope(10000))),
    "granite-moe": Family("granitemoe", dict(num_local_experts=6, embedding_multiplier=6.0, residual_multiplier=0.7,
                                             logits_scaling=3.0, attention_multiplier=0.4, tie_word_embeddings=True,
                                             rope_parameters=rope(1e7))),
    "granite-moe-shared": Family("granitemoeshared", dict(
        num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40, embedding_multiplier=2.0,
        residual_multiplier=0.22, logits_scaling=0.5, attention_multiplier=0.1, rope_parameters=rope(10000))),
    "gpt-oss": Family("gpt_oss", dict(
        num_local_experts=6, num_experts_per_tok=3, head_dim=32, sliding_window=WINDOW,
        rope_parameters=rope(1.5e5, "yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                             original_max_position_embeddings=16))),
}
DIALECTS = ("new", "old", "sparse")


# ---- models ----------------------------------------------------------------------------------------------------

def build(family: Family, seed: str = ""):
    """The family's model with random weights, in float32, attention written out (the fused one has no soft cap)."""
    config = {**SMALL, **family.config}
    if family.wrapper:
        text = AutoConfig.for_model(family.model_type, **json.loads(json.dumps(config)))
        config = AutoConfig.for_model(family.wrapper, text_config=text.to_dict(), vision_config=VISION[family.wrapper],
                                      tie_word_embeddings=text.tie_word_embeddings, **WRAPPER[family.wrapper])
        make = AutoModelForImageTextToText
    else:
        config = AutoConfig.for_model(family.model_type, **json.loads(json.dumps(config)))
        make = AutoModelForCausalLM
    model = make.from_config(config, attn_implementation="eager").float().eval()
    randomise(model, seed or family.model_type)
    return model


VISION = {
    "gemma3": dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                   num_attention_heads=2, image_size=16, patch_size=4),
    "mistral3": dict(model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, head_dim=8, image_size=16, patch_size=4),
}
WRAPPER = {
    "gemma3": dict(mm_tokens_per_image=4, boi_token_index=VOCAB - 3, eoi_token_index=VOCAB - 2,
                   image_token_index=VOCAB - 1),
    "mistral3": dict(image_token_index=VOCAB - 1),
}


def randomise(model, seed: str):
    """Norms around one (Gemma's, which store w - 1, around zero), biases around zero, matrices small."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    centred = "gemma" in model.config.model_type
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.3 if p.dim() == 1 else 0.08, generator=generator)
            if p.dim() == 1 and name.endswith("norm.weight") and not centred:
                p += 1.0
    model.tie_weights()


def prompt(batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Token ids [B, T], never the padding token and never a wrapper's image tokens."""
    return torch.randint(3, VOCAB - 3, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- folders ---------------------------------------------------------------------------------------------------

def write(family: Family | str, folder: Path, dialect: str = "new", *, shards: int = 1, binary: bool = False,
          dtype: torch.dtype = torch.float32, edit=None) -> Path:
    """Save the family's model as a Hugging Face folder.

    dialect: new, as transformers 5 writes it (rope_parameters); old, as version 4 and nearly all of the Hub
    (rope_theta and rope_scaling); sparse, old without any key that the config class would restore by itself.
    edit: a function from the finished config to the config that is written.
    """
    name = family if isinstance(family, str) else ""
    family = FAMILIES[family] if isinstance(family, str) else family
    folder = Path(folder)
    model = build(family, name).to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else int(size / (shards - 0.5)))
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] if family.wrapper else config
    if dialect != "new":
        to_old_dialect(text)
        config["torch_dtype"] = config.pop("dtype")
    elif family.wrapper:
        rename_tensors(folder, new_wrapper_name)
    if dialect == "sparse":
        kept = sparse(text)
        text.clear()
        text.update(kept)
    if dialect != "new" and family.old_rope_type:
        text["rope_scaling"]["type"] = family.old_rope_type
    text.update({k: v for k, v in family.released.items() if dialect != "new" or k in text})
    (folder / "config.json").write_text(json.dumps(edit(config) if edit else config, indent=1))
    if binary:
        to_binary(folder)
    return folder


def to_old_dialect(config: dict):
    ropes = config.pop("rope_parameters")
    if FULL in ropes:                               # by layer type: what scaling there was belonged to the full layers
        if config["model_type"] == "gemma3_text":
            config["rope_local_base_freq"] = ropes[SLIDING]["rope_theta"]
        ropes = ropes[FULL]
    ropes = dict(ropes)
    config["rope_theta"] = ropes.pop("rope_theta")
    if "partial_rotary_factor" in ropes:
        config["partial_rotary_factor"] = ropes.pop("partial_rotary_factor")
    kind = ropes.pop("rope_type")
    if kind in ("linear", "dynamic", "longrope") and config["model_type"] in ("llama", "internlm3", "phi3"):
        ropes["type"] = kind                                        # these are older than the name rope_type
    else:
        ropes["rope_type"] = kind
    if "original_max_position_embeddings" in config:                # Phi keeps it outside
        ropes.pop("original_max_position_embeddings", None)
    config["rope_scaling"] = None if kind == "default" else ropes
    config.pop("_sliding_window_pattern", None)


def sparse(config: dict) -> dict:
    """Drop what transformers would fill in: the same config results, and a reader must know the class's defaults."""
    def full(c):
        return AutoConfig.for_model(**json.loads(json.dumps(c))).to_dict()
    wanted = full(config)
    for key in sorted(config):
        without = {k: v for k, v in config.items() if k != key}
        if key != "model_type":
            with contextlib.suppress(Exception):                    # the class cannot do without this key
                if full(without) == wanted:
                    config = without
    return config


def new_wrapper_name(name: str) -> str:
    """Multimodal files have the names of version 4 (`language_model.model.`) or of 5 (`model.language_model.`)."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def rename_tensors(folder: Path, rename):
    """Rewrite a folder's single file with other names."""
    renamed = {rename(k): v for k, v in tensors(folder).items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def to_binary(folder: Path):
    """Replace safetensors files by pickled ones of the same shards, as folders before 2023 have them."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        torch.save(load_file(file), folder / binary_name(file.name))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {k: binary_name(v) for k, v in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


def binary_name(name: str) -> str:
    return "pytorch_" + name.replace(".safetensors", ".bin")


# ---- the reference ---------------------------------------------------------------------------------------------

def reference(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """transformers' logits [B, T, V] of a folder, in float32."""
    config = AutoConfig.from_pretrained(folder)
    make = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    model = make.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()
    with torch.no_grad():
        return model(tokens).logits.float()
