"""Experts on the host against the same model with its experts at home: bit for bit, since the host is the device here."""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import Family, rope, write
from safetensors.torch import load_file, save_file
from test_experts import random_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "mixtral-moe"))

import experts  # noqa: E402
import offload  # noqa: E402
import quantize  # noqa: E402
import quantize_cli  # noqa: E402
from checkpoint import CheckpointError, load_checkpoint, weight_bytes  # noqa: E402
from eval import perplexity  # noqa: E402
from generate import generate, load_model  # noqa: E402
from kernels import cpu  # noqa: E402
from model import MoEFeedForward  # noqa: E402
from offload import Offloaded, Sizes, Store, Traffic, choose_resident  # noqa: E402

CPU = torch.device("cpu")
SIZES = Sizes(1000, 10, [0, 1], 6)


def offloaded(model, resident=((), ()), few=math.inf):
    traffic = Traffic(torch.zeros(2, 6, dtype=torch.int64))
    store = Store(CPU, traffic, few)
    resident = iter(zip(resident, traffic.counts))

    def finish(block):
        if isinstance(getattr(block, "feed_forward", None), MoEFeedForward):
            block.feed_forward.run = Offloaded(block.feed_forward, store, *next(resident))
    return quantize.pack_model(model, finish), store


FORMS = [("", {}), ("int8", {}), ("int4", {}), ("int4", dict(ffn_bias=True, activation="silu_clamped")),
         ("", dict(ffn_bias=True)), ("", dict(shared_dim=24, shared_gate=True))]


@pytest.mark.parametrize("resident", [((), ()), ((1, 4), (0,)), (range(6), range(6))], ids=["none", "some", "all"])
@pytest.mark.parametrize("mode, more", FORMS, ids=str)
@pytest.mark.parametrize("few", [math.inf, 0], ids=["cpu", "stream"])
def test_offloaded_equals_resident(few, mode, more, resident):
    """Another expert's bytes in the buffer, one overwritten while it is used, a sum in another order."""
    if not cpu.available():
        pytest.skip("there is no C++ compiler: see test_without_kernels")
    model = random_model(torch.bfloat16, mode, **more)
    home = experts.pack_model(copy.deepcopy(model))
    away, store = offloaded(model, resident, few)
    for T in (1, 2, 9, 64):
        tokens = torch.randint(0, 90, (1, T), generator=torch.Generator().manual_seed(T))
        assert torch.equal(away(tokens), home(tokens))
    report = store.traffic.report
    assert report["wanted"] == store.traffic.counts.sum() == 2 * 2 * (1 + 2 + 9 + 64)
    everywhere = report["wanted"] if len(resident[0]) == 6 else 0 if not resident[0] else report["resident"]
    assert report["resident"] == everywhere
    assert report["streamed"] == (0 if few else report["wanted"] - report["resident"])


@pytest.mark.parametrize("mode", ["", "int8", "int4"])
@pytest.mark.parametrize("few", [math.inf, 0], ids=["cpu", "stream"])
def test_without_kernels(few, mode, monkeypatch):
    """Plain layers, whose tensors have other names and forms."""
    monkeypatch.setattr(cpu, "available", lambda *_, **__: False)
    model = random_model(torch.float32, mode)
    exact = copy.deepcopy(model)
    away, _ = offloaded(model, ((1,), (2, 3)), few)
    tokens = torch.randint(0, 90, (2, 9))
    torch.testing.assert_close(away(tokens), exact(tokens), rtol=1e-3, atol=1e-3)


def test_a_prompt_streams_and_its_answer_does_not():
    """A switch of paths in mid-text that leaves the cache wrong."""
    from tp_worker import NoText
    model = random_model(torch.bfloat16)
    model.end_ids, model.generation_config, model.limit = set(), {}, 128
    home = experts.pack_model(copy.deepcopy(model))
    away, store = offloaded(model, ((1,), ()), 4)
    prompts = [list(range(3, 40)), [5, 6]]
    ids = [[row.ids for row in generate(m, NoText(), prompts, max_new_tokens=20, temperature=0)] for m in (home, away)]
    report = store.traffic.report
    assert ids[0] == ids[1] and 0 < report["streamed"] < report["wanted"]


def test_the_hottest_experts_get_the_copies():
    counts = torch.tensor([[5, 0, 9, 1, 0, 0], [0, 0, 8, 7, 0, 6]])
    assert choose_resident(SIZES, 45, counts) == [[2], [2, 3, 5]]
    assert choose_resident(SIZES, 40, None) == [[0, 1], [0, 1]]                      # nothing known: spread over layers
    assert choose_resident(SIZES, 10**6, counts) == [list(range(6))] * 2 and choose_resident(SIZES, 9, None) == [[], []]


# ---- the command -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture with the bundled tokenizer, and its int4 form."""
    path = tmp_path_factory.mktemp("mixture") / "m"
    write(Family("mixtral", dict(vocab_size=2048, num_local_experts=6, intermediate_size=64, rope_parameters=rope(1e4))), path)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "checkpoints/stories" / name, path)
    assert quantize_cli.main(["--checkpoint_path", str(path), "--mode", "int4", "--quiet"]) == 0
    return path


def run(folder, *more, cwd=ROOT, script="mixtral-moe/generate.py", launcher=()):
    command = [sys.executable, *launcher, script, "--checkpoint_path", folder, "--prompt", "Once upon a time there was",
               "--max_new_tokens", 24, "--seed", 1, "--ignore_eos", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=170, cwd=cwd,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"})


def test_from_the_root_and_from_inside(folder):
    plain = run(folder, script="generate.py")
    assert plain.returncode == 0 and plain.stdout.strip(), plain.stderr
    for done in (run(folder), run(folder, "--offload_experts", cwd=ROOT / "mixtral-moe", script="generate.py"),
                 run(folder, "--offload_experts", "--expert_path", "stream", "--vram_gb", "0.004", "--compile")):
        assert done.returncode == 0 and done.stdout == plain.stdout, done.stderr
    assert "streamed past" in done.stderr


def test_on_two_ranks(folder):
    """Each rank holds its share of every expert, on the host."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    plain = run(folder, "--dtype", "float32")
    done = run(folder, "--dtype", "float32", "--offload_experts", launcher=launcher)
    assert done.returncode == 0 and done.stdout == plain.stdout, done.stderr
    assert done.stderr.count("experts on the host: 24") == 1


def test_statistics_and_a_mapped_file(folder, tmp_path):
    """Counts that are lost or doubled; a file that is read as another model's experts."""
    model = folder / "model_int4.g32.safetensors"
    stats, file = tmp_path / "stats.json", tmp_path / "experts"
    first = run(model, "--offload_experts", "--expert_stats", stats, "--expert_file", file, "--json",
                "--dtype", "bfloat16")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    once = sum(map(sum, json.loads(stats.read_text())["counts"]))
    assert once == report["offload"]["wanted"] == 2 * 4 * (report["prompt_tokens"] + 23)
    assert report["offload"]["copies"] == 0 and report["offload"]["experts"] == 24
    wrote = file.stat().st_mtime_ns
    s, _ = offload.plan(model, CPU, torch.bfloat16, None, False)
    again = run(model, "--offload_experts", "--expert_stats", stats, "--expert_file", file, "--json",
                "--dtype", "bfloat16", "--vram_gb", (s.device + 5.5 * s.expert) / 1e9)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["text"] == json.loads(first.stdout)["text"] and file.stat().st_mtime_ns == wrote
    assert 0 < report["offload"]["resident"] < report["offload"]["wanted"] and report["offload"]["copies"] == 5
    assert sum(map(sum, json.loads(stats.read_text())["counts"])) == 2 * once
    other = run(folder, "--offload_experts", "--expert_file", file)
    assert other.returncode == 1 and "holds experts of another model or format" in other.stderr
    assert other.stderr.count("\n") == 1


def test_a_file_holds_experts_of_one_form(monkeypatch, tmp_path):
    """Layers quantized unlike each other: refused before anything is written."""
    layers = [SimpleNamespace(run=SimpleNamespace(records=SimpleNamespace(parts=[("w1", kind, (4, 8), 0)])))
              for kind in (torch.int8, torch.uint8)]
    monkeypatch.setattr(experts, "layers", lambda model: layers)
    with pytest.raises(CheckpointError, match="experts of one form"):
        offload.write_experts(None, SIZES, tmp_path / "experts")
    assert not list(tmp_path.iterdir())


def test_mapped_experts_are_not_read(folder, tmp_path):
    """A file that is mapped, and then copied whole."""
    if not cpu.available():
        pytest.skip("there is no C++ compiler")
    offload.load(str(folder), "cpu", "bfloat16", file=str(tmp_path / "e"))
    model, _, store = offload.load(str(folder), "cpu", "bfloat16", file=str(tmp_path / "e"))
    maps = Path("/proc/self/maps").read_text()
    for layer in experts.layers(model):
        address = layer.run.records.bytes.data_ptr()
        ranges = [line for line in maps.splitlines() if str(tmp_path / "e") in line]
        assert any(int(r.split("-")[0], 16) <= address < int(r.split("-")[1].split()[0], 16) for r in ranges)


def test_a_file_of_the_same_shape_is_told_apart(folder, tmp_path):
    """Fine-tuned weights under the file of those they came from."""
    offload.load(str(folder), "cpu", "bfloat16", file=str(tmp_path / "e"))
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    found = load_file(folder / "model.safetensors")
    name = next(n for n in found if "layers.0." in n and "experts.0.w1" in n)
    save_file(found | {name: found[name] + 0.5}, other / "model.safetensors", metadata={"format": "pt"})
    (other / "model_int4.g32.safetensors").unlink()
    with pytest.raises(ValueError, match="another checkpoint's experts"):
        offload.load(str(other), "cpu", "bfloat16", file=str(tmp_path / "e"))


def test_other_numbers_of_experts(folder):
    """A model that silently runs with fewer experts than it was trained for."""
    done = run(folder, "--experts_per_token", 1, "--json")
    report = json.loads(done.stdout)
    assert report["experts_per_token"] == 1 and done.returncode == 0
    two = json.loads(run(folder, "--experts_per_token", 2, "--json").stdout)
    plain = json.loads(run(folder, "--json").stdout)
    assert two["text"] == plain["text"] != report["text"] and report["bytes_per_token"] < plain["bytes_per_token"]
    assert "warning: 3 experts a token instead of 2" in run(folder, "--experts_per_token", 3).stderr


@pytest.mark.parametrize("flags, code, word", [
    (["--vram_gb", "1"], 2, "--vram_gb belongs to --offload_experts"),
    (["--expert_path", "cpu"], 2, "--expert_path belongs to --offload_experts"),
    (["--offload_experts", "--vram_gb", "-1"], 2, "must be 0 or more"),
    (["--offload_experts", "--vram_gb", "0.0001"], 1, "--vram_gb 0.0001 is less than the 0.00"),
    (["--experts_per_token", "7"], 1, "--experts_per_token 7: the model has 6 experts a layer"),
    (["--experts_per_token", "0"], 2, "0 is not 1 or more"),
    (["--offload_experts", "--expert_stats", "README.md"], 1, "no file of counts"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_bad_input(folder, flags, code, word):
    done = run(folder, *flags)
    assert done.returncode == code and word in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_dense_model_has_nothing_to_offload():
    done = run(ROOT / "checkpoints/stories", "--offload_experts")
    assert done.returncode == 1 and "this model has no experts to offload" in done.stderr
    assert "has no experts" in run(ROOT / "checkpoints/stories", "--experts_per_token", 1).stderr


def test_too_little_host_memory_is_said_with_both_figures(folder, monkeypatch):
    monkeypatch.setattr(offload, "free_memory", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"the experts need 0\.000\d+ GB of host memory and 1e-05 GB are free"):
        offload.load(str(folder), "cpu", "bfloat16")


def test_the_plan_counts_what_is_there(folder):
    """A budget that leaves out the head, the cache or the buffers."""
    s, _ = offload.plan(folder, CPU, torch.bfloat16, None, False)
    model = load_checkpoint(folder, dtype=torch.bfloat16)
    one = weight_bytes(experts.layers(model)[0].experts[0])
    cache = 2 * 4 * 2 * 16 * 256 * 2        # k and v, layers, heads, their width, positions, bytes
    assert s.expert == one and s.host == 24 * one and s.layers == [0, 1, 2, 3]
    assert s.device == weight_bytes(model) - s.host + cache + 2 * one


# ---- trained routing ---------------------------------------------------------------------------------------

TRAINED = ROOT / "tests/data/stories-moe"


def trained_perplexity(model, tokenizer) -> float:
    return perplexity(model, tokenizer, (ROOT / "checkpoints/stories/held_out.txt").read_text()[:6000], length=256)["perplexity"]


def test_trained_experts_bear_quantization(tmp_path):
    """An expert whose weights are mixed up in one of the formats: random weights have no perplexity to lose."""
    exact = trained_perplexity(*load_model(TRAINED, dtype="float32"))
    assert exact < 40                                           # untrained: 2,048
    for mode, most in (("int8", 1.005), ("int4", 1.06)):
        out = tmp_path / mode / "model.safetensors"
        out.parent.mkdir()
        assert quantize_cli.main(["--checkpoint_path", str(TRAINED), "--mode", mode, "--quiet", "--output", str(out)]) == 0
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TRAINED / name, out.parent)
        found = trained_perplexity(*load_model(out, dtype="bfloat16"))
        away = trained_perplexity(*offload.load(str(out), "cpu", "bfloat16", how="stream")[:2])
        assert found < most * exact and away == found


def test_trained_routing_is_worth_counting(tmp_path):
    """Copies of the experts that an earlier text wanted serve more of the next than any as many."""
    stats = tmp_path / "stats.json"
    s, _ = offload.plan(TRAINED, CPU, torch.bfloat16, None, False)
    shares = []
    for vram in (0.0, s.device / 1e9 + 6.5 * s.expert / 1e9):
        model, tokenizer, store = offload.load(str(TRAINED), "cpu", "bfloat16", vram_gb=vram or None, stats=str(stats))
        trained_perplexity(model, tokenizer)
        store.traffic.save(str(stats))
        shares.append(store.traffic.report["resident"] / store.traffic.report["wanted"])
    assert shares[0] == 0 and shares[1] > 1.15 * 6 / (s.each * len(s.layers))


def test_a_trained_number_of_experts_is_the_best():
    model, tokenizer = load_model(TRAINED, dtype="float32")
    found = {}
    for k in (1, 2, 4):
        for layer in experts.layers(model):
            layer.active = k
        found[k] = trained_perplexity(model, tokenizer)
    assert found[2] < found[4] and found[2] < found[1]
