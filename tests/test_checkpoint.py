"""checkpoint.py: every format gives the same model, every tensor of the real big models has its place, bad input gives
one sentence, and loading takes no second copy. Families against transformers: see test_families.py."""
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
from checkpoint import (CheckpointError, args_from, end_ids, load_checkpoint, plan, read_args, read_generation_config,
                        resolve, save_checkpoint, stored_dtype, weight_bytes)
from model import Transformer

D, F, V, L, H, K, E = 64, 96, 50, 3, 4, 2, 16
CONFIG = dict(model_type="llama", hidden_size=D, intermediate_size=F, vocab_size=V, num_hidden_layers=L,
              num_attention_heads=H, num_key_value_heads=K, rms_norm_eps=1e-5, max_position_embeddings=128,
              rope_theta=10000.0, tie_word_embeddings=False, eos_token_id=2)
TOKENS = torch.tensor([[1, 5, 9, 33, 2, 7], [3, 3, 4, 40, 41, 42]])


# ---- one tiny Llama, in every format ---------------------------------------------------------------------------

def llama_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    def t(*shape):
        return (torch.randn(shape, generator=g) * 0.08 + (len(shape) == 1)).to(dtype)
    tensors = {"model.embed_tokens.weight": t(V, D), "model.norm.weight": t(D), "lm_head.weight": t(V, D)}
    for i in range(L):
        layer = {"self_attn.q_proj": t(H * E, D), "self_attn.k_proj": t(K * E, D), "self_attn.v_proj": t(K * E, D),
                 "self_attn.o_proj": t(D, H * E), "mlp.gate_proj": t(F, D), "mlp.up_proj": t(F, D),
                 "mlp.down_proj": t(D, F), "input_layernorm": t(D), "post_attention_layernorm": t(D)}
        tensors |= {f"model.layers.{i}.{n}.weight": w for n, w in layer.items()}
    return tensors


def write_hf(folder: Path, tensors: dict[str, Tensor] | None = None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors or llama_tensors(), folder / "model.safetensors")
    return folder


def interleaved(w: Tensor) -> Tensor:
    """Rows of one of our heads, (j, j + E/2) apart, to the order (2j, 2j+1)."""
    return w.view(-1, 2, E // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def native_tensors() -> dict[str, Tensor]:
    """Meta's names, rope interleaved."""
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "tok_embeddings", "lm_head": "output"}
    tensors = {}
    for name, w in llama_tensors().items():
        w = interleaved(w) if "q_proj" in name or "k_proj" in name else w
        for theirs, meta in names.items():
            name = name.replace(theirs, meta)
        tensors[name.removeprefix("model.")] = w
    return tensors


PARAMS = dict(dim=D, n_layers=L, n_heads=H, n_kv_heads=K, norm_eps=1e-5, vocab_size=-1, multiple_of=32)


def write_sharded(folder: Path) -> Path:
    tensors = llama_tensors()
    write_hf(folder).joinpath("model.safetensors").unlink()
    where = {n: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, n in enumerate(tensors)}
    for shard in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_sharded_without_index(folder: Path) -> Path:
    write_sharded(folder).joinpath("model.safetensors.index.json").unlink()
    return folder


def write_bin(folder: Path, **save) -> Path:
    write_hf(folder).joinpath("model.safetensors").unlink()
    torch.save(llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(E // 2)},
               folder / "pytorch_model.bin", **save)
    return folder


def write_old_bin(folder: Path) -> Path:
    return write_bin(folder, _use_new_zipfile_serialization=False)


def write_sharded_bin(folder: Path) -> Path:
    write_sharded(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()):
        torch.save(load_file(folder / file), folder / f"pytorch_{file}".replace(".safetensors", ".bin"))
        (folder / file).unlink()
    (folder / "model.safetensors.index.json").unlink()
    index = {n: f"pytorch_{f}".replace(".safetensors", ".bin") for n, f in index.items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def write_meta(folder: Path, shards: int = 1, table_dim: int = 1) -> Path:
    """Tensor-parallel slices as Llama 2 (embedding cut by columns, dim 1) or Llama 3 (by rows) has them."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    for i in range(shards):
        def cut(name, w):
            if w.dim() == 1:
                return w
            dim = table_dim if "tok_emb" in name else int(name.endswith(("wo.weight", "w2.weight")))
            return w.chunk(shards, dim)[i].clone()
        state = {n: cut(n, w) for n, w in native_tensors().items()} | {"rope.freqs": torch.ones(E // 2)}
        torch.save(state, folder / f"consolidated.{i:02}.pth")
    return folder


def write_meta_two(folder: Path) -> Path:
    return write_meta(folder, 2)


def write_meta_two_by_rows(folder: Path) -> Path:
    return write_meta(folder, 2, table_dim=0)


def write_mistral_native(folder: Path) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | dict(head_dim=E, hidden_dim=F, vocab_size=V)))
    save_file(native_tensors(), folder / "consolidated.safetensors")
    return folder


def write_gpt_fast(folder: Path, fused: bool = True) -> Path:
    """model.pth beside the Hugging Face config it was made from."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    state = native_tensors()
    for i in range(L if fused else 0):
        qkv = [state.pop(f"layers.{i}.attention.w{x}.weight") for x in "qkv"]
        state[f"layers.{i}.attention.wqkv.weight"] = torch.cat(qkv)
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def write_gpt_fast_split(folder: Path) -> Path:
    return write_gpt_fast(folder, fused=False)


def write_tinyllamas(folder: Path) -> Path:
    folder.mkdir()
    state = {f"_orig_mod.{n}": w for n, w in native_tensors().items()} | {"freqs_cos": torch.ones(4, E // 2)}
    args = dict(dim=D, n_layers=L, n_heads=H, n_kv_heads=K, vocab_size=V, multiple_of=32, max_seq_len=128, dropout=0.0)
    torch.save({"model": state, "model_args": args, "iter_num": 7, "config": {"lr": 1e-3}}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def llama2c_order(version: int) -> list[str]:
    matrices = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    mlp = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    if version == 0:
        kinds = ["tok_embeddings", "*attention_norm", *(f"*{m}" for m in matrices), "*ffn_norm",
                 *(f"*{m}" for m in mlp), "norm", "freqs", "output"]
    else:
        kinds = ["*attention_norm", "*ffn_norm", "norm", "tok_embeddings", *(f"*{m}" for m in matrices + mlp), "output"]
    return [f"{k[1:]}.{i}" if k[0] == "*" else k for k in kinds for i in (range(L) if k[0] == "*" else [0])]


def write_llama2c(folder: Path, version: int = 0) -> Path:
    folder.mkdir()
    ints = struct.pack("7i", D, F, L, H, K, -V if version == 0 else V, 128)
    head = ints if version == 0 else struct.pack("<Ii", 0x616b3432, version) + ints + struct.pack("<Bi", 0, 16)
    data, state = [head if version == 0 else head[:37 + 4 * (version == 2)].ljust(256, b"\0")], native_tensors()
    for kind in llama2c_order(version):
        if kind == "freqs":
            data.append(bytes(128 * E * 4))
            continue
        name, _, layer = kind.rpartition(".")
        w = state[f"layers.{layer}.{name}.weight" if layer.isdigit() else f"{kind}.weight"]
        data.append(q8(w) if version == 2 and w.dim() == 2 else w.numpy().tobytes())
    (folder / "model.bin").write_bytes(b"".join(data))
    return folder / "model.bin"


def q8(w: Tensor) -> bytes:
    scales = w.view(-1, 16).abs().amax(1) / 127
    return (w.view(-1, 16) / scales[:, None]).round().to(torch.int8).numpy().tobytes() + scales.numpy().tobytes()


def write_llama2c_v1(folder: Path) -> Path:
    return write_llama2c(folder, 1)


def write_own_safetensors(folder: Path) -> Path:
    save_checkpoint(load_checkpoint(write_hf(folder)), folder / "elsewhere" / "own.safetensors")
    return folder / "elsewhere" / "own.safetensors"


def write_own_pth(folder: Path) -> Path:
    save_checkpoint(load_checkpoint(write_hf(folder)), folder / "own.pth")
    return folder / "own.pth"


FORMATS = [write_sharded, write_sharded_without_index, write_bin, write_old_bin, write_sharded_bin, write_meta,
           write_meta_two, write_meta_two_by_rows, write_mistral_native, write_gpt_fast, write_gpt_fast_split,
           write_tinyllamas, write_llama2c, write_llama2c_v1, write_own_safetensors, write_own_pth]


@pytest.mark.parametrize("write", FORMATS, ids=lambda f: f.__name__[6:])
def test_every_format_gives_the_same_logits(write, tmp_path):
    """A forgotten permutation, a wrong cut or a wrong order of kinds gives fluent-looking garbage, not an error."""
    wanted = load_checkpoint(write_hf(tmp_path / "reference"))(TOKENS)
    path = write(tmp_path / "other")
    model = load_checkpoint(path)
    assert torch.equal(model(TOKENS), wanted)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert stored_dtype(path) == torch.float32
    assert read_args(path)[0] == model.args


def test_folder_of_one_file(tmp_path):
    """A folder with only our file, or only gpt-fast's, or only run.c's, is that file."""
    for i, write in enumerate((write_gpt_fast, write_tinyllamas, write_llama2c)):
        path = write(tmp_path / str(i))
        assert torch.equal(load_checkpoint(path.parent)(TOKENS), load_checkpoint(path)(TOKENS))


def test_q8_0_is_dequantized(tmp_path):
    """Scales stand after all values of a matrix, one for each run of 16."""
    model = load_checkpoint(write_llama2c(tmp_path / "v2", 2))
    exact = load_checkpoint(write_llama2c(tmp_path / "v0", 0))
    for (name, a), b in zip(model.named_parameters(), exact.parameters()):
        assert (a - b).abs().max() <= (b.abs().max() / 200 if a.dim() == 2 else 0), name


def test_file_name_means_nothing(tmp_path):
    """gpt-fast chose the architecture by the folder's name."""
    path = write_own_safetensors(tmp_path / "a")
    wanted = load_checkpoint(path)(TOKENS)
    for name in ("Llama-3-70B-int4.g32.pth", "model.bin", "noextension"):
        (tmp_path / name).write_bytes(path.read_bytes())
        assert torch.equal(load_checkpoint(tmp_path / name)(TOKENS), wanted)


def test_original_wins_over_other_weights_in_its_folder(tmp_path):
    folder = write_hf(tmp_path / "m")
    wanted = load_checkpoint(folder)(TOKENS)
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    save_checkpoint(load_checkpoint(folder, dtype=torch.bfloat16), folder / "model_fast.safetensors")
    (folder / "original").mkdir()
    assert torch.equal(load_checkpoint(folder)(TOKENS), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_a_cast(dtype, tmp_path):
    folder = write_hf(tmp_path / "m", llama_tensors(torch.bfloat16))
    model = load_checkpoint(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} and stored_dtype(folder) == torch.bfloat16
    assert torch.equal(model.layers[1].attention.wqkv.weight[:H * E],
                       llama_tensors(torch.bfloat16)["model.layers.1.self_attn.q_proj.weight"].to(dtype))
    assert all(r.frequencies.dtype == torch.float32 and r.frequencies.device.type == "cpu" for r in model.ropes)
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    model = load_checkpoint(write_hf(tmp_path / "m"), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (weight_bytes(model), weight_bytes(model)) and seen == sorted(seen)


def test_a_block_is_ready_before_the_next_is_read(tmp_path):
    """Memory that grows by all blocks before the first is laid out anew."""
    seen = []

    def ready(model, part):
        filled = [name for name, t in model.state_dict().items() if t.device.type != "meta"]
        which = "model" if part is model else next(i for i, block in enumerate(model.layers) if block is part)
        seen.append((which, sorted({name.split(".")[1] for name in filled if name.startswith("layers.")}),
                     "norm.weight" in filled))
    model = load_checkpoint(write_hf(tmp_path / "m"), ready=ready)
    blocks = [str(i) for i in range(len(model.layers))]
    assert seen == [(i, blocks[:i + 1], True) for i in range(len(blocks))] + [("model", blocks, True)]


# ---- tied heads ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dropped", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_pair_under_either_name(dropped, tmp_path):
    tensors = llama_tensors()
    table = tensors.pop(dropped)
    kept = next(tensors[n] for n in ("lm_head.weight", "model.embed_tokens.weight") if n in tensors)
    model = load_checkpoint(write_hf(tmp_path / "m", tensors, tie_word_embeddings=True))
    assert model.args.tied and model.output is None and torch.equal(model.tok_embeddings.weight, kept)
    assert not torch.equal(kept, table)


def test_stored_head_wins(tmp_path):
    """Some files say tied and store a head of their own."""
    model = load_checkpoint(write_hf(tmp_path / "m", tie_word_embeddings=True))
    assert not model.args.tied and torch.equal(model.output.weight, llama_tensors()["lm_head.weight"])


def test_pickled_tied_pair_is_loaded_once(tmp_path):
    """A .bin holds both names for one storage."""
    folder = write_hf(tmp_path / "m", tie_word_embeddings=True)
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_checkpoint(folder).args.tied


def test_files_are_written_without_numpy(tmp_path):
    """It is no dependency, and a fresh environment does not have it."""
    code = "import sys; sys.modules['numpy'] = None; import torch; from checkpoint import write_safetensors; from pathlib import Path; " \
           "write_safetensors({'a': torch.arange(6).bfloat16().view(2, 3).t(), 'b': torch.empty(0), 'c': torch.tensor([7], dtype=torch.int8)}," \
           " None, Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "x.safetensors")], cwd=Path(checkpoint.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "x.safetensors")
    assert found["a"].tolist() == [[0, 3], [1, 4], [2, 5]] and found["b"].numel() == 0 and found["c"].tolist() == [7]


def test_own_file_stores_a_tied_pair_once(tmp_path):
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    model = load_checkpoint(write_hf(tmp_path / "m", tensors, tie_word_embeddings=True))
    for suffix in ("safetensors", "pth"):
        save_checkpoint(model, tmp_path / f"own.{suffix}")
        assert torch.equal(load_checkpoint(tmp_path / f"own.{suffix}")(TOKENS), model(TOKENS))
    assert "output.weight" not in load_file(tmp_path / "own.safetensors")


# ---- our own files ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_own_file_describes_itself(suffix, tmp_path):
    folder = write_hf(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6}')
    model, path = load_checkpoint(folder), tmp_path / "alone" / f"x.{suffix}"
    save_checkpoint(model, path, {"generation_config": read_generation_config(folder),
                                  "source_config": read_args(folder)[1]})
    assert end_ids(folder) == end_ids(path) == {2, 7, 8}
    assert read_generation_config(path)["temperature"] == 0.6
    assert read_args(path) == (model.args, CONFIG)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_own_safetensors_is_read_by_the_library(tmp_path):
    """Header and bytes are written by hand: mixed dtypes must stay aligned and in order."""
    model = load_checkpoint(write_hf(tmp_path / "m"), dtype=torch.bfloat16)
    model.norm.weight.data = model.norm.weight.float()
    save_checkpoint(model, tmp_path / "x.safetensors")
    stored = load_file(tmp_path / "x.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[n], t) and stored[n].dtype == t.dtype for n, t in model.state_dict().items())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_interrupted_save_leaves_the_old_file(suffix, tmp_path, monkeypatch):
    model, path = load_checkpoint(write_hf(tmp_path / "m")), tmp_path / f"x.{suffix}"
    save_checkpoint(model, path)
    before = path.read_bytes()
    def fail(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, path)
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["m", path.name]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_newer_format_version_is_refused(suffix, tmp_path):
    save_checkpoint(load_checkpoint(write_hf(tmp_path / "m")), tmp_path / f"x.{suffix}", {"version": 2})
    with pytest.raises(CheckpointError, match="format version 2; this program reads version 1"):
        load_checkpoint(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("ids, wanted", [(5, {5}), ([5, 6], {5, 6}), (None, set())])
def test_end_ids(ids, wanted, tmp_path):
    folder = write_hf(tmp_path / "m", eos_token_id=ids)
    assert end_ids(folder) == wanted
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert end_ids(folder) == wanted | {9}


# ---- bad input: one sentence -----------------------------------------------------------------------------------

def damage(change):
    """A folder with the tiny Llama, spoiled by `change(folder, tensors)`."""
    def make(tmp_path: Path) -> Path:
        folder = write_hf(tmp_path / "m")
        tensors = llama_tensors()
        path = change(folder, tensors)
        if path == "tensors":
            save_file(tensors, folder / "model.safetensors")
        return path if isinstance(path, Path) else folder
    return make


def config(**changes):
    def change(folder, tensors):
        kept = {k: v for k, v in (CONFIG | changes).items() if v != "absent"}
        (folder / "config.json").write_text(json.dumps(kept))
    return change


def no_config(folder, tensors):
    (folder / "config.json").unlink()


def no_weights(folder, tensors):
    (folder / "model.safetensors").unlink()


def empty_folder(folder, tensors):
    no_config(folder, tensors)
    no_weights(folder, tensors)


def lora(folder, tensors):
    empty_folder(folder, tensors)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def truncated(folder, tensors):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def half_header(folder, tensors):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def broken_header(folder, tensors):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":', b'"shape"?', 1))


def truncated_zip(folder, tensors):
    no_weights(folder, tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:5000])


def truncated_own_pth(folder, tensors):
    save_checkpoint(load_checkpoint(folder), folder.parent / "x.pth")
    (folder.parent / "x.pth").write_bytes((folder.parent / "x.pth").read_bytes()[:5000])
    return folder.parent / "x.pth"


def missing_shard(folder, tensors):
    no_weights(folder, tensors)
    write_sharded(folder).joinpath("model-00002-of-00003.safetensors").unlink()


def missing_shard_and_index(folder, tensors):
    missing_shard(folder, tensors)
    (folder / "model.safetensors.index.json").unlink()


def missing_meta_shard(folder, tensors):
    empty_folder(folder, tensors)
    folder.rmdir()
    write_meta(folder, 2).joinpath("consolidated.01.pth").unlink()


def missing_tensor(folder, tensors):
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    return "tensors"


def missing_head(folder, tensors):
    del tensors["lm_head.weight"]
    return "tensors"


def extra_tensor(folder, tensors):
    tensors["model.layers.0.self_attn.gate_proj.weight"] = torch.ones(2)
    return "tensors"


def extra_layer(folder, tensors):
    tensors["model.layers.3.input_layernorm.weight"] = torch.ones(D)
    return "tensors"


def wrong_shape(folder, tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(D, F)
    return "tensors"


def norm_bias(folder, tensors):
    tensors["model.layers.0.input_layernorm.bias"] = torch.ones(D)
    return "tensors"


def mla(folder, tensors):
    config(model_type="deepseek_v3")(folder, tensors)
    tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] = torch.ones(2, 2)
    return "tensors"


def integer_weights(folder, tensors):
    tensors["lm_head.weight"] = torch.ones(V, D, dtype=torch.int8)
    return "tensors"


def not_json(folder, tensors):
    (folder / "config.json").write_text("{'model_type': ")


def bad_index(folder, tensors):
    no_weights(folder, tensors)
    (folder / "model.safetensors.index.json").write_text("{}")


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def evil_pickle(folder, tensors):
    no_weights(folder, tensors)
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")


def pickled_list(folder, tensors):
    torch.save([1, 2], folder / "x.pt")
    return folder / "x.pt"


def random_file(folder, tensors):
    (folder.parent / "noise.bin").write_bytes(bytes(range(256)) * 40)
    return folder.parent / "noise.bin"


def empty_file(folder, tensors):
    (folder.parent / "empty.safetensors").write_bytes(b"")
    return folder.parent / "empty.safetensors"


def gguf(folder, tensors):
    (folder.parent / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    return folder.parent / "model.gguf"


def params_without_heads(folder, tensors):
    path = write_meta(folder.parent / "meta")
    (path / "params.json").write_text(json.dumps({k: v for k, v in PARAMS.items() if k != "n_heads"}))
    return path


def params_with_experts(folder, tensors):
    path = write_meta(folder.parent / "meta")
    (path / "params.json").write_text(json.dumps(PARAMS | {"moe": {"num_experts": 8}}))
    return path


def pth_without_config(folder, tensors):
    path = write_gpt_fast(folder.parent / "g")
    (path.parent / "config.json").unlink()
    return path


BAD = {     # what is wrong -> what the sentence says
    no_config: "put its config.json or params.json beside it",
    no_weights: "holds no weights",
    empty_folder: "holds no checkpoint",
    lora: "only a LoRA adapter",
    truncated: "truncated or damaged",
    half_header: "truncated or damaged",
    broken_header: "truncated or damaged",
    truncated_zip: "truncated or damaged",
    truncated_own_pth: "truncated or damaged",
    missing_shard: "lacks model-00002-of-00003.safetensors",
    missing_shard_and_index: "holds 2 of 3 weight files",
    missing_meta_shard: r"has shape \[\d+, \d+\] where \[\d+, \d+\] is needed",
    missing_tensor: "lacks tensor 'model.layers.1.self_attn.v_proj.weight'",
    missing_head: "lacks tensor 'lm_head.weight'",
    extra_tensor: "'model.layers.0.self_attn.gate_proj.weight' .* has no place",
    extra_layer: "'model.layers.3.input_layernorm.weight' .* has no place",
    wrong_shape: r"'model.layers.2.mlp.up_proj.weight' has shape \[64, 96\] where \[96, 64\]",
    norm_bias: "'model.layers.0.input_layernorm.bias' .* has no place",
    mla: "model_type 'deepseek_v3' has multi-head latent attention",
    integer_weights: "'lm_head.weight' is stored as torch.int8",
    not_json: "is not JSON",
    bad_index: "has no 'weight_map'",
    evil_pickle: "is refused",
    pickled_list: "holds a list",
    random_file: "no checkpoint this program knows",
    empty_file: "no checkpoint this program knows",
    gguf: "is a GGUF file",
    pth_without_config: "how many heads",
    params_without_heads: "lacks 'n_heads'",
    params_with_experts: "8 experts, but there is no router",
    config(model_type="absent"): "lacks 'model_type'",
    config(hidden_size="absent"): "lacks 'hidden_size'",
    config(num_attention_heads="absent"): "lacks 'num_attention_heads'",
    config(num_hidden_layers="absent"): "lacks 'num_hidden_layers'",
    config(intermediate_size="absent"): "lacks 'intermediate_size'",
    config(vocab_size="absent"): "lacks 'vocab_size'",
    config(hidden_size="many"): "does not describe a model",
    config(num_key_value_heads=3): "4 attention heads cannot share 3",
    config(vocab_size=51): r"has shape \[50, 64\] where \[51, 64\]",
    config(model_type="helium"): "model_type 'helium' is unknown; its tensors are named like Llama's",
    config(hidden_act="relu2"): "hidden_act 'relu2'",
    config(rope_scaling={"type": "mrope", "mrope_section": [1]}): "rope kind 'mrope'",
    config(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}): "rope kind 'proportional'",
    config(rope_scaling={"type": "linear"}): "lacks 'factor'",
    config(rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}): "in short_factor",
    config(clip_qkv=8.0): "clip_qkv = 8.0",
    config(attention_multiplier=0.5): "attention_multiplier = 0.5",
    config(quantization_config={"quant_method": "gptq", "bits": 4}): "method 'gptq'",
    config(quantization={"group_size": 64, "bits": 4}): "method 'MLX'",
    config(model_type="mixtral", num_local_experts=8): "8 experts, but there is no router",
    config(layer_types=["full_attention", "linear_attention", "full_attention"]): "'linear_attention'",
}


@pytest.mark.parametrize("change, sentence", BAD.items(), ids=[f"{i}-{c.__name__}" for i, c in enumerate(BAD)])
def test_bad_input_is_one_sentence(change, sentence, tmp_path, capfd):
    path = damage(change)(tmp_path)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert "must not run" not in capfd.readouterr().out


def test_unknown_architecture_on_trust(tmp_path):
    folder = write_hf(tmp_path / "m", model_type="newllama")
    wanted = load_checkpoint(write_hf(tmp_path / "l"))(TOKENS)
    assert torch.equal(load_checkpoint(folder, trust_architecture=True)(TOKENS), wanted)


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where/at/all", "a/b/c"])
def test_no_such_path(path):
    with pytest.raises(CheckpointError, match=f"there is no file or folder '{path}'"):
        resolve(path)


def test_too_little_memory_is_said_before_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "weight_bytes", lambda *_: 10**15)
    monkeypatch.setattr(checkpoint, "copy_part", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(CheckpointError, match=r"need 1000000.00 GB and cpu has \d+\.\d\d GB free"):
        load_checkpoint(write_hf(tmp_path / "m"))


# ---- real files ------------------------------------------------------------------------------------------------

def test_stories260K_is_the_same_in_every_form(shared_data, tmp_path):
    """The real weights: run.c's file, the Hugging Face folder, and ours after saving either."""
    folder = shared_data / "weights" / "stories260K"
    reference = json.loads((shared_data / "reference" / "stories260K_reference.json").read_text())
    models = [load_checkpoint(folder / "stories260K.bin"), load_checkpoint(folder / "hf")]
    for i, suffix in enumerate(("safetensors", "pth")):
        save_checkpoint(models[i], tmp_path / f"own.{suffix}")
        models.append(load_checkpoint(tmp_path / f"own.{suffix}"))
    row = max(reference["greedy"], key=lambda r: len(r["prompt_ids"]))
    ids = torch.tensor([row["prompt_ids"] + row["greedy_ids"]])[:, :-1]
    logits = [m(ids) for m in models]
    assert all(torch.equal(other, logits[0]) for other in logits[1:])
    assert logits[0][0, len(row["prompt_ids"]) - 1:].argmax(-1).tolist() == row["greedy_ids"]


CHECKED = {     # parameters, from the models' own pages
    "Llama-2-7b-hf": 6_738_415_616, "Llama-2-7B-fp16": 6_738_415_616, "Llama-2-7b-chat-hf": 6_738_415_616,
    "Llama-2-70b-lzlv": 68_976_648_192, "CodeLlama-7b-hf": 6_738_546_688, "Llama-3-8B-Lexi": 8_030_261_248,
    "Llama-3.1-8B-merge": 8_030_261_248, "Llama-3.2-3B": 3_212_749_824, "Llama-3-70B-Reflection": 70_553_804_800,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552, "Mistral-Small-24B-dolphin3": 23_572_423_680,
    "Phi-3-mini-merge": 3_821_079_552, "Qwen2.5-14B-cogito": 14_765_947_904, "Qwen3-1.7B": 1_720_574_976,
    "Yi-1.5-6B": 6_061_035_520, "deepseek-coder-6.7b-SemCoder": 6_740_512_768, "gemma-2-2b": 2_614_341_888,
    "gemma-2b-it": 2_506_172_416, "gemma-3-4b-text": 3_880_263_168, "open_llama_3b-zh": 3_426_480_000,
}


def on_meta(config: dict, names) -> Transformer:
    """The model of a config and bare tensor names, on the meta device, and its plan checked."""
    args, names = args_from(config, dict.fromkeys(names))
    with torch.device("meta"):
        model = Transformer(args)
    steps = plan(model, names, config["model_type"])
    used = {part.source for parts in steps.values() for part in parts}
    assert used == {n for n in names if not n.endswith("rotary_emb.inv_freq")}
    return model


@pytest.mark.parametrize("name", CHECKED)
def test_real_index_files_fit(name, shared_data):
    """Every tensor of a real big model has a place, every parameter a tensor, and there are as many as known."""
    folder = shared_data / "configs" / name
    config = json.loads((folder / "config.json").read_text())
    for index in folder.glob("*.index.json"):
        model = on_meta(config, json.loads(index.read_text())["weight_map"])
        assert sum(p.numel() for p in model.parameters()) == CHECKED[name]


def llama_names(layers: int) -> list[str]:
    inner = {re.sub(r"\.\d+\.", ".{}.", n) for n in llama_tensors()}
    return [n.format(i) for n in sorted(inner) for i in range(layers if "{}" in n else 1)]


@pytest.mark.parametrize("changes, parameters", [
    (dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
          num_key_value_heads=40, vocab_size=32000), 13_015_864_320),
    (dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
          num_key_value_heads=8, vocab_size=128256), 405_853_388_800),
    (dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
          num_key_value_heads=8, vocab_size=128256), 70_553_706_496),
], ids=["Llama-2-13B", "Llama-3.1-405B", "Llama-3.1-70B"])
def test_big_models_without_an_index_fit(changes, parameters):
    model = on_meta(CONFIG | changes, llama_names(changes["num_hidden_layers"]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_mixtral_8x22b_fits(shared_data):
    """An expert's tensor without a place, or counted twice."""
    folder = shared_data / "configs" / "Mixtral-8x22B-WizardLM-2"
    config = json.loads((folder / "config.json").read_text())
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert sum(p.numel() for p in on_meta(config, names).parameters()) == 140_620_634_112


@pytest.mark.parametrize("name, sentence", [("Llama-3.1-8B-Instruct-bnb", "method 'bitsandbytes'"),
                                            ("Qwen-VL-Chat-Int4", "tensor 'transformer.* has no place"),
                                            ("Qwen3-14B-MLX-4bit", "method 'MLX'"),
                                            ("Qwen2-VL-7B-olmOCR", "tensor 'visual.* has no place")])
def test_real_unsupported_models_are_named(name, sentence, shared_data):
    folder = shared_data / "configs" / name
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with pytest.raises(CheckpointError, match=sentence):
        args_from(json.loads((folder / "config.json").read_text()), dict.fromkeys(names))


# ---- memory ----------------------------------------------------------------------------------------------------

PEAK = """
import re, sys, threading, time
import torch
from checkpoint import load_checkpoint, weight_bytes
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)
start = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_checkpoint(sys.argv[1], dtype=torch.bfloat16)
running = False
thread.join()
print((peak - start) / weight_bytes(model))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("form", ["safetensors", "bin", "own.safetensors", "own.pth"])
def test_loading_takes_no_second_copy(form, tmp_path):
    """float32 on disk, bfloat16 in memory, 150 MB: reading a file whole, or a state dict first, shows at once."""
    wide = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, head_dim=64,
                vocab_size=12000, num_hidden_layers=4)
    args, _ = args_from(CONFIG | wide, dict.fromkeys(llama_names(4)))
    with torch.device("meta"):
        model = Transformer(args)
    if form.startswith("own"):
        path = tmp_path / form
        save_checkpoint(Transformer(args), path)
    else:
        path = tmp_path / "m"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG | wide))
        tensors = {part.source: torch.zeros(part.stop - part.start, *model.get_parameter(name).shape[1:])
                   for name, parts in plan(model, llama_names(4)).items() for part in parts}
        save = (lambda t, f: torch.save(t, f)) if form == "bin" else save_file
        save(tensors, path / ("pytorch_model.bin" if form == "bin" else "model.safetensors"))
    root = Path(checkpoint.__file__).parent
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, cwd=root, check=True)
    assert float(done.stdout) < 1.15, f"{float(done.stdout):.2f} times the weights"
