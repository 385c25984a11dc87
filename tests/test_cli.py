"""The command line: what goes where, the flags, the conversation, and one sentence for each mistake."""
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cli
from checkpoint import save_checkpoint
from test_generate import Scripted, random_model
from test_tokenizer import CHATML, byte_level_json
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model as a file of ours, a byte-level tokenizer and a chat template beside it."""
    folder = tmp_path_factory.mktemp("model")
    byte_level_json(folder)
    config = {"bos_token": "<s>", "eos_token": "<|end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    save_checkpoint(random_model(max_position=600), folder / "tiny.safetensors")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def tiny(folder: Path) -> list:
    return ["--checkpoint_path", folder / "tiny.safetensors", "--temperature", 0, "--ignore_eos"]


def test_text_to_stdout_figures_to_stderr(folder, capsys):
    """A pipe that receives figures, or a figure that is missing."""
    code, out, err = run(capsys, *tiny(folder), "--prompt", "hello", "--max_new_tokens", 8)
    assert code == 0 and out.endswith("\n") and "tok/s" not in out
    for figure in ("loaded in", "prefill", "first token after", "decode", "MB a token", "GB/s", "peak memory", "seed"):
        assert figure in err
    assert run(capsys, *tiny(folder), "--prompt", "hello", "--max_new_tokens", 8, "--quiet") == (0, out, "")


def test_json_is_one_object(folder, capsys):
    """Something else on stdout, a figure that is text, or rows that differ from the plain run's."""
    plain = run(capsys, *tiny(folder), "--prompt", "hello", "--max_new_tokens", 8)[1]
    code, out, err = run(capsys, *tiny(folder), "--prompt", "hello", "--max_new_tokens", 8, "--json")
    found = json.loads(out)
    assert code == 0 and err == "" and found["text"] + "\n" == plain and found["finish_reason"] == "length"
    for key in ("load_s", "compile_s", "prefill_s", "prefill_tok_s", "ttft_s", "decode_s", "decode_tok_s", "seed",
                "bytes_per_token", "bandwidth_gbs", "bandwidth_probe_gbs", "peak_mem_bytes", "prompt_tokens"):
        assert isinstance(found[key], (int, float)), key
    assert found["new_tokens"] == 8 and found["torch"] == torch.__version__


def test_prompts_make_one_batch_of_different_rows(folder, capsys, tmp_path, monkeypatch):
    """Rows that share a prompt, lose their order, or differ from each alone; files, pipes and integers as prompts."""
    options = [*tiny(folder), "--max_new_tokens", 5, "--json"]
    rows = json.loads(run(capsys, *options, "--prompt", "hello", "a b c d", "--prompt", "x")[1])["rows"]
    alone = [json.loads(run(capsys, *options, "--prompt", p)[1])["rows"][0] for p in ("hello", "a b c d", "x")]
    assert rows == alone
    (tmp_path / "prompt.txt").write_text("hello\n")
    assert json.loads(run(capsys, *options, "--prompt_file", tmp_path / "prompt.txt")[1])["rows"] == alone[:1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    assert json.loads(run(capsys, *options, "--prompt_file", "-")[1])["rows"] == alone[:1]
    assert json.loads(run(capsys, *options, "--prompt", "37")[1])["prompt_tokens"] == 37
    several = json.loads(run(capsys, *options, "--prompt", "hello", "--batch_size", 2, "--num_samples", 3)[1])["rows"]
    assert several == alone[:1] * 6


def test_same_seed_same_text(folder, capsys):
    """A run that cannot be repeated, samples that are all the same, a compiled run with another text."""
    options = ["--checkpoint_path", folder / "tiny.safetensors", "--prompt", "hello", "--max_new_tokens", 12, "--seed", 4]
    first = run(capsys, *options, "--quiet")
    assert run(capsys, *options, "--quiet") == first
    assert run(capsys, *options, "--quiet", "--compile", "--compile_prefill", "--dtype", "float32") == first
    rows = json.loads(run(capsys, *options, "--num_samples", 2, "--json")[1])["rows"]
    assert rows[0]["text"] + "\n" == first[1] and rows[1]["text"] != rows[0]["text"]


def test_defaults_bend_to_what_fits_and_wishes_do_not(folder, capsys):
    """A default of 256 tokens that makes a prompt of 500 fail, or a wish that is cut silently."""
    code, out, _ = run(capsys, *tiny(folder), "--prompt", "590", "--json")
    assert code == 0 and json.loads(out)["new_tokens"] == 10
    code, out, err = run(capsys, *tiny(folder), "--prompt", "590", "--max_new_tokens", 11)
    assert code == 1 and out == "" and all(n in err for n in ("590", "11", "600"))
    assert run(capsys, *tiny(folder), "--prompt", "590", "--max_new_tokens", 11, "--max_seq_length", 700)[0] == 0


def test_interactive_reads_texts_of_their_own(folder, capsys, monkeypatch):
    """A second prompt that still sees the first, or one that goes through the chat template."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nhello\n"))
    code, out, err = run(capsys, *tiny(folder), "--interactive", "--max_new_tokens", 5)
    alone = run(capsys, *tiny(folder), "--prompt", "hello", "--max_new_tokens", 5)[1]
    assert code == 0 and out == alone * 2 and prefilled(err)[0] == len(load_tokenizer(folder).encode("hello"))


def test_profile_writes_a_trace(folder, capsys, tmp_path):
    """A trace that is not JSON, or not there."""
    trace = tmp_path / "trace.json"
    assert run(capsys, *tiny(folder), "--max_new_tokens", 3, "--profile", trace)[0] == 0
    assert "traceEvents" in json.loads(trace.read_text())


WRONG = [(["--max_new_tokens", "-1"], 2), (["--num_samples", "0"], 2), (["--batch_size", "0"], 2),
         (["--temperature", "-0.5"], 2), (["--temperature", "nan"], 2), (["--top_p", "1.5"], 2), (["--top_k", "-3"], 2),
         (["--min_p", "2"], 2), (["--repetition_penalty", "0"], 2), (["--max_seq_length", "0"], 2), (["--seed", "x"], 2),
         (["--dtype", "int3"], 2), (["--no_such_flag"], 2),
         (["--prompt", ""], 2), (["--prompt", "0"], 2), (["--prompt_file", "/no/such/file"], 1),
         (["--device", "nonsense"], 1), (["--checkpoint_path", "/no/such/model"], 1),
         (["--prompt", "700"], 1), (["--profile", "/no/such/folder/trace.json"], 1),
         (["--max_new_tokens", "9000000", "--max_seq_length", "99999999", "--batch_size", "4000"], 1)]
if not torch.cuda.is_available():
    WRONG.append((["--device", "cuda"], 1))


@pytest.mark.parametrize("arguments, expected", WRONG, ids=str)
def test_mistakes_are_one_sentence(folder, capsys, arguments, expected):
    """A traceback, an exit code of 0, or half a text before the error."""
    given = [] if "--checkpoint_path" in arguments else ["--checkpoint_path", folder / "tiny.safetensors"]
    code, out, err = run(capsys, *given, "--quiet", *arguments)
    assert code == expected and out == "" and "Traceback" not in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1


def test_broken_checkpoints(tmp_path, folder, capsys, monkeypatch):
    """Folders without weights or tokenizer, a file cut short, a text that is not UTF-8."""
    assert run(capsys, "--checkpoint_path", tmp_path)[0] == 1
    data = (folder / "tiny.safetensors").read_bytes()
    (tmp_path / "alone.safetensors").write_bytes(data)
    code, _, err = run(capsys, "--checkpoint_path", tmp_path / "alone.safetensors")
    assert code == 1 and "tokenizer" in err
    byte_level_json(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(data[:-100])
    code, _, err = run(capsys, "--checkpoint_path", tmp_path / "cut.safetensors")
    assert code == 1 and err.count("error:") == 1 and "cut.safetensors" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    code, out, err = run(capsys, *tiny(folder), "--prompt_file", "-")
    assert code == 1 and out == "" and "UTF-8" in err and "0xff" in err


def test_a_prompt_file_is_read_before_the_model_and_is_text(folder, capsys, tmp_path):
    """A wrong path told after a minute of loading; a file's "7" taken for seven synthetic tokens."""
    (tmp_path / "empty.txt").write_text("\n"), (tmp_path / "seven.txt").write_text("7\n")
    for path, reason in (("/no/such/file", "No such file"), (tmp_path / "empty.txt", "empty"), (tmp_path, "directory")):
        code, out, err = run(capsys, "--checkpoint_path", "/no/such/model", "--prompt_file", path)
        assert code == 1 and out == "" and str(path) in err and reason in err
    code, out, err = run(capsys, *tiny(folder), "--prompt_file", tmp_path / "seven.txt", "--json")
    assert code == 0 and json.loads(out)["prompt_tokens"] == len(load_tokenizer(folder).encode("7"))


# ---- conversation ----------------------------------------------------------------------------------------------

def chat(capsys, monkeypatch, folder, text: str, *flags) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, out, err = run(capsys, *tiny(folder), "--chat", "--max_new_tokens", 6, "--temperature", 1, "--seed", 3, *flags)
    assert code == 0
    return out, err


def prefilled(err: str) -> list[int]:
    return [int(line.split("prefill ")[1].split()[0]) for line in err.splitlines() if "prefill " in line]


def test_turns_reuse_the_cache_and_change_no_text(folder, capsys, monkeypatch):
    """A second turn that runs the whole conversation again, or one whose text differs from a fresh run's."""
    out, err = chat(capsys, monkeypatch, folder, "hello\nagain\n")
    t = load_tokenizer(folder)
    messages = [{"role": "user", "content": "hello"}]
    assert prefilled(err)[0] == len(t.encode_chat(messages))
    assert prefilled(err)[1] < len(t.encode_chat([*messages, {"role": "user", "content": "again"}]))
    monkeypatch.setattr(cli, "common_prefix", lambda a, b: 0)
    fresh, err = chat(capsys, monkeypatch, folder, "hello\nagain\n")
    assert out == fresh and prefilled(err)[1] > prefilled(err)[0]


def test_reset_system_exit_and_continued_lines(folder, capsys, monkeypatch):
    """Commands that reach the model as text."""
    once, err = chat(capsys, monkeypatch, folder, "hello\n")
    assert chat(capsys, monkeypatch, folder, "hello\n/reset\nhello\n/exit\nnever\n")[0] == once * 2
    told, err_told = chat(capsys, monkeypatch, folder, "hello\n", "--system", "be brief")
    later, err_later = chat(capsys, monkeypatch, folder, "/system be brief\nhello\n")
    assert later == told and prefilled(err_later) == prefilled(err_told) > prefilled(err)
    seen = []
    monkeypatch.setattr(cli, "chat_ids", lambda o, tokenizer, messages: seen.append(messages[-1]["content"]) or [1])
    chat(capsys, monkeypatch, folder, "one\\\ntwo\n\n")
    assert seen == ["one\ntwo"]


def test_chat_prompt_answers_and_exits(folder, capsys):
    """A template that is not applied to --prompt, or applied when nobody asked."""
    options = [*tiny(folder), "--prompt", "hello", "--max_new_tokens", 3, "--json"]
    templated, plain = (json.loads(run(capsys, *options, *flag)[1])["prompt_tokens"] for flag in (["--chat"], []))
    assert templated > plain


def test_too_long_a_turn_does_not_end_the_chat(folder, capsys, monkeypatch):
    """A conversation lost to one long message."""
    out, err = chat(capsys, monkeypatch, folder, "x " * 700 + "\nhello\n")
    assert "error:" in err and "600" in err and len(prefilled(err)) == 1


def test_interrupt_stops_the_answer_only(folder, capsys, monkeypatch):
    """Ctrl-C that ends the chat, or loses what was printed."""
    class Slow(Scripted):
        def forward(self, tokens, input_pos=None, **rest):
            if self.forwards == 3:
                self.forwards += 1
                raise KeyboardInterrupt
            return super().forward(tokens, input_pos, **rest)
    model, t = Slow(lambda row, position: 65), load_tokenizer(folder)
    monkeypatch.setattr(cli, "load_model", lambda *a, **k: (model, t))
    seen, ids = [], cli.chat_ids
    monkeypatch.setattr(cli, "chat_ids", lambda o, tokenizer, m: seen.append(list(m)) or ids(o, tokenizer, m))
    out, err = chat(capsys, monkeypatch, folder, "hello\nagain\n")
    assert out == "AAA\nAAAAAA\n" and "interrupted" in err
    assert seen[1][1] == {"role": "assistant", "content": "AAA"}


def test_interrupt_ends_a_run_with_130(folder):
    """A traceback after Ctrl-C."""
    command = [sys.executable, "generate.py", "--checkpoint_path", str(folder / "tiny.safetensors"), "--ignore_eos",
               "--num_samples", "100000", "--max_new_tokens", "300"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a job's may be off
    process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(folder):
    """`| head -1` that ends in a traceback."""
    command = (f"{sys.executable} generate.py --checkpoint_path {folder}/tiny.safetensors --quiet --num_samples 50 "
               "--max_new_tokens 50 | head -c 5")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and b"Error" not in done.stderr, done.stderr


@pytest.mark.parametrize("flags, hurries", [("", True), ("--chat --prompt Hello", True), ("--chat", False), ("--interactive", False)])
def test_who_answers_one_prompt_is_in_a_hurry(flags, hurries, monkeypatch):
    """Seconds of waiting for large pages before a text of one second; a long talk in slow ones."""
    monkeypatch.setattr(cli.cpu, "HURRY", {})
    monkeypatch.setattr(cli, "load_model", lambda *path, **options: bool(cli.cpu.HURRY))
    assert cli.load(cli.parser().parse_args(flags.split()), {}) == hurries


@pytest.mark.parametrize("script", ["generate.py", "quantize.py", "eval.py", "scripts/benchmark.py", "scripts/scaling.py"])
def test_nothing_is_said_about_numpy(script):
    """PyTorch warns on import where there is none, as in a fresh environment: the first thing a newcomer would read."""
    code = f"import runpy, sys; sys.modules['numpy'] = None; sys.argv = ['{script}', '--help']; " \
           f"sys.path.insert(0, '{(ROOT / script).parent}'); runpy.run_path('{script}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout and done.stderr == ""
