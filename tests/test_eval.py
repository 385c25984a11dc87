"""eval.py: perplexity against independent computations, lm-eval's adapter against lm-eval's own Hugging Face model."""
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import eval as evaluation
from generate import load_model

STORIES = ROOT / "checkpoints" / "stories"
HELD_OUT = STORIES / "held_out.txt"


def by_transformers(folder, texts, length):
    """Nats and tokens of each text in windows of BOS and length - 1 ids, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = tokens = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for i in range(0, len(ids), length - 1):
            window = torch.tensor([[tokenizer.bos_token_id, *ids[i:i + length - 1]]])
            with torch.no_grad():
                logits = model(window[:, :-1]).logits[0]
            nats += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            tokens += window.shape[1] - 1
    return nats, tokens


@pytest.mark.parametrize("length, batch_size", [(512, 8), (100, 3)])
def test_perplexity_is_transformers(length, batch_size):
    """Padding, chunks or the tail of the last window would show in the third digit."""
    text = HELD_OUT.read_text()
    nats, tokens = by_transformers(STORIES, [text], length)
    model, tokenizer = load_model(STORIES, dtype="float32")
    found = evaluation.perplexity(model, tokenizer, text, length=length, batch_size=batch_size)
    assert found["tokens"] == tokens and found["bytes"] == len(text.encode())
    assert abs(found["perplexity"] / math.exp(nats / tokens) - 1) < 1e-4
    assert abs(found["bits_per_byte"] - nats / math.log(2) / found["bytes"]) < 1e-4


def test_stories260k_reference(shared_data):
    """Figures computed in float64 by other code, block by block."""
    reference = json.loads((shared_data / "reference" / "stories260K_reference.json").read_text())
    text = (shared_data / "text" / "tinystories" / "decoding-gpt_tinystories_10k.txt").read_text()
    blocks = [b.strip() for b in text.split("\n\n") if len(b.strip()) > 200][:100]
    model, tokenizer = load_model(shared_data / "weights" / "stories260K" / "hf", dtype="float32")
    texts = [tokenizer.encode(block)[:512] for block in blocks]
    scores = evaluation.score(model, [(ids, len(ids) - 1) for ids in texts])
    tokens = sum(len(ids) - 1 for ids in texts)
    assert tokens == reference["tokens"]
    nll = -sum(logp for logp, _ in scores) / tokens
    assert abs(math.exp(nll) - reference["ppl"]) < 1e-3 * reference["ppl"]


def test_scores_do_not_depend_on_the_batch(monkeypatch):
    """A row beside longer ones, and logits a few positions at a time, must score as it does alone."""
    model, tokenizer = load_model(STORIES, dtype="float32")
    stories = [tokenizer.encode(s) for s in HELD_OUT.read_text().split("\n")[:6] if len(s) > 30]
    texts = [(ids, n) for ids in stories for n in (1, 5, len(ids) - 1)]
    alone = [evaluation.score(model, [text], batch_size=1)[0] for text in texts]
    monkeypatch.setattr(evaluation, "LOGITS", 5 * 2048 * 16)
    for (logp, greedy), (other, also) in zip(evaluation.score(model, texts, batch_size=5), alone):
        assert abs(logp - other) < 1e-3 and greedy == also


def test_chunks_bound_a_forward_and_change_no_score():
    """--chunk is how decode's kernels are judged: no forward may have more tokens."""
    model, tokenizer = load_model(STORIES, dtype="float32")
    widths, text = [], HELD_OUT.read_text()[:1500]

    def step(model, tokens, *rest):
        widths.append(tokens.shape[1])
        return evaluation.score_chunk(model, tokens, *rest)
    whole = evaluation.perplexity(model, tokenizer, text)["nats"]
    assert abs(evaluation.perplexity(model, tokenizer, text, batch_size=1, chunk=9, step=step)["nats"] - whole) < 1e-2
    assert set(widths) == {16}


def test_greedy_is_what_greedy_decoding_says():
    from generate import generate
    model, tokenizer = load_model(STORIES, dtype="float32")
    ids = tokenizer.encode("Once upon a time")
    said = generate(model, tokenizer, [ids], max_new_tokens=6, temperature=0, ignore_eos=True)[0].ids
    wrong = said[:-1] + [(said[-1] + 1) % 2000]
    [(_, yes), (_, no)] = evaluation.score(model, [(ids + said, 6), (ids + wrong, 6)])
    assert yes and not no


def test_a_tokenizer_without_bos_counts_one_less():
    class NoBos:
        bos_id = None

        def encode(self, text, bos=None):
            return list(range(10))
    for length in (2, 3, 4, 10, 11, 50):
        texts = evaluation.windows(NoBos(), "", length)
        assert [i for ids, n in texts for i in ids[len(ids) - n:]] == list(range(1, 10))
        assert all(len(ids) == n + 1 <= length for ids, n in texts)


def test_compiled_scores_agree_and_meet_one_graph():
    from torch._dynamo.testing import CompileCounter
    model, tokenizer = load_model(STORIES, dtype="float32")
    ids = tokenizer.encode(HELD_OUT.read_text())[:400]
    texts = [(ids[:n], n - 1) for n in (40, 70, 100, 200, 399)]
    counter = CompileCounter()
    step = torch.compile(evaluation.score_chunk, backend=counter, fullgraph=True, dynamic=True)
    evaluation.make_room(model, 1, 512)
    plain = evaluation.score(model, texts, batch_size=1)
    for (a, _), (b, _) in zip(evaluation.score(model, texts, batch_size=1, step=step), plain):
        assert abs(a - b) < 1e-3
    assert counter.frame_count <= 2


# ---- the command -----------------------------------------------------------------------------------------------

def command(*words, **environment):
    import os
    return subprocess.run([sys.executable, "eval.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=os.environ | environment)


def test_the_command():
    done = command("--perplexity", HELD_OUT, "--json")
    found = json.loads(done.stdout)
    assert found["tokens"] == 3140 and found["bos_per_window"] and "windows" in done.stderr
    line = command("--perplexity", HELD_OUT, "--quiet")
    assert f"perplexity {found['perplexity']:.4f}" in line.stdout and line.stderr == ""


def test_documents_do_not_see_each_other(tmp_path, capsys):
    stories = [s for s in HELD_OUT.read_text().split("\n") if len(s) > 60][:5]
    file = tmp_path / "s.jsonl"
    file.write_text("".join(json.dumps({"text": s}) + "\n" for s in stories))
    assert evaluation.main(["--perplexity", str(file), "--json", "--quiet", "--dtype", "float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    nats, tokens = by_transformers(STORIES, stories, 512)
    assert found["documents"] == 5 and found["tokens"] == tokens and abs(found["nats"] / nats - 1) < 1e-5
    file.write_text("[1]\n")
    assert evaluation.main(["--perplexity", str(file)]) == 2
    assert "line 1: not an object" in capsys.readouterr().err


@pytest.mark.parametrize("words, code, sentence", [
    ([], 2, "nothing to do"),
    (["--perplexity", "nowhere.txt"], 1, "nowhere.txt"),
    (["--perplexity", "/dev/null"], 2, "too short"),
    (["--perplexity", sys.executable], 2, "is not UTF-8"),
    (["--perplexity", str(HELD_OUT), "--max_seq_length", "1"], 2, "a window needs 2"),
    (["--perplexity", str(HELD_OUT), "--batch_size", "0"], 2, "batch_size is 0"),
    (["--perplexity", str(HELD_OUT), "--chunk", "-1"], 2, "chunk is -1"),
    (["--perplexity", str(HELD_OUT), "--checkpoint_path", "no/where/at/all"], 1, "no file or folder"),
])
def test_bad_arguments_are_one_sentence(words, code, sentence, capsys):
    assert evaluation.main(words) == code
    told = capsys.readouterr().err.strip()
    assert sentence in told and told.startswith("error: ") and "\n" not in told


def test_without_lm_eval_is_one_sentence(monkeypatch, capsys):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert evaluation.main(["--tasks", "hellaswag"]) == 2
    assert capsys.readouterr().err == ("error: --tasks needs lm-eval: pip install 'lm_eval>=0.4.13' (--perplexity FILE "
                                       "needs nothing)\n")


# ---- lm-eval ---------------------------------------------------------------------------------------------------

TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
              "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
               "  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n",
    "answer": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{goal}}'\n"
              "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 24\nmetric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks, one of each kind, over stories: YAML files beside a data file."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm_eval>=0.4.13'")
    folder = tmp_path_factory.mktemp("tasks")
    stories = [s.strip() for s in HELD_OUT.read_text().split("\n") if len(s) > 80][:8]
    model, tokenizer = load_model(STORIES, dtype="float32")
    rows = []
    for i, story in enumerate(stories):
        words = story.split(" ")
        begin = " ".join(words[:12])
        from generate import generate
        said = generate(model, tokenizer, [begin], max_new_tokens=24, temperature=0, stop=["."])[0].text.strip()
        rows.append({"question": begin, "choices": [" ".join([""] + words[12:16]), " a big red dog said hello", " the"],
                     "answer": 0, "text": story, "goal": said if i % 2 else "no"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: stories_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
                                             f"    test: {folder / 'data.jsonl'}\ntest_split: test\n{text}")
    return folder


def test_gptq_looks_at_tasks(tasks, monkeypatch, tmp_path, capsys):
    """--calibration_tasks, to our own .pth; a task nobody knows is one sentence."""
    import quantize_cli
    from checkpoint import load_checkpoint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["--checkpoint_path", str(STORIES), "--mode", "int4-gptq", "--include_path", str(tasks), "--quiet",
             "--output", str(tmp_path / "q.pth"), "--calibration_tasks"]
    assert quantize_cli.main([*words, "stories_choice"]) == 0
    assert load_checkpoint(tmp_path / "q.pth").tok_embeddings.bits == 4
    assert quantize_cli.main([*words, "no_such_task"]) in (1, 2)
    assert "knows no task 'no_such_task'" in capsys.readouterr().err


def test_the_same_numbers_as_lm_evals_own_model(tasks, monkeypatch, tmp_path):
    """The reference is lm-eval's HFLM with transformers; one token more or less of context shows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    names = [f"stories_{name}" for name in TASKS]
    theirs = simple_evaluate(model=HFLM(pretrained=str(STORIES), device="cpu", dtype="float32", batch_size=4),
                             tasks=names, task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0)
    o = evaluation.parser().parse_args(["--tasks", *names, "--include_path", str(tasks), "--dtype", "float32",
                                        "--device", "cpu", "--quiet", "--bootstrap_iters", "0", "--batch_size", "3"])
    ours = evaluation.run_tasks(*load_model(STORIES, dtype="float32"), o)
    for name in names:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-3), (name, metric)
    assert ours["results"]["stories_answer"]["exact_match,none"] == 0.5


def test_tasks_by_the_command(tasks, tmp_path, monkeypatch, capsys):
    words = ["--tasks", "stories_choice", "--include_path", tasks, "--limit", 4, "--num_fewshot", 1]
    done = command(*words, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path))
    assert done.returncode == 0 and "stories_choice" in done.stdout, done.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert evaluation.main([*map(str, words), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert 0 <= found["results"]["stories_choice"]["acc,none"] <= 1
    assert evaluation.main(["--tasks", "no_such_task"]) == 2
    assert "no task 'no_such_task'" in capsys.readouterr().err


def test_chat_template(tasks):
    """The adapter renders the model's own template, and a BOS that it writes is not doubled."""
    from types import SimpleNamespace
    model, tokenizer = load_model(STORIES)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    lm = evaluation.adapter(model, tokenizer, SimpleNamespace(compile=False, max_seq_length=0, batch_size=2, quiet=True))
    text = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert "<user>Hello" in text and lm.tok_encode(text).count(tokenizer.bos_id) == 1
