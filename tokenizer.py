"""Text to token ids and back, exactly as the checkpoint's authors had it, and chat templates.

What it is: readers for the tokenizer files that models come with (sentencepiece, tiktoken ranks,
tokenizer.json, vocab.json + merges.txt, tekken.json, llama2.c's tok.bin), told apart by content, and one
`Tokenizer` around them for added tokens, begin-of-text, streaming and chat. What it is not: a trainer, or a
general tokenizer.json interpreter: kinds that generation models do not use (Unigram json, WordPiece) are
refused by name.

Reading order: `Tokenizer`, `StreamDetokenizer`, then the three cores `ByteLevelBPE` (through tiktoken),
`SentencePiece`, `HeapBPE`, then `load_tokenizer` and the files. Next stop: generate.py.

A core has `encode(text, first)`, where `first` says that nothing stands before the text,
`token_bytes(id)`, `pieces` (token -> id), `eos_id`, and `strips_space`: does decoding a whole text drop
one leading space.
"""
import base64
import codecs
import heapq
import json
import re
import struct
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

SPACE = "▁"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
                  7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}


@dataclass
class Added:
    """A token that is found in the text before the core sees it; lstrip and rstrip eat the spaces beside
    it."""
    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


# ---- the tokenizer -----------------------------------------------------------------------------------------

class Tokenizer:
    def __init__(self, core, added: list[Added], config: dict, *, bos: str | None, add_bos: bool,
                 prefix_after_added: bool = False, templates: dict[str, str] | None = None):
        self.core, self.config = core, config
        self.added = {token.content: token for token in added}
        self.added_by_id = {token.id: token for token in added}
        self.prefix_after_added = prefix_after_added
        self.add_bos = add_bos
        self.bos_id = self.token_id(text_of(config.get("bos_token")) or bos or "")
        eos = text_of(config.get("eos_token"))
        self.eos_ids = {i for i in (self.token_id(eos) if eos else core.eos_id,) if i is not None}
        self.chat_template = (templates or {}).get("default")
        self.vocab_size = 1 + max([*core.pieces.values(), *self.added_by_id], default=-1)
        longest_first = sorted(self.added, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def token_id(self, token: str) -> int | None:
        return self.added[token].id if token in self.added else self.core.pieces.get(token)

    def encode(self, text: str, *, bos: bool | None = None, special: bool = True) -> list[int]:
        """Ids of a text. bos None: as the tokenizer's files say. special False: added tokens in it are
        plain text."""
        ids = [self.bos_id] if (self.add_bos if bos is None else bos) and self.bos_id is not None else []
        at, after_added = 0, False
        matches = list(self.pattern.finditer(text)) if special and self.pattern else []
        for match in [*matches, None]:
            token = self.added[match.group()] if match else None
            plain = text[at:match.start() if match else len(text)]
            plain = plain.rstrip() if token and token.lstrip else plain
            if plain:
                ids += self.core.encode(plain, not after_added or self.prefix_after_added)
            if token:
                ids.append(token.id)
                at, after_added = match.end(), True
                if token.rstrip:
                    at += len(text[at:]) - len(text[at:].lstrip())
        return ids

    def decode(self, ids, *, skip_special: bool = True) -> str:
        detokenizer = self.detokenizer(skip_special=skip_special)
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def detokenizer(self, prompt_ids=(), *, skip_special: bool = True) -> "StreamDetokenizer":
        return StreamDetokenizer(self, prompt_ids, skip_special)

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """What an id adds to the text: nothing for special tokens and for ids beyond the vocabulary."""
        if token in self.added_by_id:
            added = self.added_by_id[token]
            return b"" if added.special and skip_special else added.content.encode()
        return self.core.token_bytes(token)

    def render_chat(self, messages: list[dict], *, add_generation_prompt: bool = True, **arguments) -> str:
        """Messages {role, content} through the chat template. ValueError with the template's own
        complaint."""
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; give the prompt as plain text")
        import jinja2
        special = {name: text_of(self.config.get(name))
                   for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        variables = {"messages": messages, "tools": None, "documents": None,
                     "add_generation_prompt": add_generation_prompt, **{k: v for k, v in special.items() if v}}
        try:
            return template_environment().from_string(self.chat_template).render(**(variables | arguments))
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses: {error}") from None

    def encode_chat(self, messages: list[dict], **arguments) -> list[int]:
        """Ids of a rendered conversation. The template writes the begin-of-text token, so none is added."""
        return self.encode(self.render_chat(messages, **arguments), bos=False)

    def turn_end_ids(self) -> set[int]:
        """The token that the template writes after an assistant's message, where there is one."""
        mark = "ANSWER"
        try:
            text = self.render_chat([{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": mark}],
                                    add_generation_prompt=False)
            tail = text[text.rindex(mark) + len(mark):].lstrip()
        except ValueError:
            return set()
        match = self.pattern.match(tail) if self.pattern else None
        return {self.added[match.group()].id} if match else set()


class StreamDetokenizer:
    """Ids in, text out as soon as it is certain: never half a character. After a prompt ids, what follows
    it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids=(), skip_special: bool = True):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.at_start = tokenizer.core.strips_space
        for token in prompt_ids:
            self.push(token)

    def push(self, token: int) -> str:
        data = self.tokenizer.token_bytes(token, self.skip_special)
        if self.at_start and data:
            data, self.at_start = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def flush(self) -> str:
        """What is left of a character that was cut off, as U+FFFD."""
        return self.utf8.decode(b"", final=True)


# ---- chat templates ----------------------------------------------------------------------------------------

def template_environment():
    """Jinja as transformers sets it up, sandboxed: a template is a program somebody else wrote."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):  # {% generation %} marks the assistant's part; it changes no text
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

        def body(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def read_templates(folder: Path, config: dict) -> dict[str, str]:
    templates = config.get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list):
        templates = {t["name"]: t["template"] for t in templates}
    if (folder / "chat_template.jinja").exists():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif "default" not in templates and (folder / "chat_template.json").exists():
        templates["default"] = read_json(folder / "chat_template.json").get("chat_template")
    return templates


# ---- byte-level BPE, through tiktoken ----------------------------------------------------------------------

def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, character -> byte: printable ones are themselves, the rest
    from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class ByteLevelBPE:
    """Ids by bytes and a split pattern. `outer` patterns cut the text before the last one, which tiktoken
    applies."""
    strips_space = False
    eos_id = None

    def __init__(self, ids: dict[bytes, int], split: str, *, merges: list[tuple[bytes, bytes]] | None = None,
                 outer=(), nfc: bool = False, prefix_space: bool = False):
        import tiktoken
        self.bytes_of = {i: data for data, i in ids.items()}
        self.pieces = {data.decode("utf-8", "replace"): i for data, i in ids.items()}
        ranks, self.renumber = ids, None
        if merges is not None:          # an id need not grow with its merge's rank: rank by merge, renumber afterwards
            order = dict.fromkeys(bytes([b]) for b in range(256))
            order |= dict.fromkeys(a + b for a, b in merges)
            order |= dict.fromkeys(ids)
            ranks = {data: rank for rank, data in enumerate(order)}
            self.renumber = [ids.get(data) for data in order]
        self.encoding = tiktoken.Encoding("model", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        self.outer, self.nfc, self.prefix_space = list(outer), nfc, prefix_space

    def encode(self, text: str, first: bool) -> list[int]:
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.prefix_space and not text.startswith(" "):
            text = " " + text
        parts = [text]
        for pattern in self.outer:
            parts = [piece for part in parts for piece in split_isolated(pattern, part)]
        ids = [i for part in parts for i in self.encoding.encode_ordinary(part)]
        return ids if self.renumber is None else [n for n in (self.renumber[i] for i in ids) if n is not None]

    def token_bytes(self, token: int) -> bytes:
        return self.bytes_of.get(token, b"")


def split_isolated(pattern, text: str) -> list[str]:
    """Cut a text at every match, keeping the matches as pieces of their own."""
    pieces, at = [], 0
    for match in pattern.finditer(text):
        pieces += [text[at:match.start()], match.group()]
        at = match.end()
    return [piece for piece in [*pieces, text[at:]] if piece]


def byte_level_from_json(data: dict, path: Path) -> ByteLevelBPE:
    import regex
    alphabet = byte_alphabet()

    def to_bytes(token: str) -> bytes:
        return bytes(alphabet[c] for c in token)

    added = {token["content"] for token in data.get("added_tokens", [])}
    ids = {to_bytes(token): i for token, i in data["model"]["vocab"].items()
           if token not in added and all(c in alphabet for c in token)}
    merges = [tuple(map(to_bytes, m.split(" ") if isinstance(m, str) else m)) for m in data["model"]["merges"]]
    splits, prefix_space = [], False
    for step in flatten(data.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "Split":
            pattern = step["pattern"]
            splits.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
        elif kind == "Digits":
            splits.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel":
            prefix_space = prefix_space or step.get("add_prefix_space", False)
            if step.get("use_regex", True):
                splits.append(GPT2_SPLIT)
        else:
            raise ValueError(f"'{path}' has a pre-tokenizer of type {kind}, which is not supported")
    everything = r"(?s:.+)"
    last = splits.pop() if splits and covers(splits[-1]) else everything
    nfc = any(step["type"] == "NFC" for step in flatten(data.get("normalizer"), "normalizers"))
    return ByteLevelBPE(ids, last, merges=merges, outer=[regex.compile(s) for s in splits], nfc=nfc,
                        prefix_space=prefix_space)


def covers(pattern: str) -> bool:
    """Does a split pattern match everything? tiktoken drops what lies between matches, so that it has to."""
    return r"\s+" in pattern and "[^" in pattern


def flatten(step: dict | None, key: str) -> list[dict]:
    if step is None:
        return []
    return [inner for part in step[key] for inner in flatten(part, key)] if step["type"] == "Sequence" else [step]


# ---- sentencepiece -----------------------------------------------------------------------------------------

class SentencePiece:
    def __init__(self, path: Path):
        import sentencepiece
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"'{path}' is no sentencepiece model, or it is damaged; fetch it again") from None
        size = self.model.get_piece_size()
        self.names = [self.model.id_to_piece(i) for i in range(size)]
        self.pieces = {name: i for i, name in enumerate(self.names)}
        self.control = {i for i in range(size) if self.model.is_control(i) or self.model.is_unused(i)}
        self.byte = {i: int(self.names[i][3:5], 16) for i in range(size) if self.model.is_byte(i)}
        self.eos_id = self.model.eos_id() if self.model.eos_id() >= 0 else None
        self.strips_space = self.model.encode("a", out_type=str)[:1] != ["a"]       # it has a dummy prefix
        self.newline = self.model.encode("\n")

    def encode(self, text: str, first: bool) -> list[int]:
        if first or not self.strips_space:
            return self.model.encode(text)
        return self.model.encode("\n" + text)[len(self.newline):]      # as a text that stands after something

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < len(self.names) or token in self.control:
            return b""
        if token in self.byte:
            return bytes([self.byte[token]])
        return " \u2047 ".encode() if self.model.is_unknown(token) else self.names[token].replace(SPACE, " ").encode()


# ---- sentencepiece-style BPE of a tokenizer.json -----------------------------------------------------------

class HeapBPE:
    """Merges of neighbours, lowest rank first and leftmost among equals; unknown characters become byte
    tokens."""
    eos_id = None

    def __init__(self, pieces: dict[str, int], rank, normalize, pre_split=None, strips_space: bool = True):
        self.pieces, self.rank, self.normalize, self.pre_split = pieces, rank, normalize, pre_split
        self.strips_space = strips_space
        self.names = {i: piece for piece, i in pieces.items()}

    def encode(self, text: str, first: bool) -> list[int]:
        text = self.normalize(text, first)
        parts = self.pre_split(text) if self.pre_split else [text]
        return [i for part in parts for i in self.encode_part(part)]

    def encode_part(self, text: str) -> list[int]:
        n = len(text)
        piece, left, right = list(text), list(range(-1, n - 1)), list(range(1, n + 1))
        heap = []

        def consider(a: int, b: int):
            if 0 <= a and b < n and (rank := self.rank(piece[a], piece[b])) is not None:
                heapq.heappush(heap, (rank, a, piece[a], piece[b]))

        for i in range(n - 1):
            consider(i, i + 1)
        while heap:
            _, a, x, y = heapq.heappop(heap)
            b = right[a]
            if piece[a] != x or b >= n or piece[b] != y:
                continue                        # one of the two has merged with another since
            piece[a], piece[b], right[a] = x + y, "", right[b]
            if right[a] < n:
                left[right[a]] = a
            consider(left[a], a)
            consider(a, right[a])
        return [i for p in piece if p for i in self.piece_ids(p)]

    def piece_ids(self, piece: str) -> list[int]:
        if piece in self.pieces:
            return [self.pieces[piece]]
        ids = [self.pieces.get(f"<0x{byte:02X}>") for byte in piece.encode()]
        return ids if None not in ids else [i for i in (self.pieces.get("<unk>"),) if i is not None]

    def token_bytes(self, token: int) -> bytes:
        piece = self.names.get(token, "")
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


def heap_bpe_from_json(data: dict, path: Path) -> tuple[HeapBPE, bool]:
    """The core, and whether a text after an added token begins with the dummy space too."""
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in data["model"]["merges"]]
    ranks = {pair: i for i, pair in reversed(list(enumerate(pairs)))}
    steps = flatten(data.get("normalizer"), "normalizers")
    scheme, split = "never", False
    for step in flatten(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            split = step.get("split", True)
        elif not (step["type"] == "Split" and step["pattern"].get("String") == " "):    # Gemma's: no space is left
            raise ValueError(f"'{path}' has a pre-tokenizer of type {step['type']}, which is not supported")
    for step in steps:
        if step["type"] not in ("Prepend", "Replace", "NFC", "NFKC"):
            raise ValueError(f"'{path}' has a normalizer of type {step['type']}, which is not supported")

    def normalize(text: str, first: bool) -> str:
        for step in steps:
            if step["type"] == "Prepend":
                text = step["prepend"] + text if text else text
            elif step["type"] == "Replace":
                pattern = step["pattern"]
                text = (re.sub(pattern["Regex"], step["content"], text) if "Regex" in pattern
                        else text.replace(pattern["String"], step["content"]))
            else:
                text = unicodedata.normalize(step["type"], text)
        if scheme != "never":
            text = text.replace(" ", SPACE)
            text = SPACE + text if first and not text.startswith(SPACE) else text
        return text

    prepends = any(step["type"] == "Prepend" for step in steps)
    strips = any(step["type"] == "Strip" or (step["type"] == "Metaspace" and scheme != "never")
                 for step in flatten(data.get("decoder"), "decoders"))
    pre_split = (lambda text: [p for p in re.split(f"(?={SPACE})", text) if p]) if split else None
    core = HeapBPE(data["model"]["vocab"], lambda a, b: ranks.get((a, b)), normalize, pre_split, strips)
    return core, prepends or scheme == "always"


# ---- files -------------------------------------------------------------------------------------------------

def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder, beside a file, or of a tokenizer file itself; told by content. ValueError or
    FileNotFoundError with one sentence."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    candidates = [folder / "tokenizer.json", folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken")),
                  folder / "vocab.json", folder / "tekken.json", *sorted(folder.glob("tok*.model")),
                  *sorted(folder.glob("tok*.bin"))]
    if path.is_file() and (path in candidates or path.suffix in (".json", ".model", ".tiktoken")):
        candidates = [path]
    found = next((c for c in candidates if c.exists()), None)
    if found is None:
        raise FileNotFoundError(f"no tokenizer in '{folder}'; it needs tokenizer.json, tokenizer.model, *.tiktoken, "
                                "vocab.json with merges.txt, tekken.json or tok*.bin beside the weights")
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if (folder / "special_tokens_map.json").exists():
        config = read_json(folder / "special_tokens_map.json") | config
    try:
        return read_tokenizer(found, config, read_templates(folder, config))
    except (KeyError, TypeError, IndexError, struct.error, AttributeError) as error:
        raise ValueError(f"'{found}' is damaged or of an unknown kind ({type(error).__name__}: {error})") from None


def read_tokenizer(path: Path, config: dict, templates: dict) -> Tokenizer:
    if path.name == "vocab.json":
        return vocab_and_merges(path, config, templates)
    if path.suffix == ".bin":
        return llama2c_tokenizer(path, config, templates)
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.lstrip()[:1] == b"{" or path.suffix == ".json":
        data = read_json(path)
        return (json_tokenizer if "model" in data else tekken_tokenizer)(path, data, config, templates)
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", head):
        return tiktoken_tokenizer(path, config, templates)
    return sentencepiece_tokenizer(path, config, templates)


def sentencepiece_tokenizer(path: Path, config: dict, templates: dict) -> Tokenizer:
    core = SentencePiece(path)
    added = added_from_config(path.parent, config)
    known = {token.content for token in added}
    added += [Added(i, core.names[i]) for i in sorted(core.control) if core.names[i] and core.names[i] not in known]
    bos = core.names[core.model.bos_id()] if core.model.bos_id() >= 0 else None
    return Tokenizer(core, added, config, bos=bos, add_bos=config.get("add_bos_token", True) is not False,
                     prefix_after_added=bool(config.get("legacy", False)), templates=templates)


def json_tokenizer(path: Path, data: dict, config: dict, templates: dict) -> Tokenizer:
    kind = data["model"].get("type") or ("BPE" if "merges" in data["model"] else "unknown")
    if kind != "BPE":
        raise ValueError(f"'{path}' is a {kind} tokenizer, which is not supported; BPE ones are")
    added = [Added(t["id"], t["content"], t.get("lstrip", False), t.get("rstrip", False), t.get("special", True))
             for t in data.get("added_tokens", [])]
    steps = flatten(data.get("pre_tokenizer"), "pretokenizers") + flatten(data.get("decoder"), "decoders")
    if any(step["type"] == "ByteLevel" for step in steps):
        core, prefix = byte_level_from_json(data, path), False
    else:
        core, prefix = heap_bpe_from_json(data, path)
    bos = first_special(data.get("post_processor"))
    add_bos = config["add_bos_token"] if config.get("add_bos_token") is not None else bos is not None
    return Tokenizer(core, added, config, bos=bos, add_bos=add_bos, prefix_after_added=prefix, templates=templates)


def first_special(processor: dict | None) -> str | None:
    """The token that a post-processor puts before the text."""
    for step in flatten(processor, "processors"):
        if step["type"] == "TemplateProcessing" and step["single"] and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


def tiktoken_tokenizer(path: Path, config: dict, templates: dict) -> Tokenizer:
    """Llama 3's ranks, with its 256 special ids after them, or Qwen's first ones."""
    ids = {}
    for line in path.read_bytes().splitlines():
        token, _, rank = line.partition(b" ")
        if token:
            ids[base64.b64decode(token)] = int(rank)
    added, bos, n = added_from_config(path.parent, config), None, len(ids)
    if n == 128000:
        names = {i: LLAMA3_SPECIAL.get(i, f"reserved_special_token_{i}") for i in range(256)}
        there = {token.id for token in added}
        added += [Added(n + i, f"<|{name}|>") for i, name in names.items() if n + i not in there]
        bos = "<|begin_of_text|>"
        config = {"eos_token": "<|end_of_text|>", "bos_token": bos} | config
    split = LLAMA3_SPLIT if n == 128000 else QWEN_SPLIT
    return Tokenizer(ByteLevelBPE(ids, split), added, config, bos=bos,
                     add_bos=config.get("add_bos_token", bos is not None), templates=templates)


def vocab_and_merges(path: Path, config: dict, templates: dict) -> Tokenizer:
    """GPT-2's two files; Qwen's classes use their own split pattern and NFC."""
    merges_path = path.with_name("merges.txt")
    if not merges_path.exists():
        raise FileNotFoundError(f"'{path}' needs merges.txt beside it")
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines[lines[0].startswith("#version"):] if line]
    qwen = "Qwen" in config.get("tokenizer_class", "")
    vocab, added, end = read_json(path), added_from_config(path.parent, config), "<|endoftext|>"
    if end in vocab and end not in {token.content for token in added}:
        added.append(Added(vocab[end], end))
    core = byte_level_from_json(
        {"model": {"vocab": vocab, "merges": merges}, "added_tokens": [{"content": t.content} for t in added],
         "pre_tokenizer": {"type": "Split", "pattern": {"Regex": QWEN_SPLIT if qwen else GPT2_SPLIT}},
         "normalizer": {"type": "NFC"} if qwen else None}, path)
    return Tokenizer(core, added, {"eos_token": end} | config, bos=None,
                     add_bos=config.get("add_bos_token", False), templates=templates)


def tekken_tokenizer(path: Path, data: dict, config: dict, templates: dict) -> Tokenizer:
    settings = data["config"]
    shift = settings["default_num_special_tokens"]
    ids = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in
           data["vocab"][:settings["default_vocab_size"] - shift]}
    core = ByteLevelBPE(ids, settings["pattern"])
    core.renumber = [rank + shift for rank in range(len(ids))]
    core.bytes_of = {rank + shift: piece for rank, piece in core.bytes_of.items()}
    core.pieces = {piece: rank + shift for piece, rank in core.pieces.items()}
    special = data.get("special_tokens") or [{"rank": i, "token_str": t} for i, t in enumerate(["<unk>", "<s>", "</s>"])]
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    return Tokenizer(core, [Added(t["rank"], t["token_str"]) for t in special], config, bos="<s>",
                     add_bos=config.get("add_bos_token", True), templates=templates)


def llama2c_tokenizer(path: Path, config: dict, templates: dict) -> Tokenizer:
    """llama2.c's tok.bin: a sentencepiece BPE as (score, piece) pairs; the best score merges first."""
    data = path.read_bytes()
    at, scores, names = 4, [], []
    while at + 8 <= len(data):
        score, length = struct.unpack_from("<fI", data, at)
        names.append(data[at + 8:at + 8 + length].decode("utf-8", "replace"))
        scores.append(score)
        at += 8 + length
    if at != len(data) or len(names) < 259:
        raise ValueError(f"'{path}' is no llama2.c tokenizer, or it is cut short")
    pieces = {name.replace(" ", SPACE): i for i, name in reversed(list(enumerate(names))) if i > 2} | {"<unk>": 0}

    def rank(a: str, b: str) -> float | None:
        made = pieces.get(a + b)
        return None if made is None else -scores[made]

    def normalize(text: str, first: bool) -> str:
        return (SPACE if first else "") + text.replace(" ", SPACE)
    return Tokenizer(HeapBPE(pieces, rank, normalize), [Added(1, "<s>"), Added(2, "</s>")],
                     {"eos_token": "</s>"} | config, bos="<s>", add_bos=True, templates=templates)


def added_from_config(folder: Path, config: dict) -> list[Added]:
    """Added tokens where no tokenizer.json carries them."""
    listed = config.get("added_tokens_decoder") or {}
    added = [Added(int(i), t["content"], t.get("lstrip", False), t.get("rstrip", False), t.get("special", True))
             for i, t in listed.items()]
    if not added and (folder / "added_tokens.json").exists():
        special = {text_of(v) for v in config.values() if isinstance(v, (str, dict))}
        added = [Added(i, text, special=text in special) for text, i in
                 read_json(folder / "added_tokens.json").items()]
    return added


def text_of(token: str | dict | None) -> str | None:
    """A token as configs give it: a string, or a dict that has its content."""
    return token.get("content") if isinstance(token, dict) else token


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}") from None
