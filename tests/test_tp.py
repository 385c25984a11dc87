"""Several ranks against one: the same logits and texts, each reading its own part; and what happens when one fails.

tests/tp_worker.py runs in the ranks; what it saves is compared here. On CPUs, with gloo and shared memory."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import quantize_cli

families = pytest.importorskip("families")
ROOT, WORKER = Path(__file__).resolve().parents[1], Path(__file__).with_name("tp_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WIDE = dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=24, intermediate_size=200,
            vocab_size=101, num_hidden_layers=2)                # nothing here divides by 32, and 101 by nothing
MODELS = {
    "llama": families.Family("llama", WIDE), "one_kv": families.Family("llama", WIDE | dict(num_key_value_heads=1)),
    "biases": families.Family("llama", WIDE | dict(attention_bias=True, mlp_bias=True)),
    "tied": families.Family("llama", WIDE | dict(tie_word_embeddings=True)),
    "qwen3": families.Family("qwen3", WIDE), "olmo2": families.Family("olmo2", WIDE),
    "gemma2": families.Family("gemma2", WIDE | dict(sliding_window=8, query_pre_attn_scalar=24)),
    "even": families.Family("llama", dict(intermediate_size=192, vocab_size=101, num_hidden_layers=2)),
    "mixtral": families.Family("mixtral", WIDE | dict(num_local_experts=4, intermediate_size=256)),
    "qwen2_moe": families.Family("qwen2_moe", WIDE | dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=72,
                                                          shared_expert_intermediate_size=60, mlp_only_layers=[1])),
    "gpt_oss": families.Family("gpt_oss", WIDE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
                                                      intermediate_size=120, rope_parameters=families.rope(
                                                          1.5e5, "yarn", factor=4.0, original_max_position_embeddings=16))),
    "uneven": families.Family("llama", WIDE | dict(num_attention_heads=12, num_key_value_heads=6, head_dim=8)),
}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def launch(n: int, *command, timeout: float = 170, **options) -> subprocess.CompletedProcess:
    head = [*TORCHRUN, "--standalone", f"--nproc_per_node={n}"] if n else [sys.executable]
    return subprocess.run([*head, *map(str, command)], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
                          env=ENV, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, family in MODELS.items():
        families.write(family, folder / name)
    for mode in ("int8", "int4"):
        (folder / mode).mkdir()
        assert quantize_cli.main(["--checkpoint_path", str(folder / "biases"), "--mode", mode, "--quiet",
                                  "--output", str(folder / mode / "model.safetensors")]) == 0
    for mode in ("int8", "int4"):
        (folder / f"experts_{mode}").mkdir()
        assert quantize_cli.main(["--checkpoint_path", str(folder / "mixtral"), "--mode", mode, "--quiet",
                                  "--output", str(folder / f"experts_{mode}" / "model.safetensors")]) == 0
    assert quantize_cli.main(["--checkpoint_path", str(folder / "even"), "--mode", "int4", "--quiet", "--format",
                              "compressed-tensors", "--output", str(folder / "foreign")]) == 0
    return folder


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    """By number of ranks, and rank, what the worker found; 0: one plain process."""
    out = tmp_path_factory.mktemp("found")
    for n in (0, 2, 4):
        done = launch(n, WORKER, folder, out / str(n))
        assert done.returncode == 0, done.stderr[-3000:]
    return {n: [torch.load(f"{out}/{n}.{r}") for r in range(max(n, 1))] for n in (0, 2, 4)}


QUANTIZED = ("int8", "int4", "experts_int8", "experts_int4")
CASES = [f"{name}-float32" for name in (*MODELS, "foreign", *QUANTIZED)] + [
    f"{name}-bfloat16" for name in ("llama", "int8", "int4")]         # rounding makes routers choose others


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one(found, case, n):
    """A part at the wrong place, a sum left out or made twice, a bias added by every rank, a group cut in the middle."""
    alone, several = found[0][0][case], [rank[case] for rank in found[n]]
    tolerance = 1e-4 if case.endswith("float32") else 0.02 * alone["whole"].abs().max()
    for rank in several:
        for key in ("whole", "parts"):
            torch.testing.assert_close(rank[key], alone[key], rtol=0, atol=float(tolerance))
        assert torch.equal(rank["whole"], several[0]["whole"])
        assert rank["ids"] == several[0]["ids"] and rank["drawn"] == several[0]["drawn"]    # whatever a rank's seed is
    if case.endswith("float32"):
        assert several[0]["ids"] == alone["ids"]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_rank_reads_and_holds_its_part(found, case, n):
    """A rank that reads all and keeps a part, or holds two copies. What all need (norms, shared heads) is small."""
    alone = found[0][0][case]
    for rank in found[n]:
        stored = alone["read"] / alone["held"]                  # bytes in the file for one in memory
        assert rank[case]["read"] <= 1.2 * max(1, stored) * rank[case]["held"]
        assert rank[case]["held"] < 1.35 / n * alone["held"]
        if case.startswith("llama"):                            # the kernels pad others' tiny parts
            assert rank[case]["step_bytes"] < 1.45 / n * alone["step_bytes"]


@pytest.mark.parametrize("n", [2, 4])
def test_speculation_on_ranks(found, n):
    """Ranks whose guesses, noise or number of guesses differ hang; the worker's time limit would end it."""
    several = [rank["speculation"] for rank in found[n]]
    assert several[0]["ids"] == found[0][0]["speculation"]["ids"] and len(several[0]["ids"]) == 220
    assert all(rank["drawn"] == several[0]["drawn"] for rank in several)


def test_compiled_on_ranks(found):
    """A graph break at a sum, which fullgraph refuses, or a sum that was optimized away."""
    assert all(rank["compiled"]["ids"] == found[0][0]["llama-float32"]["ids"] for rank in found[2])


GREEDY = ["generate.py", "--temperature", "0", "--max_new_tokens", "20", "--dtype", "float32"]


def test_two_nodes(folder, found, tmp_path):
    """Two machines, one rank each, as far as one machine can tell: they meet at an address and share no memory."""
    nodes = [subprocess.Popen([*TORCHRUN, "--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
                               "--master_port=29631", str(WORKER), str(folder), str(tmp_path / "out"), "llama"],
                              cwd=ROOT, env=ENV) for i in range(2)]
    assert [node.wait(120) for node in nodes] == [0, 0]
    torch.testing.assert_close(torch.load(tmp_path / "out.1")["llama-float32"]["whole"],
                               found[0][0]["llama-float32"]["whole"], rtol=0, atol=1e-4)


def test_nodes_with_unlike_commands():
    """Ranks that draw unlike numbers of tokens wait for each other; they must say so instead."""
    nodes = [subprocess.Popen([*TORCHRUN, "--nnodes=3", f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
                               "--master_port=29632", *GREEDY, "--top_k", str(5 + i // 2)], cwd=ROOT, env=ENV,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for i in range(3)]
    errors = "".join(node.communicate(timeout=60)[1] for node in nodes)
    assert all(node.returncode for node in nodes)
    assert errors.count("error: the ranks differ in their flags") == 1 and 'generate.py", line' not in errors


# ---- the command line ------------------------------------------------------------------------------------------

def test_one_rank_and_three_tell_the_same_story():
    plain = launch(0, *GREEDY)
    for n in (1, 3):
        done = launch(n, *GREEDY)
        assert done.returncode == 0 and done.stdout == plain.stdout, done.stderr
        assert done.stderr.count("tok/s;") == 1                 # rank 0 alone talks


def test_a_chat_and_a_trace_of_three_ranks(tmp_path):
    """Only rank 0 has an input; the others must hear of it."""
    lines = "Once upon a time\nThe dog\n"
    plain = launch(0, *GREEDY, "--interactive", input=lines)
    done = launch(3, *GREEDY, "--interactive", input=lines)
    assert done.returncode == 0 and done.stdout == plain.stdout and len(plain.stdout) > 60, done.stderr
    assert launch(3, *GREEDY, "--profile", tmp_path / "trace").returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"trace.rank{r}" for r in range(3)}


def test_eval_of_three_ranks(tmp_path):
    (tmp_path / "text").write_text("Once upon a time there was a dog. It ran and ran.\n" * 20)
    command = ["eval.py", "--perplexity", tmp_path / "text", "--json", "--dtype", "float32"]
    plain, done = launch(0, *command), launch(3, *command)
    assert done.returncode == 0, done.stderr
    assert abs(json.loads(done.stdout)["perplexity"] - json.loads(plain.stdout)["perplexity"]) < 1e-3


def test_heads_that_cannot_be_shared_out():
    done = launch(2, *GREEDY)
    assert done.returncode != 0 and done.stderr.count("error: 3 attention heads cannot be shared out to 2 ranks") == 1
    assert "1, 3 ranks would do" in done.stderr and 'generate.py", line' not in done.stderr


@pytest.mark.parametrize("who", ["torchrun", "rank"])
def test_ctrl_c_ends_all(who):
    """A rank that catches the interrupt while another waits for its sum."""
    run = subprocess.Popen([*TORCHRUN, "--standalone", "--nproc_per_node=3", *GREEDY[:1], "--max_new_tokens", "900",
                            "--max_seq_length", "1000", "--ignore_eos", "--num_samples", "50"], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENV, start_new_session=True)
    assert run.stdout.read(20)
    os.killpg(run.pid, signal.SIGINT) if who == "torchrun" else os.kill(ranks_of(run)[0], signal.SIGINT)
    began = time.perf_counter()
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and time.perf_counter() - began < 30 and 'generate.py", line' not in errors


def ranks_of(run) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    return [int(n) for n in found][-3:]


def test_a_killed_rank_ends_all():
    """Ranks that wait for a dead one for ever."""
    run = subprocess.Popen([*TORCHRUN, "--standalone", "--nproc_per_node=3", *GREEDY[:1], "--interactive"],
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENV)
    for _ in range(200):
        run.stdin.write("Once upon a time\n")
    run.stdin.flush()
    assert run.stdout.readline()                                # they are at work
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    began = time.perf_counter()
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and time.perf_counter() - began < 30
    assert errors.count("error: ") <= 1 and 'generate.py", line' not in errors
