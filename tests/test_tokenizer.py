"""tokenizer.py against stored ids, against `tokenizers` and transformers, and against itself.

TOKENIZER=<folder or tokenizer.json> adds that tokenizer to the comparison with `tokenizers`.
"""
import base64
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

import tokenizer as module
from tokenizer import load_tokenizer

DATA = Path(__file__).resolve().parent / "data"
BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints" / "stories"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data, which is absent")
ALPHABET = [*" \t\n\r\u00a0\u3000\u200b\u2028\u0085\ufeff\x1c'’0123456789٣𝟗ſ½²aAbéßñ\u0301\u0302x_-.,!?<>|▁",
            *"中文字日本한국😀", "👩\u200d👧\u200d👦", "def f(x):\n    return x\n", "'ll", "'S", " hello", "World",
            "\r\n", "  ", "\n\n"]
SENTENCES = [pair[0] for name in ("byte_level", "sentencepiece_style")
             for pair in json.loads((DATA / name / "vectors.json").read_text(encoding="utf-8"))]


def strings(added: list[str], n: int, seed: int = 0):
    """Text of the kinds that break tokenizers: odd spaces, scripts, joiners, code, added tokens anywhere."""
    rnd = random.Random(seed)
    for _ in range(n):
        kind = rnd.randrange(4)
        if kind == 0:
            yield "".join(rnd.choice(ALPHABET) for _ in range(rnd.randrange(1, 40)))
        elif kind == 1:
            ranges = [(32, 0x250), (0x250, 0xD7FF), (0x1F300, 0x1F700)]
            yield "".join(chr(rnd.randrange(*rnd.choice(ranges))) for _ in range(rnd.randrange(1, 20)))
        elif kind == 2:
            choices = [*added, *ALPHABET, "  ", " ", "\n"]
            yield "".join(rnd.choice([rnd.choice(added or [""]), rnd.choice(choices)])
                          for _ in range(rnd.randrange(1, 12)))
        else:
            yield rnd.choice(SENTENCES) + rnd.choice(["", " ", "\n"]) + rnd.choice(SENTENCES)


def assert_same(ours, reference, texts, decoding: bool = True):
    """Equal ids and equal text for `tokenizers`. Bytes that are no UTF-8 may become more or fewer U+FFFD."""
    for text in texts:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False) == ids, repr(text)
        for skip in (True, False) if decoding else ():
            decoded = reference.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special=skip) == decoded or "\ufffd" in decoded, repr(text)


# ---- stored ids, and the variants of tokenizer.json --------------------------------------------------------

@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_style"])
def test_stored_ids(name):
    """Any change of ids or of decoded text, where `tokenizers` is not installed."""
    t = load_tokenizer(DATA / name)
    vectors = json.loads((DATA / name / "vectors.json").read_text(encoding="utf-8"))
    assert len(vectors) == 200
    for text, ids, decoded in vectors:
        assert t.encode(text) == ids, repr(text)
        assert t.decode(ids) == decoded, repr(text)


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def byte_level(prefix: bool = False, regex: bool = False) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def metaspace(scheme: str, cut: bool) -> dict:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": cut}


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
DEEPSEEK = [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"),
            split(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                  r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), byte_level()]
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DIGITS = {"type": "Digits", "individual_digits": True}
PREPEND = {"type": "Prepend", "prepend": "▁"}
FEWER_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
NO_STRIP = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]
VARIANTS = {        # name: (fixture, normalizers, pre-tokenizers, changes of the model, decoders or None)
    "gpt2": ("byte_level", [], [byte_level(regex=True)], {}, None),
    "gpt2 with a space before": ("byte_level", [], [byte_level(prefix=True, regex=True)], {}, None),
    "no words": ("byte_level", [], [byte_level()], {}, None),
    "starcoder": ("byte_level", [], [DIGITS, byte_level(regex=True)], {}, None),
    "space before every digit": ("byte_level", [], [DIGITS, byte_level(prefix=True, regex=True)], {}, None),
    "deepseek": ("byte_level", [], DEEPSEEK, {}, None),
    "only the matches": ("byte_level", [], [split(r"\p{L}+|\s", "Removed", True), byte_level()], {}, None),
    "without the matches": ("byte_level", [], [split(r"\s", "Removed"), byte_level()], {}, None),
    "whole words first": ("byte_level", [{"type": "NFC"}], [split(module.QWEN_SPLIT), byte_level()],
                          {"ignore_merges": True}, None),
    "metaspace first": ("sentencepiece_style", [], [metaspace("first", False)], {}, None),
    "metaspace always": ("sentencepiece_style", [], [metaspace("always", True)], {}, None),
    "metaspace never": ("sentencepiece_style", [], [metaspace("never", True)], {}, NO_STRIP),
    "gemma": ("sentencepiece_style", [SPACES], [split(" ", "MergedWithPrevious")], {}, NO_STRIP),
    "gemma's split alone": ("sentencepiece_style", [], [split(" ", "MergedWithPrevious")], {}, NO_STRIP),
    "nfkc": ("sentencepiece_style", [{"type": "NFKC"}, PREPEND, SPACES], [], {}, None),
    "runs of spaces": ("sentencepiece_style", [FEWER_SPACES, SPACES], [], {}, NO_STRIP),
    "unknown characters": ("sentencepiece_style", [SPACES], [], {"byte_fallback": False}, None),
    "unknown ones apart": ("sentencepiece_style", [SPACES], [], {"byte_fallback": False, "fuse_unk": False},
                           None),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_step_of_a_tokenizer_json(name, tmp_path):
    """A normalizer, pre-tokenizer or decoder that differs from `tokenizers`: the dummy space, nested splits,
    gaps between matches, unknown characters, added tokens that touch letters or eat spaces."""
    tokenizers = pytest.importorskip("tokenizers")
    fixture, normalizers, pre_tokenizers, model, decoders = VARIANTS[name]
    data = json.loads((DATA / fixture / "tokenizer.json").read_text(encoding="utf-8"))
    data["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None
    data["model"] |= model
    data["decoder"] = {"type": "Sequence", "decoders": decoders} if decoders else data["decoder"]
    first = 1 + data["added_tokens"][-1]["id"]
    data["added_tokens"] += [FLAGS | {"id": first, "content": "word", "single_word": True},
                             FLAGS | {"id": first + 1, "content": "<both>", "lstrip": True, "rstrip": True},
                             FLAGS | {"id": first + 2, "content": "<m", "normalized": True}]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    ours, reference = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    # `tokenizers` decodes a normalized token to its normalized form: no reason to follow
    assert_same(ours, reference, strings(list(ours.added), 600), decoding=False)
    data["added_tokens"].pop()
    path.write_text(json.dumps(data), encoding="utf-8")
    ours = load_tokenizer(path)
    assert_same(ours, tokenizers.Tokenizer.from_file(str(path)), strings(list(ours.added), 300, seed=1))


@pytest.mark.skipif("TOKENIZER" not in os.environ, reason="set TOKENIZER to a tokenizer.json or its folder")
def test_a_given_tokenizer():
    """Whatever is special in a tokenizer that somebody uses."""
    tokenizers = pytest.importorskip("tokenizers")
    path = Path(os.environ["TOKENIZER"])
    ours = load_tokenizer(path)
    reference = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    assert_same(ours, reference, strings(list(ours.added)[:50], 6000))


# ---- a small byte-level tokenizer made here ----------------------------------------------------------------

def byte_level_json(folder: Path, regex: str | None = None) -> Path:
    """A tokenizer.json with all 256 bytes, merges whose ids do not follow their ranks, and added tokens."""
    letters = {byte: char for char, byte in module.byte_alphabet().items()}
    vocab = {letters[b]: b for b in range(256)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (letters[32], "hello"), ("w", "o"),
              ("wo", "r")]
    for n, (a, b) in enumerate(merges):
        vocab[a + b] = 255 + len(merges) - n
    added = [{"id": 263, "content": "<s>", "special": True}, {"id": 264, "content": "<think>"},
             {"id": 265, "content": "<|end|>", "rstrip": True, "special": True},
             {"id": 266, "content": "<mask>", "lstrip": True, "special": True}]
    steps = [split(regex or module.QWEN_SPLIT), byte_level()]
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [FLAGS | t for t in added],
            "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": None,
            "decoder": byte_level(),
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": True, "vocab": vocab, "merges": [list(m) for m in merges]}}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def test_stored_ids_of_the_small_tokenizer(tmp_path):
    """Ids written down once by hand: merge order, ids out of order, added tokens that eat spaces, NFC."""
    t = load_tokenizer(byte_level_json(tmp_path))
    assert t.encode("hello hello") == [259, 258]
    assert t.encode("he<s>llo") == [262, 263, 261, 111]
    assert t.encode("o <|end|> \n o<mask>") == [111, 32, 265, 111, 266]
    assert t.encode("e\u0301") == list("é".encode())
    assert t.encode("<s>", special=False) == [60, 115, 62]
    assert t.encode("o  <mask>") == [111, 266]


@pytest.mark.parametrize("regex", [module.QWEN_SPLIT, module.LLAMA3_SPLIT, module.GPT2_SPLIT])
def test_small_tokenizer_against_tokenizers(tmp_path, regex):
    """A split pattern or an added token that differs from the reference on some odd space or script."""
    tokenizers = pytest.importorskip("tokenizers")
    path = byte_level_json(tmp_path, regex)
    reference, ours = tokenizers.Tokenizer.from_file(str(path)), load_tokenizer(path)
    assert_same(ours, reference, strings(list(ours.added), 1500))


# ---- real files --------------------------------------------------------------------------------------------

@needs_shared
@pytest.mark.parametrize("vectors, files", [("llama-spm", "llama-2/tokenizer.model"),
                                            ("llama-spm", "llama-2"), ("llama-bpe", "llama-3"),
                                            ("qwen2", "qwen2"), ("gpt-2", "gpt2")])
def test_llama_cpp_vectors(vectors, files):
    """Any id that differs from what the model was trained with."""
    t = load_tokenizer(SHARED / "tokenizers" / files)
    folder = SHARED / "reference" / "tokenizer_vectors"
    texts = (folder / f"ggml-vocab-{vectors}.gguf.inp").read_text(encoding="utf-8")
    texts = texts.split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{vectors}.gguf.out").read_text().split("\n")
    for text, line in zip(texts, lines):
        assert t.encode(text, bos=False) == [int(i) for i in line.split()], repr(text)


@needs_shared
@pytest.mark.parametrize("files", ["llama-2/tokenizer.json", "mistral-v3/tokenizer.json",
                                   "phi-3/tokenizer.json", "torchtune_assets/tiny_bpe_tokenizer.json"])
def test_real_json_against_tokenizers(files):
    """The dummy space before and after added tokens, and byte fallback."""
    tokenizers = pytest.importorskip("tokenizers")
    path = SHARED / "tokenizers" / files
    reference, ours = tokenizers.Tokenizer.from_file(str(path)), load_tokenizer(path)
    naughty = json.loads((SHARED / "text" / "torture" / "blns.json").read_text(encoding="utf-8"))
    assert_same(ours, reference, [*naughty, *strings(list(ours.added)[:20], 1500)])


@needs_shared
@pytest.mark.parametrize("files, count", [("llama-2", 341468), ("llama-2/tokenizer.model", 341468),
                                          ("llama-3", 289076), ("mistral-v1", 334660),
                                          ("qwen2", 299078), ("gpt2", 287644)])
def test_token_counts_of_wikitext(files, count):
    """A rare piece of ordinary text cut differently: the counts that perplexity papers are made of."""
    lines = (SHARED / "text" / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8").split("\n")
    text = "\n\n".join(line + "\n" if line.strip() else "" for line in lines[:-1])
    t = load_tokenizer(SHARED / "tokenizers" / files)
    ids = t.encode(text, bos=False)
    assert len(ids) == count
    assert t.decode(ids) == text


@needs_shared
def test_sentencepiece_model_against_transformers():
    """The dummy space after an added token where only tokenizer.model is there: none, unless the config says
    legacy. (transformers eats a leading space that sentencepiece keeps: no text begins with one here.)"""
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "tokenizers" / "llama-2"
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder / "tokenizer.model")
    assert "LlamaTokenizer" in type(reference).__name__
    for text in strings(["<s>", "</s>"], 800):
        text = text.replace("<s>", "</s>").lstrip(" ▁")
        if text:
            assert ours.encode(text) == reference.encode(text), repr(text)


@needs_shared
@pytest.mark.parametrize("model", ["llama-2/tokenizer.model", "mistral-v1/tokenizer.model"])
def test_sentencepiece_model_against_sentencepiece(model):
    """Plain text, begin-of-text and decoding as the package itself has them."""
    import sentencepiece
    path = SHARED / "tokenizers" / model
    reference, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    for text in strings([], 500):
        ids = reference.encode(text)
        assert ours.encode(text, special=False) == [reference.bos_id(), *ids], repr(text)
        assert ours.decode(ids) == reference.decode(ids), repr(text)


@needs_shared
def test_qwen_files_against_transformers(tmp_path):
    """vocab.json + merges.txt with added tokens from tokenizer_config.json only."""
    transformers = pytest.importorskip("transformers")
    for file in (SHARED / "tokenizers" / "qwen2").iterdir():
        (tmp_path / file.name).symlink_to(file)
    reference, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in strings(list(ours.added), 1000):
        assert ours.encode(text) == reference.encode(text), repr(text)


@needs_shared
def test_llama2c_file_equals_its_sentencepiece_model():
    """tok512.bin read with another merge order than the model it was made from."""
    folder = SHARED / "weights" / "stories260K"
    a, b = load_tokenizer(folder / "tok512.bin"), load_tokenizer(folder / "tok512.model")
    for text in ["Once upon a time", "Lily's dog\nran", "日本 é", ""]:
        assert a.encode(text) == b.encode(text), repr(text)
        assert a.decode(a.encode(text)) == b.decode(b.encode(text))


@needs_shared
@pytest.mark.parametrize("name, end", [("Llama-3-8B-Lexi", "<|eot_id|>"), ("Qwen3-1.7B", "<|im_end|>"),
                                       ("Phi-3-mini-merge", "<|end|>"), ("Mistral-7B-Instruct-v0.3", "</s>"),
                                       ("gemma-2-2b", "<end_of_turn>"), ("gemma-3-4b-text", "<end_of_turn>")])
def test_turn_ends_of_real_templates(name, end, tmp_path):
    """An answer that runs on into the user's next turn, because the config's end id is not the template's."""
    config = json.loads((SHARED / "configs" / name / "tokenizer_config.json").read_text(encoding="utf-8"))
    data = json.loads((DATA / "byte_level" / "tokenizer.json").read_text(encoding="utf-8"))
    listed = config["added_tokens_decoder"].items()
    data["added_tokens"] += [FLAGS | t | {"id": int(i) + 1000} for i, t in listed]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    t = load_tokenizer(tmp_path)
    assert t.turn_end_ids() == {t.token_id(end)}


@needs_shared
@pytest.mark.parametrize("template", sorted(p.name for p in (SHARED / "chat_templates").glob("*.jinja"))
                         if SHARED.exists() else [])
def test_chat_templates_render_as_transformers_does(template, tmp_path, monkeypatch):
    """A missing filter, a global or a white-space rule of the environment."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (SHARED / "chat_templates" / template).read_text(encoding="utf-8")
    byte_level_json(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|end|>"}))
    t = load_tokenizer(tmp_path)

    class Frozen(module.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)
    monkeypatch.setattr(module, "datetime", Frozen)
    monkeypatch.setattr(utils, "datetime", Frozen)
    user, answer = {"role": "user", "content": "Hi <b>&"}, {"role": "assistant", "content": "Hello é"}
    thought = answer | {"reasoning_content": "Let me think."}
    for messages in ([user], [user, answer, user], [{"role": "system", "content": "Be brief."}, user],
                     [user, thought, user], [user, answer | {"thinking": "Hm."}]):
        outcome = []
        tokens = {"bos_token": "<s>", "eos_token": "<|end|>"}
        for render in (lambda: utils.render_jinja_template([messages], chat_template=source,
                                                           add_generation_prompt=True, **tokens)[0][0],
                       lambda: t.render_chat(messages)):
            try:
                outcome.append(render())
            except Exception as error:              # templates may refuse a system message: then both must
                outcome.append(str(error).removeprefix("the chat template refuses: "))
        assert outcome[0] == outcome[1]


# ---- rules -------------------------------------------------------------------------------------------------

def test_pieces_joined_are_the_whole(tmp_path):
    """Half a character shown, or bytes lost, when ids come one by one; ids beyond the vocabulary."""
    t = load_tokenizer(byte_level_json(tmp_path))
    rnd = random.Random(1)
    for _ in range(300):
        ids = [rnd.randrange(0, 320) for _ in range(rnd.randrange(1, 30))]
        stream = t.detokenizer()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == t.decode(ids)
    emoji = list("😀".encode())
    stream = t.detokenizer()
    assert [stream.push(i) for i in emoji] == ["", "", "", "😀"]
    assert t.decode([10 ** 6, 104, -1]) == "h"


@needs_shared
def test_leading_space_of_a_continuation():
    """sentencepiece drops a text's first space; a continuation of a prompt must keep it."""
    t = load_tokenizer(SHARED / "weights" / "stories260K" / "tok512.model")
    whole = t.encode("Once upon a time there was")
    assert t.decode(whole) == "Once upon a time there was"
    for cut in range(1, len(whole)):
        stream = t.detokenizer(whole[:cut])
        new = "".join(map(stream.push, whole[cut:])) + stream.flush()
        assert t.decode(whole[:cut]) + new == t.decode(whole)


CHATML = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_chat_ids_have_one_bos(tmp_path):
    """The doubled begin-of-text token: once from the template, once from the tokenizer."""
    byte_level_json(tmp_path)
    config = {"bos_token": "<s>", "eos_token": "<|end|>", "add_bos_token": True, "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    t = load_tokenizer(tmp_path)
    assert t.encode("he") == [263, 262]
    assert t.encode_chat([{"role": "user", "content": "he"}]).count(263) == 1
    assert t.turn_end_ids() == {265} and t.eos_ids == {265}


def test_template_errors_are_sentences(tmp_path):
    """A traceback where a template says why it refuses."""
    byte_level_json(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match="System role not supported"):
        load_tokenizer(tmp_path).render_chat([{"role": "system", "content": "x"}])


def test_wrong_and_missing_files(tmp_path):
    """KeyErrors and tracebacks for files that users do have."""
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{ not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ValueError, match="Unigram"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path)
    path.unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01 nothing of the kind")
    with pytest.raises(ValueError, match="sentencepiece"):
        load_tokenizer(tmp_path)


def fixture_with(**changes) -> str:
    data = json.loads((DATA / "byte_level" / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps(data | changes)


WORDS = {"model": {"type": "WordPiece", "vocab": {}}}
DAMAGED = {         # name: (files, what the sentence has to name)
    "html": ({"tokenizer.json": "<html>"}, "tokenizer.json' is not valid JSON"),
    "cut short": ({"tokenizer.json": fixture_with()[:3000]}, "tokenizer.json' is not valid JSON"),
    "a list": ({"tokenizer.json": "[]"}, "tokenizer.json' holds a JSON list"),
    "nothing in it": ({"tokenizer.json": "{}"}, "tokenizer.json' is neither"),
    "word piece": ({"tokenizer.json": json.dumps(WORDS)}, "WordPiece"),
    "no vocabulary": ({"tokenizer.json": '{"model": {"merges": []}}'}, "'vocab' is missing"),
    "bad merges": ({"tokenizer.json": fixture_with(model={"vocab": {}, "merges": [3]})}, "json' is damaged"),
    "pre-tokenizer": ({"tokenizer.json": fixture_with(pre_tokenizer={"type": "Whitespace"})}, "Whitespace"),
    "normalizer": ({"tokenizer.json": fixture_with(normalizer={"type": "Precompiled"})}, "Precompiled"),
    "pattern": ({"tokenizer.json": fixture_with(pre_tokenizer=split("(["))}, "not understood"),
    "config": ({"tokenizer.json": fixture_with(), "tokenizer_config.json": "{"}, "config.json' is not"),
    "empty model": ({"tokenizer.model": ""}, "tokenizer.model' is no sentencepiece model"),
    "ranks": ({"tokenizer.model": "IQ== 0\nIg== 1\nIw"}, "tokenizer.model' has a line"),
    "vocabulary": ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "vocab.json' is neither"),
    "tekken": ({"tekken.json": '{"config": {}}'}, "tekken.json' is damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(name, tmp_path):
    """A KeyError, or a sentence that does not say which file to fetch again."""
    files, message = DAMAGED[name]
    for file, content in files.items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and "Error" not in str(error.value)


@pytest.mark.parametrize("keep", [1, 0.5, 0.99])
def test_truncated_sentencepiece_model(keep, tmp_path):
    """Garbage from a download that stopped."""
    whole = (BUNDLED / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[:int(keep * len(whole)) - 1])
    with pytest.raises(ValueError, match="tokenizer.model' is no sentencepiece model, or it is cut short"):
        load_tokenizer(tmp_path)


def test_the_other_file_where_a_json_is_not_supported(tmp_path):
    """Refusing a folder for a tokenizer.json of an unknown kind while its tokenizer.model would do."""
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS))
    expected = load_tokenizer(BUNDLED / "tokenizer.model").encode("Once")
    assert load_tokenizer(tmp_path).encode("Once") == expected


@pytest.mark.parametrize("package, folder", [("tiktoken", DATA / "byte_level"),
                                             ("sentencepiece", BUNDLED / "tokenizer.model")])
def test_missing_package_is_a_sentence(package, folder, monkeypatch):
    """A traceback for a package that is not installed."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        load_tokenizer(folder)


# ---- files of other kinds ----------------------------------------------------------------------------------

def test_bundled_model_and_json_agree():
    """The two forms of one tokenizer drifting apart: heap BPE and sentencepiece, prefix, decoding."""
    a, b = load_tokenizer(BUNDLED / "tokenizer.json"), load_tokenizer(BUNDLED / "tokenizer.model")
    for text in strings([], 800):
        assert a.encode(text) == b.encode(text), repr(text)
        assert a.decode(a.encode(text)) == b.decode(a.encode(text)), repr(text)


def test_tiktoken_ranks(tmp_path):
    """Ranks as a merge order, Llama 3's special ids after them, begin-of-text; a name that says nothing."""
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    path = tmp_path / "any.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    t = load_tokenizer(path)
    assert t.encode("hello<|eot_id|>hel") == [260, 259, 269, 256, ord("l")]
    names = ["end_of_text", "reserved_special_token_0", "python_tag", "reserved_special_token_3",
             "reserved_special_token_247"]
    assert [t.token_id(f"<|{name}|>") for name in names] == [261, 262, 270, 271, 515]
    assert t.vocab_size == 516 and t.eos_ids == {261}
    assert t.decode([260, 259, 269, 33]) == "hello!"


def test_tekken(tmp_path):
    """Ids that forget the special ones before them."""
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"beyond the default size"]
    settings = {"pattern": r"\p{L}+|\P{L}+", "default_vocab_size": 1257, "default_num_special_tokens": 1000}
    data = {"config": settings, "vocab": [
        {"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)]}
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    t = load_tokenizer(tmp_path)
    assert t.encode("he</s>!") == [1, 1256, 2, 1033] and t.decode([1, 1256, 2, 1033]) == "he!"


def test_vocab_and_merges_equal_the_json(tmp_path):
    """Another merge order, or the version line of merges.txt read as a merge."""
    data = json.loads((DATA / "byte_level" / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    merges = [" ".join(merge) for merge in data["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    folder = tmp_path / "json"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(data | {
        "added_tokens": [], "normalizer": None, "post_processor": None,
        "pre_tokenizer": byte_level(regex=True)}))
    a, b = load_tokenizer(tmp_path), load_tokenizer(folder)
    for text in strings([], 300):
        assert a.encode(text) == b.encode(text), repr(text)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_style"])
def test_plain_reading_of_added_tokens(name):
    """special=False that still finds control tokens in a user's text; lone surrogates, as argv may hold."""
    t = load_tokenizer(DATA / name)
    ids = t.encode("a<|im_start|>b</s>", bos=False, special=False)
    assert not set(ids) & set(t.added_by_id) and t.decode(ids) == "a<|im_start|>b</s>"
    assert t.decode(t.encode("a\udcffb", bos=False)) == "a\ufffdb"
    assert t.encode("", bos=True) == t.encode("") == [t.bos_id] and t.encode("", bos=False) == []


def test_many_added_tokens_are_found_fast(tmp_path):
    """Thousands of added tokens (Gemma 3 has 6,415) tried one by one at every character: minutes a book."""
    (tmp_path / "tokenizer.json").write_text(fixture_with(added_tokens=[
        FLAGS | {"id": 1000 + i, "content": f"<unused{i}>"} for i in range(6000)]))
    t = load_tokenizer(tmp_path)
    assert len(t.encode("<unused59> <unused5999>" * 20_000, bos=False)) == 60_000
