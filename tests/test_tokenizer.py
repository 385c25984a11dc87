"""tokenizer.py against stored vectors, against `tokenizers` and transformers, and against itself."""
import json
import random
from pathlib import Path

import pytest

import tokenizer as module
from tokenizer import load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"the data folder {SHARED.name} is not here")
ALPHABET = list(" \t\n\r\u00a0\u3000\u200b\u2028\u0085\ufeff'’0123456789٣𝟗ſ½aAbéßñ中文字日本한국😀\u0301\u0302x_-.,!?<>|") + [
    "👩\u200d👧\u200d👦", "def f(x):\n    return x\n", "'ll", "'S", " hello", "World", "\r\n"]


def strings(added: list[str], n: int, seed: int = 0):
    """Random text of the kinds that break tokenizers: odd spaces, scripts, joiners, code, added tokens anywhere."""
    rnd = random.Random(seed)
    for _ in range(n):
        kind = rnd.randrange(3)
        if kind == 0:
            yield "".join(rnd.choice(ALPHABET) for _ in range(rnd.randrange(1, 40)))
        elif kind == 1:
            ranges = [(32, 0x250), (0x250, 0xD7FF), (0x1F300, 0x1F700)]
            yield "".join(chr(rnd.randrange(*rnd.choice(ranges))) for _ in range(rnd.randrange(1, 20)))
        else:
            choices = [*added, *ALPHABET, "  ", " ", "\n"]
            yield "".join(rnd.choice([rnd.choice(added or [""]), rnd.choice(choices)]) for _ in range(rnd.randrange(1, 12)))


# ---- a small byte-level tokenizer made here --------------------------------------------------------------------

def byte_level_json(folder: Path, split: str | None = None) -> Path:
    """A tokenizer.json with all 256 bytes, some merges whose ids do not follow their ranks, and added tokens."""
    letters = {byte: char for char, byte in module.byte_alphabet().items()}
    vocab = {letters[b]: b for b in range(256)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (letters[32], "hello"), ("w", "o"), ("wo", "r")]
    for n, (a, b) in enumerate(merges):
        vocab[a + b] = 255 + len(merges) - n
    added = [{"id": 263, "content": "<s>", "special": True}, {"id": 264, "content": "<think>", "special": False},
             {"id": 265, "content": "<|end|>", "rstrip": True, "special": True},
             {"id": 266, "content": "<mask>", "lstrip": True, "special": True}]
    keys = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    steps = [{"type": "Split", "pattern": {"Regex": split or module.QWEN_SPLIT}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [keys | t for t in added],
            "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": vocab, "merges": [list(m) for m in merges]}}
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


@pytest.mark.parametrize("split", [module.QWEN_SPLIT, module.LLAMA3_SPLIT, module.GPT2_SPLIT])
def test_small_tokenizer_against_tokenizers(tmp_path, split):
    """A split pattern or an added token that differs from the reference on some odd space or script."""
    tokenizers = pytest.importorskip("tokenizers")
    path = byte_level_json(tmp_path, split)
    reference, ours = tokenizers.Tokenizer.from_file(str(path)), load_tokenizer(path)
    for text in strings(list(ours.added), 1500):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False) == ids, repr(text)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), repr(text)


# ---- real files ------------------------------------------------------------------------------------------------

@needs_shared
@pytest.mark.parametrize("vectors, files", [("llama-spm", "llama-2/tokenizer.model"), ("llama-spm", "llama-2"),
                                            ("llama-bpe", "llama-3"), ("qwen2", "qwen2"), ("gpt-2", "gpt2")])
def test_llama_cpp_vectors(vectors, files):
    """Any id that differs from what the model was trained with."""
    t = load_tokenizer(SHARED / "tokenizers" / files)
    folder = SHARED / "reference" / "tokenizer_vectors"
    texts = (folder / f"ggml-vocab-{vectors}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{vectors}.gguf.out").read_text().split("\n")
    for text, line in zip(texts, lines):
        assert t.encode(text, bos=False) == [int(i) for i in line.split()], repr(text)


@needs_shared
@pytest.mark.parametrize("files", ["llama-2", "mistral-v3", "phi-3"])
def test_real_json_against_tokenizers(files):
    """The dummy space before and after added tokens, and byte fallback."""
    tokenizers = pytest.importorskip("tokenizers")
    path = SHARED / "tokenizers" / files / "tokenizer.json"
    reference, ours = tokenizers.Tokenizer.from_file(str(path)), load_tokenizer(path)
    naughty = json.loads((SHARED / "text" / "torture" / "blns.json").read_text(encoding="utf-8"))
    for text in [*naughty, *strings(list(ours.added)[:20], 1500)]:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False) == ids, repr(text)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), repr(text)


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
    for messages in ([user], [user, answer, user], [{"role": "system", "content": "Be brief."}, user]):
        outcome = []
        for render in (lambda: utils.render_jinja_template([messages], chat_template=source, add_generation_prompt=True,
                                                           bos_token="<s>", eos_token="<|end|>")[0][0],
                       lambda: t.render_chat(messages)):
            try:
                outcome.append(render())
            except Exception as error:                      # templates may refuse a system message: then both must
                outcome.append(str(error).removeprefix("the chat template refuses: "))
        assert outcome[0] == outcome[1]


# ---- rules -----------------------------------------------------------------------------------------------------

def test_pieces_joined_are_the_whole(tmp_path):
    """Half a character shown, or bytes lost, when ids come one by one; ids beyond the vocabulary add nothing."""
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


CHATML = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


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
