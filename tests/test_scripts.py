"""The scripts as commands, from the repository's root and from elsewhere; the hub is a small server on this machine."""
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from checkpoint import CheckpointError, end_ids, load_checkpoint, resolve
from test_checkpoint import TOKENS, llama_tensors, write_hf, write_llama2c

ROOT = Path(__file__).resolve().parents[1]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def run(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], cwd=cwd, env=ENV | env, capture_output=True, text=True)


def script(name: str, *args, **kw) -> subprocess.CompletedProcess:
    return run(sys.executable, ROOT / "scripts" / name, *args, **kw)


def write_model(folder: Path) -> Path:
    write_hf(folder)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    return folder


# ---- convert ---------------------------------------------------------------------------------------------------

def test_converted_file_is_the_same_model(tmp_path):
    """The folder goes on meaning the original; the file carries config and end ids; stdout is its path alone."""
    folder = write_model(tmp_path / "m")
    done = script("convert_hf_checkpoint.py", "--checkpoint_dir", "m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / done.stdout.strip()
    assert file == folder / "model_fast.safetensors"
    wanted = load_checkpoint(folder)(TOKENS)
    assert torch.equal(load_checkpoint(file)(TOKENS), wanted) and end_ids(file) == {2, 9}
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_checkpoint(folder)(TOKENS), wanted)


def test_convert_options(tmp_path):
    """gpt-fast's --model_name is taken and ignored, with a word; the tokenizer goes along to another folder."""
    folder = write_model(tmp_path / "m")
    out = tmp_path / "new" / "half.pth"
    done = script("convert_hf_checkpoint.py", "--checkpoint_dir", folder, "--model_name", "7B", "--dtype", "bfloat16",
                  "--output", out)
    assert done.returncode == 0 and "--model_name is ignored" in done.stderr
    assert {p.dtype for p in load_checkpoint(out).parameters()} == {torch.bfloat16}
    assert (out.parent / "tokenizer.model").read_bytes() == b"pieces"


def test_convert_takes_a_file(tmp_path):
    file = write_llama2c(tmp_path / "m")
    done = script("convert_hf_checkpoint.py", "--checkpoint_dir", file)
    assert torch.equal(load_checkpoint(done.stdout.strip())(TOKENS), load_checkpoint(file)(TOKENS))


@pytest.mark.parametrize("args, sentence", [
    (["--checkpoint_dir", "nowhere"], "error: there is no file or folder 'nowhere'"),
    (["--checkpoint_dir", "{m}", "--output", "{m}/x.gguf"], "must end in .safetensors or .pth"),
    (["--checkpoint_dir", "{m}/model.safetensors", "--output", "{m}/model.safetensors"], "into itself")])
def test_convert_errors_are_one_line(args, sentence, tmp_path):
    folder = write_model(tmp_path / "m")
    before = sorted(p.name for p in folder.iterdir())
    done = script("convert_hf_checkpoint.py", *(a.format(m=folder) for a in args))
    assert done.returncode == 1 and done.stdout == "" and sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == before


# ---- the hub ---------------------------------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for. Repositories: name -> {file: bytes}; the name 'gated' is."""
    repos: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []

    def reply(self, body: bytes, code: int = 200, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.repos.get(name)
        if files is None:
            return self.reply(b"{}", 401, X_Error_Code="RepoNotFound")
        if parts[0] != "api":
            if name.endswith("gated"):
                return self.reply(b"{}", 403, X_Error_Code="GatedRepo")
            file = "/".join(parts[4:])
            self.asked.append(file)
            return self.reply(files[file], ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"', X_Repo_Commit="c" * 40)
        if "tree" in parts:
            listed = [{"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                      for f, b in files.items()]
        else:
            listed = {"id": name, "sha": "c" * 40, "siblings": [{"rfilename": f} for f in files]}
        self.reply(json.dumps(listed).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Environment variables that lead to the server; its repositories hold the tiny Llama in several dresses."""
    folder = write_model(tmp_path / "on-the-hub")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    noise = {"README.md": b"x", "original/params.json": b"{}", "consolidated.safetensors": b"x",
             "onnx/model.onnx": b"x", "pytorch_model.bin": b"x"}
    torch.save(llama_tensors(), folder / "pytorch_model.bin")
    binary = {n: b for n, b in files.items() if n != "model.safetensors"} | \
             {"pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes(), "README.md": b"x"}
    Hub.repos, Hub.asked = {"some/model": files | noise, "old/model": binary, "very/gated": files}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home"),
               HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_XET="1")
    server.shutdown()


def test_download_takes_one_set_of_weights(hub, tmp_path):
    done = script("download.py", "some/model", "--dir", tmp_path / "d", cwd=tmp_path, **hub)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "d"
    assert {p.name for p in (tmp_path / "d").iterdir() if p.is_file()} == \
        {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    load_checkpoint(tmp_path / "d")


def test_download_takes_pickles_where_there_is_nothing_better(hub, tmp_path):
    done = script("download.py", "old/model", "--dir", tmp_path / "d", **hub)
    assert done.returncode == 0, done.stderr
    load_checkpoint(tmp_path / "d")


LOAD = """
import sys
from checkpoint import CheckpointError, load_checkpoint
try:
    print(load_checkpoint(sys.argv[1]).args.dim)
except CheckpointError as error:
    print(error)
"""
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def test_hub_id_loads_and_then_the_cache_serves(hub):
    """Offline, by wish or because there is no connection, what was downloaded before still loads."""
    for env in ({}, {"HF_HUB_OFFLINE": "1"}, NOWHERE):
        assert run(sys.executable, "-c", LOAD, "some/model", **(hub | env)).stdout == "64\n"
    assert set(Hub.asked) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}


@pytest.mark.parametrize("repo, env, sentence", [
    ("very/gated", {}, "'very/gated' is gated: accept its licence on huggingface.co and set HF_TOKEN"),
    ("no/such", {}, "'no/such' is no file or folder here and no repository on huggingface.co"),
    ("some/model", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ("some/model", NOWHERE, "huggingface.co cannot be reached")])
def test_hub_failures_are_one_sentence(repo, env, sentence, hub, tmp_path):
    done = run(sys.executable, "-c", LOAD, repo, **(hub | env))
    assert sentence in done.stdout and len(done.stdout.splitlines()) == 1, done.stderr
    done = script("download.py", repo, "--dir", tmp_path / "d", **(hub | env))
    assert done.returncode == 1 and sentence in done.stderr and done.stderr.startswith("error: ")


def test_path_that_exists_is_no_hub_id(tmp_path, monkeypatch):
    """A folder org/name here is that folder; a missing one beside it is a mistyped path, not a download."""
    monkeypatch.chdir(tmp_path)
    write_hf(tmp_path / "org" / "name")
    assert resolve("org/name") == Path("org/name")
    with pytest.raises(CheckpointError, match="there is no file or folder 'org/nam'"):
        resolve("org/nam")


# ---- prepare ---------------------------------------------------------------------------------------------------

def test_prepare_downloads_converts_and_quantizes(hub, tmp_path):
    """Run in a copy of the repository's code, as the target folder lies beside it."""
    root = tmp_path / "copy"
    for file in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*"), *ROOT.glob("scripts/*.*")]:
        copy = root / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes()) if file.is_file() else None
    done = run("bash", root / "scripts" / "prepare.sh", "some/model", cwd=tmp_path, **hub)
    assert done.returncode == 0, done.stderr
    folder = root / "checkpoints" / "some" / "model"
    load_checkpoint(folder / "model_fast.safetensors")
    load_checkpoint(folder / "model_int8.safetensors")


def test_prepare_stops_at_the_first_failure(hub, tmp_path):
    done = run("bash", ROOT / "scripts" / "prepare.sh", "no/such", **hub)
    assert done.returncode == 1 and "no repository" in done.stderr and "Traceback" not in done.stderr
    assert run("bash", ROOT / "scripts" / "prepare.sh").returncode == 2


# ---- the whole way ---------------------------------------------------------------------------------------------

def test_flow_runs_on_the_bundled_model():
    """convert, quantize, generate and eval, each reading what the one before wrote; nothing is left behind."""
    before = sorted((ROOT / "checkpoints" / "stories").iterdir())
    done = run("bash", ROOT / "scripts" / "test_flow.sh", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    figures = dict(re.findall(r"perplexity ([\d.]+).* (bfloat16|int8|int4.g32),", done.stdout))
    assert len(figures) == 4 and max(map(float, figures)) < 1.05 * min(map(float, figures))
    assert sorted((ROOT / "checkpoints" / "stories").iterdir()) == before
