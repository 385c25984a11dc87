"""The bundled model and its draft: what their cards say is true of the files beside them."""
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from sentencepiece import SentencePieceProcessor

from generate import generate, load_model

FOLDERS = [ROOT / "checkpoints" / "stories", ROOT / "checkpoints" / "stories-draft"]
both = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
TEXTS = ["Once upon a time, there was a little girl named Lily.", "", " two  spaces ", "one line\nand another\n\n",
         'Tom said, "I am 12!"', "a café, a ☃ and a tab\t", "</s>x"]


def params(folder) -> int:
    return (folder / "model.safetensors").stat().st_size // 2           # bfloat16, and a header of a few kilobytes


def test_sizes():
    """A clone must stay small, and a draft that is not much smaller than its model cannot speed it up."""
    model, draft = map(params, FOLDERS)
    assert 2 * model <= 8_000_000
    assert draft < model / 6


@both
def test_transformers_gives_the_same_logits(folder):
    """Would fail if the folder were readable by this repository alone, or if q, k and v were written in a wrong order."""
    transformers = pytest.importorskip("transformers", reason="the reference is not installed")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, _ = load_model(folder, device="cpu", dtype="float32")
    tokens = torch.randint(3, model.args.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), reference(tokens).logits.float(), atol=1e-3, rtol=1e-4)


@both
def test_every_tokenizer_gives_the_same_ids(folder):
    """tokenizer.model and tokenizer.json are two forms of one tokenizer: a wrong merge order would cut words apart."""
    transformers = pytest.importorskip("transformers", reason="the reference is not installed")
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    _, tokenizer = load_model(folder, device="cpu", dtype="float32")
    for text in TEXTS[:-1] + held_out(folder):
        ids = [1] + pieces.encode(text)
        assert fast(text).input_ids == ids
        assert tokenizer.encode(text) == ids
        assert fast.decode(ids, skip_special_tokens=True) == pieces.decode(ids)


def test_the_draft_has_the_same_tokenizer():
    """A draft whose ids mean other words would never be accepted."""
    assert (FOLDERS[0] / "tokenizer.model").read_bytes() == (FOLDERS[1] / "tokenizer.model").read_bytes()


@both
def test_held_out_figure(folder):
    """The card's bits per byte, on the few held-out stories that lie beside it: weights and tokenizer belong together,
    and the card is of this model. Twelve stories are not all of them, hence the margin."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    figure = float(re.search(rf"\| {re.escape(folder.name)} \|[^|]*\| \*\*(\d\.\d+)\*\* \|", card)[1])
    model, _ = load_model(folder, device="cpu", dtype="float32")
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    nats = size = 0
    with torch.inference_mode():
        for story in held_out(folder):
            ids = torch.tensor([[1] + pieces.encode(story)])[:, :model.args.max_position]
            nats += F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
            size += len(pieces.decode(ids[0].tolist()).encode())
    assert nats / math.log(2) / size == pytest.approx(figure, abs=0.08)


@both
def test_configs(folder):
    """What other programs read: without an end token in both files, stories would run on."""
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == 2
    assert config["torch_dtype"] == "bfloat16" and config["tie_word_embeddings"]


def test_stories_end():
    """A story ends by itself: the end token was trained, and generation knows it."""
    model, tokenizer = load_model(FOLDERS[0], device="cpu", dtype="float32")
    rows = generate(model, tokenizer, ["Once upon a time"] * 8, max_new_tokens=480, seed=0)
    assert sum(row.finish_reason == "stop" for row in rows) >= 5


def held_out(folder) -> list[str]:
    return (folder / "held_out.txt").read_text(encoding="utf-8").strip().split("\n<|endoftext|>\n")
