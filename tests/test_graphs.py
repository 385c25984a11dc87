"""graphs.py without a GPU: a replay repeats what PyTorch's dispatcher was asked for, tensor operations and nothing else."""
import gc
from functools import partial

import cli
import experts
import generate as g
import graphs
import pytest
import torch
from model import ModelArgs, RopeArgs, Transformer
from sampling import Sampler, Sampling
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PLAIN, BLOCKS = g.Steps(), g.Steps(blocks=partial(graphs.decode_blocks, g.decode))


@pytest.fixture(scope="module")
def bundled():
    return g.load_model(dtype="float32")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(g, "REPLAYED", "cpu")
    monkeypatch.setattr(graphs, "RECORDINGS", type(graphs.RECORDINGS)())
    monkeypatch.setattr(graphs, "FAILED", type(graphs.FAILED)())


class Launches(TorchDispatchMode):
    """Operations, with what they were given and gave: called again, they read and write the same tensors, as launches in a
    CUDA graph do. A number that the host asks for cannot be among them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host asked for a number")
        result = operator(*args, **kwargs or {})
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():          # not a view, nor in place
                    old.copy_(new)


@pytest.fixture
def made(monkeypatch):
    """The recordings that were made; each is run once before, as on a GPU."""
    found = []

    def record(run, generators):
        run(1)
        with Launches() as launches:
            run(graphs.BLOCK)
        found.append(launches)
        return launches.replay
    monkeypatch.setattr(graphs, "record", record)
    return found


def both(bundled, prompts, n, **settings):
    plain, blocks = (g.generate(*bundled, prompts, max_new_tokens=n, steps=steps, **settings) for steps in (PLAIN, BLOCKS))
    assert [row.ids for row in plain] == [row.ids for row in blocks]
    assert [(row.text, row.finish_reason) for row in plain] == [(row.text, row.finish_reason) for row in blocks]
    return blocks


@pytest.mark.parametrize("settings", [
    dict(temperature=0.0), dict(temperature=0.9, top_k=50, seed=3), dict(temperature=1.0, top_k=0, top_p=0.9, min_p=0.01, seed=4),
    dict(temperature=0.8, repetition_penalty=1.3, seed=5), dict(temperature=0.0, repetition_penalty=1.3)])
def test_blocks_say_what_single_steps_say(bundled, made, settings):
    """Rows of unlike lengths, ends in the middle of a block, every kind of draw."""
    rows = both(bundled, ["Once upon a time", "The dog"], 200, **settings)
    assert made and all(row.ids for row in rows)
    both(bundled, ["Tom"], 9, **settings)


def test_a_row_that_ended_says_no_more(bundled, made):
    """Its ids are -1 on the device already: the stop flag."""
    model, tokenizer = bundled
    rows = g.rows_for(model, tokenizer, ["Once upon a time", "The dog"], 200)
    settings = Sampling(temperature=0.9, top_k=50, seed=3)
    sampler = Sampler(settings, [row.prompt for row in rows], model.args.vocab_size, torch.device("cpu"))
    with torch.no_grad():
        g.make_room(model, 2, 250)
        tokens = sampler(g.run_prefill(model, PLAIN, [row.prompt for row in rows]))
        at = torch.tensor([len(row.prompt) for row in rows])
        ids = torch.cat(list(g.decode_n_tokens(model, BLOCKS, tokens, at, int(at.max()) + 1, 190, sampler, rows[0].ends)), 1)
    assert ids.shape == (2, 192)
    for row in ids.tolist():
        end = min(row.index(i) for i in rows[0].ends if i in row)
        assert set(row[end + 1:]) == {-1} and -1 not in row[:end]


def test_what_is_recorded_is_used_again(bundled, made, monkeypatch):
    """Another prompt, another seed; not for another number of rows, other settings, more slots or a larger cache."""
    model, tokenizer = bundled
    model.drop_caches()
    monkeypatch.setattr(graphs, "record", lambda run, generators: made.append(run) or partial(run, graphs.BLOCK))
    for prompt, seed in (("Once upon a time", 1), ("The dog was", 2)):
        both(bundled, [prompt], 20, temperature=0.7, seed=seed)
    assert len(made) == 1
    both(bundled, ["Tom", "Lily"], 20, temperature=0.7, seed=3)
    assert len(made) == 2                       # and the cache grew by a row: the first is of no use any more
    assert len(graphs.RECORDINGS[model]) == 1
    both(bundled, ["Tom"], 20, temperature=0.6, seed=3)
    assert len(made) == 3
    both(bundled, ["Tom"], 300, temperature=0.6, seed=3, ignore_eos=True)
    assert len(graphs.RECORDINGS[model]) == 2 and len(made) == 5
    for k in range(10, 10 + graphs.KEPT):
        both(bundled, ["Tom"], 3, temperature=0.6, seed=3, top_k=k)
    assert len(graphs.RECORDINGS[model]) == graphs.KEPT


def test_the_host_reads_one_block_late(bundled, monkeypatch):
    """While it looks at a block the next one has been sent."""
    sent = []
    monkeypatch.setattr(graphs, "record", lambda run, generators: lambda: (sent.append(1), run(graphs.BLOCK)))
    model, _ = bundled
    sampler = Sampler(Sampling(temperature=0), [[1]], model.args.vocab_size, torch.device("cpu"))
    with torch.no_grad():
        g.make_room(model, 1, 100)
        blocks = g.decode_n_tokens(model, BLOCKS, torch.tensor([5]), torch.tensor([1]), 2, 30, sampler)
        seen = [len(sent) for _ in blocks]
    assert seen == [2, 3, 4, 4]


def test_without_a_graph_single_steps_serve(bundled, monkeypatch, capsys):
    """Told once, and not tried again."""
    tried = []

    def record(run, generators):
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    monkeypatch.setattr(graphs, "record", record)
    both(bundled, ["Once upon a time"], 30, temperature=0.8, seed=1)
    both(bundled, ["Tom had"], 30, temperature=0.8, seed=1)
    told = capsys.readouterr().err
    assert told.count("note: steps are not replayed as one CUDA graph: operation not permitted") == 1 and "and more" not in told
    assert len(tried) == 1


def test_a_graph_that_fails_late_does_not_end_the_text(bundled, monkeypatch):
    """No memory for the second one, say."""
    made = []

    def record(run, generators):
        made.append(run)
        if len(made) > 1:
            raise RuntimeError("out of memory")
        return partial(run, graphs.BLOCK)
    monkeypatch.setattr(graphs, "record", record)
    both(bundled, ["Once upon a time"], 300, temperature=0.8, seed=1, ignore_eos=True)
    assert len(made) == 2


def test_a_step_that_asks_the_host_is_not_recorded(bundled, made, capsys):
    """Such as one whose next operation depends on a number."""
    def asks(model, tokens, *rest):
        return g.decode(model, tokens, *rest) * (2 if tokens.sum().item() < 0 else 1)
    steps = g.Steps(decode=asks, blocks=partial(graphs.decode_blocks, asks))
    plain, blocks = (g.generate(*bundled, ["Tom had"], max_new_tokens=20, steps=s, temperature=0)[0] for s in (PLAIN, steps))
    assert plain.ids == blocks.ids and not made
    assert "note: steps are not replayed as one CUDA graph: the host asked for a number" in capsys.readouterr().err


def test_a_mixture_that_asks_the_host_is_not_recorded():
    model = Transformer(ModelArgs(50, 32, 1, 2, n_experts=4, active_experts=2)).eval()
    assert not graphs.replayable(model, 1)
    for layer in experts.layers(model):
        layer.run = experts.Gathered(layer)
    assert graphs.replayable(model, 4) and not graphs.replayable(model, 5)
    assert graphs.replayable(Transformer(ModelArgs(50, 32, 1, 2)), 32)


def test_blocks_are_for_models_on_a_gpu(bundled, monkeypatch):
    """A model on the CPU of a machine with a GPU runs step by step."""
    monkeypatch.undo()
    assert g.REPLAYED == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = g.compile_steps()
    assert steps.blocks.func is graphs.decode_blocks
    assert g.generate(*bundled, ["Tom"], max_new_tokens=3, steps=steps._replace(decode=g.decode))[0].ids
    monkeypatch.setenv("GPU_BLOCKS", "0")
    assert g.compile_steps().blocks is None


def test_the_warm_up_records_what_the_run_replays(made, capsys):
    """Every number of slots it comes to: nothing is recorded while it is timed."""
    o = cli.parser().parse_args("--temperature 0.5 --seed 3 --compile --ignore_eos".split())
    model, tokenizer = g.load_model(dtype="float32")
    rows = g.rows_for(model, tokenizer, ["Once upon a time"], 290, ignore_eos=True)
    cli.warm_up(o, model, BLOCKS, rows, 300, tokenizer, None)
    recorded = len(made)
    assert recorded == 2
    for _ in g.generate_rows(model, rows, Sampling.of(model, **cli.sampling_flags(o)), steps=BLOCKS):
        pass
    assert len(made) == recorded and len(rows[0].ids) == 290


def test_a_model_is_forgotten_with_its_recordings(made):
    model = Transformer(ModelArgs(50, 32, 1, 2)).eval()
    steps = g.Steps(blocks=partial(graphs.decode_blocks, lambda model, tokens, at, key_pos: torch.zeros(1, 50)))
    model.setup_caches(1, 40)
    sampler = Sampler(Sampling(temperature=0), [[1]], 50, torch.device("cpu"))
    list(g.decode_n_tokens(model, steps, torch.tensor([5]), torch.tensor([1]), 2, 8, sampler))
    assert len(graphs.RECORDINGS) == 1
    del model
    gc.collect()
    assert len(graphs.RECORDINGS) == 0


@pytest.mark.parametrize("rope", [RopeArgs(kind="dynamic", scaling={"factor": 2.0}), RopeArgs(
    kind="longrope", scaling={"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 30})])
def test_what_follows_a_rope_that_changes_with_length(made, rope):
    """Its frequencies are among what a recording looks at."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(50, 32, 2, 2, max_position=16, ropes=[rope])).eval()

    @torch.no_grad()
    def answer(steps, length):
        g.make_room(model, 1, length + 24)
        prompt = [i % 50 for i in range(length)]
        sampler = Sampler(Sampling(temperature=0), [prompt], 50, torch.device("cpu"))
        tokens = sampler(g.run_prefill(model, PLAIN, [prompt]))
        ids = list(g.decode_n_tokens(model, steps, tokens, torch.tensor([length]), length + 1, 24, sampler))
        return torch.cat([i.view(1, -1) for i in ids], 1)
    for length in (4, 20, 90, 5):
        assert torch.equal(answer(PLAIN, length), answer(BLOCKS, length))
    assert len(made) == 1
