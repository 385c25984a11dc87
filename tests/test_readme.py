"""What the README claims, checked: its commands run, its line counts hold, its code works, its promise is kept."""
import ast
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TABLE = [c.replace("\\|", "|") for c in re.findall(r"^\| [^|]+ \| `((?:[^`\\]|\\.)*)` \|$", README, re.M)]
BLOCKS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]
FOREIGN = ("DIR", "~/", "HuggingFaceTB/", "meta-llama/")      # commands on a model that is not in this repository


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in layout for n in range(t.start[0], t.end[0] + 1)}
    return len(lines - skipped)


def run(command: str) -> subprocess.CompletedProcess:
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ")
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_line_counts():
    """A file tree whose numbers were right once."""
    claims = {name: int(n) for name, n in re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.M)}
    counted = {path.name: code_lines(path.read_text()) for path in ROOT.glob("*.py")}
    assert claims == counted


def test_the_readers_path_stays_short():
    """The promise of the first page: what a reader follows is under 1,000 lines."""
    path = [ROOT / name for name in ("model.py", "generate.py", "quantize.py", "tp.py")]
    assert sum(code_lines(p.read_text()) for p in path if p.exists()) < 1000


def test_the_first_command_tells_a_story():
    """The one line a newcomer pastes: without its pip half, as the suite has installed already."""
    [line] = [b for b in BLOCKS if "generate.py" in b and "pip install" in b]
    done = run(line.split("&&")[1].strip())
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 40 and "tok/s" in done.stderr


@pytest.mark.parametrize("command", [c for c in TABLE if not any(f in c for f in FOREIGN)])
def test_commands_of_the_table_run(command):
    """A command on the page that fails, or one that prints figures where text belongs."""
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "--json" in command:
        assert json.loads(done.stdout)["text"]


@pytest.mark.parametrize("command", [c for c in TABLE if any(f in c for f in FOREIGN)])
def test_commands_on_other_models_parse(command):
    """A flag on the page that was renamed."""
    import cli
    import eval as evaluation
    import quantize_cli
    python, script, *words = shlex.split(command)
    owner = {"generate.py": cli, "quantize.py": quantize_cli, "eval.py": evaluation}[script]
    assert python == "python" and owner.parser().parse_args(words)


def test_the_command_of_several_ranks_runs():
    [command] = [b for b in BLOCKS if b.startswith("torchrun") and not any(f in b for f in FOREIGN) and "generate.py" in b]
    done = run(command.replace("torchrun", "python -m torch.distributed.run"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 40 and done.stderr.count("tok/s") == 2


def test_the_commands_of_the_quality_table_run(tmp_path):
    """They leave files, so they run in a copy; with fewer stories to look at than on the page."""
    if not (ROOT.parent / "shared/data/text/tinystories").is_dir():
        pytest.skip("needs ../shared/data/text/tinystories")
    home = tmp_path / "main"
    shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(".git", "__pycache__", "tests"))
    (home / "tinystories").symlink_to(ROOT.parent / "shared/data/text/tinystories")
    block = [b for b in BLOCKS if "split" in b]
    assert len(block) == 3
    for command in block:
        command = command.replace("--calibration_limit 600", "--calibration_limit 10").replace("python ", f"{sys.executable} ")
        done = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert 10 < float(re.search(r"perplexity ([\d.]+)", done.stdout)[1]) < 12


def test_scripts_named_on_the_page_exist():
    """A command whose script has moved."""
    for script in re.findall(r"(?:python |\./)(scripts/\S+\.(?:py|sh))", README):
        assert (ROOT / script).exists(), script


def test_the_python_example_runs(capsys):
    """The lines that people copy into their own program."""
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code.replace('"checkpoints/stories"', repr(str(ROOT / "checkpoints/stories"))), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 20


# ---- mixtral-moe/README.md -------------------------------------------------------------------------------------

MIXTURES = (ROOT / "mixtral-moe/README.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^\| [^|]+ \| `(python [^`]+)` \|$", MIXTURES, re.M))
def test_commands_of_the_mixtures_page_parse(command):
    """A flag on the page that was renamed, a script that has moved."""
    import importlib.util
    _, script, *words = shlex.split(command)
    spec = importlib.util.spec_from_file_location("of_the_page", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.parser().parse_args(words)


def test_the_table_of_what_fits_is_what_the_script_prints():
    """A table that was computed once, by a script that computes another."""
    commands = re.findall(r"^python mixtral-moe/fits\.py .*--host_gbs.*$", MIXTURES, re.M)
    assert len(commands) == 2
    for command in commands:
        printed = run(command).stdout.splitlines()[1:]
        assert len(printed) > 6 and "\n".join(printed) in MIXTURES
