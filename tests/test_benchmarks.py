"""The scripts that measure: they run, on the smallest shapes, and what they print is what they computed."""
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import torch
from families import Family, rope, write

ROOT = Path(__file__).resolve().parents[1]
TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": True}


def run(*command, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=170, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def test_a_peer_is_timed_in_the_same_rounds(shape):
    """A comparison of medians that never met; a peer of another size."""
    found = json.loads(run("scripts/benchmark.py", "--config", shape, "--rounds", 2, "--new_tokens", 4, "--prompt_tokens", 40,
                           "--against", "transformers", "--json").stdout)
    [peer] = found["peers"]
    assert peer["name"] == "transformers" and peer["kind"] == "bfloat16" and peer["version"]
    assert abs(peer["decode_ratio"] - found["decode_tok_s"] / peer["decode_tok_s"]) < 1e-6 * peer["decode_ratio"]
    assert abs(peer["prefill_ratio"] - found["prefill_tok_s"] / peer["prefill_tok_s"]) < 1e-6 * peer["prefill_ratio"]


def test_a_trace_of_the_steps(shape, tmp_path):
    done = run("scripts/benchmark.py", "--config", shape, "--rounds", 1, "--new_tokens", 3, "--prompt_tokens", 8,
               "--profile", tmp_path / "trace.json")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "perfetto" in done.stderr and any("linear" in str(name) for name in names)


def test_peers_have_our_sizes():
    sys.path.append(str(ROOT / "scripts"))
    import peers
    from model import ModelArgs, Transformer
    args = ModelArgs(160, 64, 2, 4, n_kv_heads=2, ffn_dim=96, tied=True)
    theirs = sum(p.numel() for p in peers.Transformers(args, "bfloat16", 64).model.parameters())
    assert theirs == sum(p.numel() for p in Transformer(args).parameters())


@pytest.mark.parametrize("peers, word", [("zebra", "--against knows llama.cpp, transformers; not 'zebra'"),
                                         ("llama.cpp", "scripts/peers.py tells how to install it")])
def test_peers_that_are_not_there(peers, word, shape):
    try:
        import llama_cpp  # noqa: F401
        pytest.skip("llama-cpp-python is installed")
    except ImportError:
        pass
    done = run("scripts/benchmark.py", "--config", shape, "--against", peers, code=1)
    assert word in done.stderr and "Traceback" not in done.stderr


def test_a_mixture_is_timed(tmp_path):
    """Bytes a token that count all experts."""
    path = tmp_path / "moe.json"
    path.write_text(json.dumps(TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1}))
    found = json.loads(run("scripts/benchmark.py", "--config", path, "--rounds", 1, "--new_tokens", 4, "--prompt_tokens", 8,
                           "--json").stdout)
    two = path.with_name("two.json")
    two.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 2}))
    more = json.loads(run("scripts/benchmark.py", "--config", two, "--rounds", 1, "--new_tokens", 4, "--prompt_tokens", 8,
                          "--json").stdout)
    assert more["bytes_per_token"] - found["bytes_per_token"] == 2 * 3 * 64 * 96 * 2         # layers, matrices, sizes, bytes


@pytest.mark.parametrize("command, word", [
    ("benchmark.py --rounds 0", "--rounds"), ("benchmark.py --new_tokens 0", "--new_tokens"), ("benchmark.py --batch_size 0", "--batch_size"),
    ("benchmark.py --prompt_tokens -5", "--prompt_tokens"), ("benchmark.py --filled -1", "--filled"), ("scaling.py --rounds 0", "--rounds"),
    ("scaling.py --longest 100", "--longest"), ("scaling.py --steps 0", "--steps"), ("benchmark_linears.py --rows 0", "--rows")])
def test_numbers_out_of_range(command, word):
    done = run(*f"scripts/{command}".split(), code=2)
    assert f"error: argument {word}: " in done.stderr and "Traceback" not in done.stderr


def test_the_tables_of_a_page(tmp_path, monkeypatch):
    """Rows that a page lacks, and words around them that are lost; a page without marks, measured for nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark
    import tables
    monkeypatch.delitem(sys.modules, "benchmark")       # another folder has one of this name
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    few = ["--rounds", "1", "--new_tokens", "4", "--prompt_tokens", "8"]
    tables.write(page, [], few, rows=[("stories15m", []), ("stories15m", tables.INT8)])
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert f"torch {torch.__version__}" in lines[2] and "commit" in lines[2]
    rows = [line.split("|") for line in lines if line.startswith("| stories15m")]
    assert [row[2].strip() for row in rows] == ["bfloat16", "int8"] and all(len(row) == 10 for row in rows)
    assert all(float(row[5].split()[0].replace(",", "")) > 0 for row in rows)
    for shape_, flags in [*tables.ROWS, *tables.GPU_ROWS]:
        assert (ROOT / f"scripts/shapes/{shape_}.json").exists()
        benchmark.parser().parse_args(flags)
    page.write_text("no marks\n")
    assert "has no lines <!-- speed -->" in run("scripts/benchmark.py", "--tables", page, code=1).stderr


def test_the_seconds_of_a_start(monkeypatch):
    """A cold start that finds a graph, a warm one that finds none, a failure that is told as a time."""
    monkeypatch.setenv("CPU_KERNELS", "0")
    found = json.loads(run("scripts/start.py", "--checkpoint_path", ROOT / "checkpoints/stories-draft", "--json").stdout)
    assert list(found) == ["nothing built", "no graph", "warm"] and all(len(times) == 1 for times in found.values())
    assert found["warm"][0] < min(found["nothing built"][0], found["no graph"][0])
    done = run("scripts/start.py", "--checkpoint_path", "/nowhere", code=1)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


def test_the_scaling_page(tmp_path):
    """A table that lacks its rows, a plot that no viewer opens, a guess that is told as a measurement."""
    run("scripts/scaling.py", "--out", tmp_path / "page.md", "--shape", "stories15m", "--shapes", "stories15m", "--rounds", 1,
        "--steps", 4, "--longest", 512)
    page = (tmp_path / "page.md").read_text()
    assert len(re.findall(r"^\| (1|2|4|8|16|32) \|", page, re.M)) == 6
    assert len(re.findall(r"^\| [\d,]+ \| not measured \|", page, re.M)) == 3
    for name in re.findall(r"\((\S+\.svg)\)", page):
        drawing = xml.parse(tmp_path / name).getroot()
        numbers = [float(n) for c in drawing.iter("{http://www.w3.org/2000/svg}circle") for n in (c.get("cx"), c.get("cy"))]
        assert numbers and all(0 < n < 640 for n in numbers)


@pytest.mark.parametrize("wrong, said", [
    (("--shape", "nope"), "argument --shape: invalid choice: 'nope'"), (("--shapes", "stories15m", "nope"), "argument --shapes: "),
    (("--steps", 200), "200 steps do not fit"), (("--rounds", 0), "argument --rounds: ")])
def test_the_scaling_page_says_what_is_wrong(wrong, said):
    done = run("scripts/scaling.py", *wrong, code=2)
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_page_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("scripts/scaling.py", "--out", tmp_path / "file/page.md", code=1)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- mixtral-moe -------------------------------------------------------------------------------------------

def test_what_fits_where():
    """Against arithmetic by hand: 32 layers of 8 experts of 3 * 4096 * 14336 weights."""
    done = run("mixtral-moe/fits.py", "--config", "scripts/shapes/mixtral-8x7b.json", "--vram_gb", 4, 16, 200,
               "--device_gbs", 1000, "--host_gbs", 50)
    rows = [line.split("|") for line in done.stdout.splitlines()[3:]]
    assert len(rows) == 12 and rows[0][6].strip() == "does not fit"
    expert = 3 * 4096 * 14336 * 2
    assert rows[1][4].strip() == f"{32 * 8 * expert / 1e9:.1f} GB" and rows[2][5].strip() == "100%"
    attention, rest = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024), 32 * (8 * 4096 + 2 * 4096) + 32000 * 4096 + 4096
    everything = (2 * (attention + rest) + 2 * 32 * expert) / 1000e9
    assert abs(float(rows[2][6]) - 1 / everything) < 0.1


def test_what_does_not_fit_is_said(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(TINY))
    assert "no experts to offload" in run("mixtral-moe/fits.py", "--config", tmp_path / "c.json", code=1).stderr
    assert "error:" in run("mixtral-moe/fits.py", "--config", tmp_path / "none.json", code=1).stderr


def test_perplexity_by_experts(tmp_path):
    import shutil
    path = write(Family("mixtral", dict(vocab_size=2048, num_local_experts=4, rope_parameters=rope(1e4))), tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "checkpoints/stories" / name, path)
    command = ["mixtral-moe/perplexity.py", "--checkpoint_path", path, "--text", "checkpoints/stories/held_out.txt",
               "--max_seq_length", 64]
    rows = [line.split("|") for line in run(*command).stdout.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["1", "2 (as trained)", "3", "4"]
    assert len({row[3] for row in rows}) == 4
    assert "the model has 4 experts a layer" in run(*command, "--experts_per_token", 5, code=1).stderr
