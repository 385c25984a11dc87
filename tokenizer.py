"""Text to token ids and back, exactly as the checkpoint's authors had it, and chat templates.

What it is: readers for the tokenizer files that models come with (tokenizer.json, sentencepiece, tiktoken
ranks, vocab.json + merges.txt, tekken.json, llama2.c's tok.bin), told apart by content, and one `Tokenizer`
around them for added tokens, begin-of-text, streaming and chat. What it is not: a trainer, or a reader of
every tokenizer.json: what text generation does not use (Unigram, WordPiece) is refused by name.

Reading order: `Tokenizer`, `AddedFinder`, `StreamDetokenizer`, chat templates; the three cores `ByteLevelBPE`
(through tiktoken), `HeapBPE` and `SentencePiece`; what a tokenizer.json does around the first two; files.
Next stop: generate.py.
"""
import base64
import codecs
import heapq
import importlib
import json
import re
import struct
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

SPACE = "▁"                                                 # sentencepiece's visible space
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
EVERYTHING = r"(?s:.+)"


class TokenizerError(ValueError):
    """One sentence for the user: which file, what is wrong, the way out."""


class Unsupported(TokenizerError):
    """A sound file of a kind that is not read here; another file beside it may do."""


@dataclass
class Added:
    """A token found in the text before the core sees it; lstrip and rstrip eat the spaces beside it."""
    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True            # not shown when decoding
    normalized: bool = False        # looked for after the normalizer, not before it
    single_word: bool = False       # only where no letter or digit touches it


# ---- the tokenizer -----------------------------------------------------------------------------------------

class Tokenizer:
    """Made by `load_tokenizer`. `vocab_size` is the highest id plus one; `bos_id` the begin-of-text id or
    None; `eos_ids` the ends that the tokenizer's own files name; `chat_template` a Jinja source or None."""

    def __init__(self, core: "Core", added: list[Added], config: dict, *, bos: str | None = None,
                 add_bos: bool = False):
        self.core, self.chat_template = core, None
        self.add_bos = config.get("add_bos_token", add_bos)
        self.special = {name: text_of(value) for name, value in config.items()
                        if name.endswith("_token") and text_of(value)}
        if bos:
            self.special.setdefault("bos_token", bos)
        self.added = {token.content: token for token in added}
        for name in (*self.special.values(), *map(text_of, config.get("additional_special_tokens") or [])):
            if name in self.added:
                self.added[name].special = True
            elif name and (i := core.token_id(name)) is not None:
                self.added[name] = Added(i, name)
        self.added_by_id = {token.id: token for token in self.added.values()}
        self.early = AddedFinder({t.content: t for t in self.added.values() if t.special or not t.normalized})
        self.late = AddedFinder({core.normalize(t.content): t for t in self.added.values()
                                 if t.normalized and not t.special})
        self.bos_id = self.token_id(self.special.get("bos_token", ""))
        eos = self.token_id(self.special["eos_token"]) if "eos_token" in self.special else core.eos_id
        self.eos_ids = set() if eos is None else {eos}
        self.vocab_size = max([core.size, *(i + 1 for i in self.added_by_id)])

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its text, None where there is none."""
        return self.added[token].id if token in self.added else self.core.token_id(token)

    def encode(self, text: str, *, bos: bool | None = None, special: bool = True) -> list[int]:
        """Ids of a text. bos None: as the tokenizer's files say. special False: added tokens in it are plain
        text (but what a sentencepiece model calls user-defined stays whole)."""
        ids = [self.bos_id] if (self.add_bos if bos is None else bos) and self.bos_id is not None else []
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")   # lone ones, from argv
        parts = list(self.early.split(text)) if special else [text]
        for n, part in enumerate(parts):
            if isinstance(part, Added):
                ids.append(part.id)
                continue
            plain = self.core.normalize(part)
            for m, piece in enumerate(self.late.split(plain) if special else [plain]):
                ids += [piece.id] if isinstance(piece, Added) else self.core.encode(piece, n == m == 0)
        return ids

    def decode(self, ids, *, skip_special: bool = True) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        detokenizer = self.detokenizer(skip_special=skip_special)
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def detokenizer(self, prompt_ids=(), *, skip_special: bool = True) -> "StreamDetokenizer":
        return StreamDetokenizer(self, prompt_ids, skip_special)

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """What an id adds to the text: nothing for special tokens and for ids beyond the vocabulary."""
        if token in self.added_by_id:
            added = self.added_by_id[token]
            shown = not (added.special and skip_special)
            return added.content.replace(self.core.space, " ").encode() if shown else b""
        return self.core.token_bytes(token)

    def render_chat(self, messages: list[dict], *, add_generation_prompt: bool = True, **arguments) -> str:
        """Messages {role, content} through the chat template. ValueError with the template's complaint."""
        if self.chat_template is None:
            raise TokenizerError("this tokenizer has no chat template; give the prompt as plain text")
        environment = template_environment()
        variables = {"messages": [with_reasoning(m) for m in messages], "tools": None, "documents": None,
                     "add_generation_prompt": add_generation_prompt, **self.special, **arguments}
        try:
            return environment.from_string(self.chat_template).render(**variables)
        except Exception as error:      # a template is somebody else's program: it can raise anything
            raise TokenizerError(f"the chat template refuses: {error}") from None

    def encode_chat(self, messages: list[dict], **arguments) -> list[int]:
        """Ids of a rendered conversation. The template writes the begin-of-text token, so none is added."""
        return self.encode(self.render_chat(messages, **arguments), bos=False)

    def turn_end_ids(self) -> set[int]:
        """The token that the template writes after an assistant's message, empty where there is none."""
        mark = "ANSWER"
        for content in (str, lambda text: [{"type": "text", "text": text}]):    # a few templates want lists
            messages = [{"role": "user", "content": content("QUESTION")},
                        {"role": "assistant", "content": content(mark)}]
            try:
                text = self.render_chat(messages, add_generation_prompt=False)
            except ValueError:
                continue
            _, found, tail = text.rpartition(mark)
            ids = self.encode(tail.lstrip(), bos=False) if found else []
            if ids and ids[0] in self.added_by_id:
                return {ids[0]}
        return set()


class AddedFinder:
    """Cuts text at added tokens: the leftmost first, the longest of those. Gemma 3 has 6,415: a regular
    expression of alternatives would try them all at every character."""
    white = re.compile(f"[{WHITE}]*")

    def __init__(self, tokens: dict[str, Added]):
        self.tokens = {text: token for text, token in tokens.items() if text}
        lengths: dict[str, set[int]] = {}
        for text in self.tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self.lengths = {first: sorted(ns, reverse=True) for first, ns in lengths.items()}
        self.start = re.compile("[" + re.escape("".join(lengths)) + "]") if lengths else None

    def split(self, text: str):
        """Yields str and Added in turn, no empty str."""
        done = at = 0
        while self.start and (match := self.start.search(text, at)):
            begin = match.start()
            spans = (text[begin:begin + n] for n in self.lengths[text[begin]])
            found = next((span for span in spans if span in self.tokens), None)
            if found is None:
                at = begin + 1
                continue
            token, at = self.tokens[found], begin + len(found)
            end = at
            if token.single_word and any(map(in_word, text[begin - 1:begin] + text[end:end + 1])):
                continue
            if token.lstrip:
                begin = done + len(text[done:begin].rstrip(WHITE))
            if token.rstrip:
                end = self.white.match(text, end).end()
            if begin > done:
                yield text[done:begin]
            yield token
            done = end
        if done < len(text):
            yield text[done:]


def in_word(char: str) -> bool:
    kind = unicodedata.category(char)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc")


class StreamDetokenizer:
    """Ids in, text out as soon as it is certain: never half a character. After a prompt's ids, what follows
    it: a continuation keeps its leading space."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids=(), skip_special: bool = True):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.at_start = tokenizer.core.strips_space
        for token in prompt_ids:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that this id completes, often one token's and sometimes none."""
        data = self.tokenizer.token_bytes(token, self.skip_special)
        if self.at_start and data:
            data, self.at_start = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def flush(self) -> str:
        """What is left of a character that was cut off, as U+FFFD."""
        return self.utf8.decode(b"", final=True)


# ---- chat templates ----------------------------------------------------------------------------------------

def with_reasoning(message: dict) -> dict:
    """Reasoning goes by three names; templates read the first or, gpt-oss's, the second."""
    names = [name for name in ("reasoning_content", "thinking", "reasoning") if message.get(name) is not None]
    if not names:
        return message
    return {"thinking": message[names[0]], **message, "reasoning_content": message[names[0]]}


def template_environment():
    """Jinja as transformers sets it up, sandboxed: a template is a program somebody else wrote."""
    jinja2, sandbox, ext = need("jinja2"), need("jinja2.sandbox"), need("jinja2.ext")

    class Generation(ext.Extension):        # {% generation %} marks the assistant's part; it changes no text
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
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson                  # jinja's own escapes HTML
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def read_template(folder: Path, config: dict) -> str | None:
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    templates = config.get("chat_template")
    if templates is None and (folder / "chat_template.json").is_file():
        templates = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    return templates.get("default") if isinstance(templates, dict) else templates


# ---- cores -------------------------------------------------------------------------------------------------

class Core:
    """Text between added tokens to ids. Has `size`, the highest id plus one; `encode(text, first)`, where
    `first` says that nothing stands before the text (some put a space there); `token_bytes(id)`, nothing for
    an id it does not know; `token_id(text)`."""
    space = SPACE                   # what its tokens hold for a space
    strips_space = True             # decoding a whole text drops one leading space
    eos_id: int | None = None

    def normalize(self, text: str) -> str:
        return text


# ---- byte-level BPE, through tiktoken

def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, character -> byte: printable ones are themselves, the rest
    follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class ByteLevelBPE(Core):
    """Merges of bytes. `ids` maps tokens to ids, `order` lists what merges make, first merges first (None:
    the ids are that order), `split` is the pattern that cuts words."""
    space, strips_space = " ", False

    def __init__(self, ids: dict[bytes, int], split: str, order=None):
        tiktoken = need("tiktoken")
        self.ids, self.bytes_of = ids, {i: token for token, i in ids.items()}
        self.size = 1 + max(self.bytes_of, default=-1)
        order = sorted(ids, key=ids.get) if order is None else order
        single = [bytes([b]) for b in range(256)]           # tiktoken needs every one
        order = list(dict.fromkeys([*single, *(token for token in order if token in ids)]))
        self.id_of_rank = [ids.get(token) for token in order]
        self.missing = b"".join(b for b in single if b not in ids)              # small vocabularies lack some
        self.words = compiled(split) if self.missing else None
        try:
            self.encoding = tiktoken.Encoding("model", pat_str=split, special_tokens={}, mergeable_ranks={
                token: rank for rank, token in enumerate(order)})
        except ValueError as error:
            raise Unsupported(f"the pattern {split!r} is not understood ({error})") from None

    def encode(self, text: str, first: bool) -> list[int]:
        if not self.missing:
            return [self.id_of_rank[rank] for rank in self.encoding.encode_ordinary(text)]
        ids = []            # bytes that are no token vanish from a word before its merges, not after them
        for match in self.words.finditer(text):
            if word := match.group().encode().translate(None, self.missing):
                ids += [self.id_of_rank[rank] for rank in self.encoding._encode_single_piece(word)]
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self.bytes_of.get(token, b"")

    def token_id(self, token: str) -> int | None:
        return self.ids.get(token.encode())


def byte_level_from_json(model: dict, split: str, added=()) -> ByteLevelBPE:
    alphabet = str.maketrans({char: chr(byte) for char, byte in byte_alphabet().items()})

    def to_bytes(token: str) -> bytes:
        try:
            return token.translate(alphabet).encode("latin-1")
        except UnicodeEncodeError:              # an added token that the vocabulary lists too
            return token.encode()

    made = [m.replace(" ", "", 1) if isinstance(m, str) else m[0] + m[1] for m in model["merges"]]
    if model.get("ignore_merges"):              # words that no merge makes are found whole
        made += [token for token in model["vocab"] if token not in added]
    ids = {to_bytes(token): i for token, i in model["vocab"].items()}
    return ByteLevelBPE(ids, split, map(to_bytes, dict.fromkeys(made)))


# ---- sentencepiece-style BPE without sentencepiece

class HeapBPE(Core):
    """Merges of neighbours, lowest `rank(a, b)` first and leftmost among equals; characters that are no piece
    become byte tokens, or the unknown token."""

    def __init__(self, pieces: dict[str, int], rank, *, byte_fallback: bool = True, unk: str | None = "<unk>",
                 fuse_unk: bool = True, ignore_merges: bool = False, strips_space: bool = True):
        self.pieces, self.rank, self.ignore_merges = pieces, rank, ignore_merges
        self.strips_space = strips_space
        self.names = {i: piece for piece, i in pieces.items()}
        self.size = 1 + max(self.names, default=-1)
        self.unk, self.fuse_unk = pieces.get(unk), fuse_unk
        self.byte_ids = [pieces.get(f"<0x{byte:02X}>") for byte in range(256)] if byte_fallback else [None]
        self.bytes_of = {i: bytes([byte]) for byte, i in enumerate(self.byte_ids) if i is not None}
        # Where no piece runs on into the next word, words merge by themselves, and each needs it only once.
        crossing = any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece in pieces)
        self.words = re.compile(EVERYTHING if crossing else f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str, first: bool) -> list[int]:
        if self.ignore_merges and text in self.pieces:
            return [self.pieces[text]]
        ids = []
        for word in self.words.findall(text):
            if word not in self.known:
                if len(self.known) > 100_000:
                    self.known.clear()
                self.known[word] = self.merge(word)
            ids += self.known[word]
        if self.fuse_unk and self.unk in ids:
            ids = [i for i, before in zip(ids, [None, *ids]) if i != self.unk or before != self.unk]
        return ids

    def merge(self, word: str) -> list[int]:
        n = len(word)
        piece, left, right = list(word), list(range(-1, n - 1)), list(range(1, n + 1))
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
        if None not in self.byte_ids:
            return [self.byte_ids[byte] for byte in piece.encode()]
        return [] if self.unk is None else [self.unk]

    def token_bytes(self, token: int) -> bytes:
        if token in self.bytes_of:
            return self.bytes_of[token]
        return self.names.get(token, "").replace(SPACE, " ").encode()

    def token_id(self, token: str) -> int | None:
        return self.pieces.get(token)


# ---- sentencepiece

class SentencePiece(Core):
    """The sentencepiece package. `legacy`: a text after an added token begins with the dummy space too."""

    def __init__(self, path: Path, legacy: bool):
        data = path.read_bytes()
        self.model = self.open(path, data)
        self.size = self.model.get_piece_size()
        self.names = [self.model.id_to_piece(i) for i in range(self.size)]
        self.pieces = {name: i for i, name in enumerate(self.names)}
        self.control = {i for i in range(self.size) if self.model.is_control(i) or self.model.is_unused(i)}
        self.bytes_of = {i: bytes([int(name[3:5], 16)]) for i, name in enumerate(self.names)
                         if self.model.is_byte(i)}
        self.eos_id = self.model.eos_id() if self.model.eos_id() >= 0 else None
        self.strips_space = self.model.encode("a", out_type=str)[0].startswith(SPACE)
        # A protobuf's later fields win: this appends normalizer_spec { add_dummy_prefix: false }.
        self.unprefixed = self.model if legacy else self.open(path, data + b"\x1a\x02\x18\x00")

    @staticmethod
    def open(path: Path, data: bytes):
        package = need("sentencepiece")
        try:
            return package.SentencePieceProcessor(model_proto=data or b"\0")    # b"" would make a dead object
        except (RuntimeError, OSError):
            raise TokenizerError(f"'{path}' is no sentencepiece model, or it is cut short; "
                                 "fetch it again") from None

    def encode(self, text: str, first: bool) -> list[int]:
        return (self.model if first else self.unprefixed).encode(text)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.size or token in self.control:
            return b""
        if token in self.bytes_of:
            return self.bytes_of[token]
        text = " \u2047 " if self.model.is_unknown(token) else self.names[token]
        return text.replace(SPACE, " ").encode()

    def token_id(self, token: str) -> int | None:
        return self.pieces.get(token)


# ---- the steps of a tokenizer.json -------------------------------------------------------------------------

class Steps(Core):
    """A core with what a tokenizer.json does to the text before it: `normalizers`, functions of the text,
    then `cuts`, functions of (list of pieces, first)."""

    def __init__(self, core: Core, normalizers=(), cuts=()):
        self.core, self.normalizers, self.cuts = core, normalizers, cuts
        self.size, self.space, self.strips_space = core.size, core.space, core.strips_space
        self.token_bytes, self.token_id = core.token_bytes, core.token_id

    def normalize(self, text: str) -> str:
        for step in self.normalizers:
            text = step(text)
        return text

    def encode(self, text: str, first: bool) -> list[int]:
        pieces = [text]
        for cut in self.cuts:
            pieces = cut(pieces, first)
        return [i for piece in pieces for i in self.core.encode(piece, first)]


def normalizer(step: dict):
    """One normalizer of a tokenizer.json as a function of the text."""
    kind = step["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: unicodedata.normalize(kind, text)
    if kind == "Lowercase":
        return str.lower
    if kind == "Prepend":
        return lambda text: step["prepend"] + text if text else text
    if kind == "Strip":
        left, right = step["strip_left"], step["strip_right"]
        return lambda text: (text.lstrip(WHITE) if left else text).rstrip(WHITE if right else "")
    if kind == "Replace":
        if "String" in step["pattern"]:
            return lambda text: text.replace(step["pattern"]["String"], step["content"])
        pattern = compiled(step["pattern"]["Regex"])
        return lambda text: pattern.sub(lambda _: step["content"], text)
    raise Unsupported(f"normalizer of type {kind}")


def pre_tokenizer(step: dict) -> list:
    """One pre-tokenizer of a tokenizer.json: cuts, or patterns (str) for "each match is a piece"."""
    kind = step["type"]
    if kind == "Split":
        pattern, behavior = step["pattern"], step.get("behavior", "Isolated")
        pattern = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
        if behavior == "Isolated":
            return [isolated(pattern)]
        if step.get("invert"):
            behavior = {"Removed": "Matches"}.get(behavior, f"inverted {behavior}")
        return [pattern if behavior == "Matches" else cutter(pattern, behavior)]
    if kind == "Digits":
        return [isolated(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")]
    if kind == "ByteLevel":
        prefix = [lambda pieces, first: [p if p.startswith(" ") else " " + p for p in pieces]]
        words = [isolated(GPT2_SPLIT)]
        return prefix * step.get("add_prefix_space", True) + words * step.get("use_regex", True)
    if kind == "Metaspace":
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        return [metaspace(scheme)] + [cutter(SPACE, "MergedWithNext")] * step.get("split", True)
    raise Unsupported(f"pre-tokenizer of type {kind}")


def isolated(pattern: str) -> str:
    """A pattern that also matches, as one piece, what lies between the matches of the given one."""
    return f"{pattern}|(?s:(?:(?!{pattern}).)+)"


def metaspace(scheme: str):
    def cut(pieces: list[str], first: bool) -> list[str]:
        pieces = [piece.replace(" ", SPACE) for piece in pieces]
        return [SPACE + piece if not piece.startswith(SPACE)
                and (scheme == "always" or scheme == "first" and first and n == 0) else piece
                for n, piece in enumerate(pieces)]
    return cut


def cutter(pattern: str, behavior: str = "Matches"):
    """Pieces cut at the matches of a pattern, which are kept alone, or dropped, or glued to a neighbour."""
    if behavior not in ("Matches", "Removed", "MergedWithPrevious", "MergedWithNext"):
        raise Unsupported(f"Split pre-tokenizer of behavior {behavior}")
    find = compiled(pattern)

    def cut_one(text: str):
        at = 0
        for match in find.finditer(text):
            begin, end = match.span()
            if behavior == "Matches":
                yield match.group()
            elif behavior == "Removed":
                yield text[at:begin]
                at = end
            elif behavior == "MergedWithPrevious":
                yield text[at:end]
                at = end
            else:
                yield text[at:begin]
                at = begin
        if behavior != "Matches":
            yield text[at:]

    return lambda pieces, first: [part for piece in pieces for part in cut_one(piece) if part]


def compiled(pattern: str):
    regex = need("regex")           # the standard re knows no \p{L}
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise Unsupported(f"the pattern {pattern!r} is not understood ({error})") from None


def flatten(step: dict | None, key: str) -> list[dict]:
    """The steps of a Sequence, which may hold further ones; one step as a list of itself."""
    if step is None or step["type"] != "Sequence":
        return [step] if step else []
    return [inner for part in step[key] for inner in flatten(part, key)]


def core_from_json(data: dict) -> Steps:
    """The model of a tokenizer.json with its steps. Unsupported names what is not known here."""
    model = data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unnamed")
    if kind != "BPE":
        raise Unsupported(f"model of type {kind} (BPE is what is read)")
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise Unsupported(f"model with {option} {model[option]!r}")
    normalizers = [normalizer(step) for step in flatten(data.get("normalizer"), "normalizers")]
    before = flatten(data.get("pre_tokenizer"), "pretokenizers")
    after = flatten(data.get("decoder"), "decoders")
    cuts = [cut for step in before for cut in pre_tokenizer(step)]
    if any(step["type"] == "ByteLevel" for step in (*before, *after)):
        # The last pattern is left to tiktoken: fast, and its Unicode is that of the engine that made the ids.
        split = cuts.pop() if cuts and isinstance(cuts[-1], str) else EVERYTHING
        added = {token["content"] for token in data.get("added_tokens") or []}
        core = byte_level_from_json(model, split, added)
    else:
        strips = any(step["type"] == "Strip" and step.get("start") or step["type"] == "Metaspace"
                     and step.get("prepend_scheme", "always") != "never" for step in after)
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
        ranks = {(a, b): rank for rank, (a, b) in enumerate(pairs)}
        flags = {name: bool(model.get(name)) for name in ("byte_fallback", "fuse_unk", "ignore_merges")}
        core = HeapBPE(model["vocab"], lambda a, b: ranks.get((a, b)), unk=model.get("unk_token"),
                       strips_space=strips, **flags)
    return Steps(core, normalizers, [cutter(cut) if isinstance(cut, str) else cut for cut in cuts])


# ---- files -------------------------------------------------------------------------------------------------

def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder, beside a weights file, or of a tokenizer file itself; told by content.
    Raises FileNotFoundError where there is none, ValueError for one that is damaged or of an unknown kind."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    refused = []
    for file in tokenizer_files(path, folder):
        try:
            tokenizer = read_tokenizer(file, config)
            tokenizer.chat_template = read_template(folder, config)
            return tokenizer
        except Unsupported as error:
            refused.append(f"'{file}' is not supported: {error}")
        except (TokenizerError, OSError):
            raise
        except Exception as error:      # what a damaged file makes raise can be anything
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise TokenizerError(f"'{file}' is damaged, or no tokenizer: {what}; fetch it again") from None
    if refused:
        raise TokenizerError("; ".join(refused))
    raise FileNotFoundError(f"no tokenizer in '{folder}'; put tokenizer.json, tokenizer.model, *.tiktoken, "
                            "vocab.json with merges.txt, tekken.json or tok*.bin beside the weights")


def tokenizer_files(path: Path, folder: Path) -> list[Path]:
    """Files to try, the best first. tokenizer.json leads because it carries the added tokens."""
    patterns = ("tokenizer.json", "tokenizer.model*", "*.tiktoken", "vocab.json", "tekken.json", "*.model",
                "tok*.bin")
    found = [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]
    if path.name == "merges.txt":
        return [path.with_name("vocab.json")]
    is_config = path.name.endswith(("config.json", "index.json"))
    if path.is_file() and (path in found or path.suffix == ".json" and not is_config or llama2c_pieces(path)):
        return [path]
    return list(dict.fromkeys(found))


def read_tokenizer(path: Path, config: dict) -> Tokenizer:
    """One file by its content: JSON of three kinds, llama2.c's pieces, tiktoken's lines, else a protobuf."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if path.suffix == ".json" or head.lstrip()[:1] == b"{":
        data = read_json(path)
        if isinstance(data.get("model"), dict):
            return json_tokenizer(data, config)
        if isinstance(data.get("config"), dict):
            return tekken_tokenizer(data, config)
        return vocab_and_merges(path, data, config)
    if pieces := llama2c_pieces(path):
        return llama2c_tokenizer(pieces, config)
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\s", head):
        return tiktoken_tokenizer(path, config)
    return sentencepiece_tokenizer(path, config)


def json_tokenizer(data: dict, config: dict) -> Tokenizer:
    added = [added_token(t["id"], t) for t in data.get("added_tokens") or []]
    bos = first_special(data.get("post_processor"))
    return Tokenizer(core_from_json(data), added, config, bos=bos, add_bos=bos is not None)


def first_special(processor: dict | None) -> str | None:
    """The token that a post-processor puts before the text."""
    for step in flatten(processor, "processors"):
        if step["type"] == "TemplateProcessing" and step["single"] and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


def sentencepiece_tokenizer(path: Path, config: dict) -> Tokenizer:
    core = SentencePiece(path, legacy=bool(config.get("legacy")))
    listed = added_from_config(path.parent, config)
    added = [Added(i, core.names[i]) for i in sorted(core.control) if core.names[i]] + listed
    bos = core.names[core.model.bos_id()] if core.model.bos_id() >= 0 else None
    return Tokenizer(core, added, config, bos=bos, add_bos=True)


def tiktoken_tokenizer(path: Path, config: dict) -> Tokenizer:
    """Ranks, a line each: Llama 3's, with 256 special ids after them, or Qwen 1's, with 208."""
    try:
        lines = map(bytes.split, path.read_bytes().splitlines())
        ids = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError:
        raise TokenizerError(f"'{path}' has a line that is not a token and its rank; it is cut short, "
                             "fetch it again") from None
    added, n, qwen = added_from_config(path.parent, config), len(ids), len(ids) == 151643
    if qwen:
        names, bos = ["endoftext", "im_start", "im_end", *(f"extra_{i}" for i in range(205))], None
    else:
        spare = (f"reserved_special_token_{i}" for i in range(256))
        known = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
                 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
        names, bos = [known.get(i) or next(spare) for i in range(256)], "<|begin_of_text|>"
    there = {token.id for token in added}
    added += [Added(n + i, f"<|{name}|>") for i, name in enumerate(names) if n + i not in there]
    config = {"eos_token": "<|endoftext|>" if qwen else "<|end_of_text|>"} | config
    return Tokenizer(ByteLevelBPE(ids, QWEN_SPLIT if qwen else LLAMA3_SPLIT), added, config, bos=bos,
                     add_bos=bos is not None)


def vocab_and_merges(path: Path, vocab: dict, config: dict) -> Tokenizer:
    """GPT-2's two files, as the tokenizer.json they would make. Qwen's class has its own pattern and NFC."""
    if not vocab or not all(isinstance(i, int) for i in vocab.values()):
        raise TokenizerError(f"'{path}' is neither a tokenizer.json nor a vocabulary; fetch it again")
    merges_path = path.with_name("merges.txt")
    if not merges_path.is_file():
        raise FileNotFoundError(f"'{path}' needs merges.txt beside it")
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines[lines[0].startswith("#version"):] if line]
    qwen = "Qwen" in config.get("tokenizer_class", "")
    steps = [{"type": "Split", "pattern": {"Regex": QWEN_SPLIT if qwen else GPT2_SPLIT}}]
    if config.get("add_prefix_space"):
        steps.insert(0, {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False})
    core = core_from_json({"model": {"vocab": vocab, "merges": merges}, "decoder": {"type": "ByteLevel"},
                           "normalizer": {"type": "NFC"} if qwen else None,
                           "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
    return Tokenizer(core, added_from_config(path.parent, config), {"eos_token": "<|endoftext|>"} | config)


def tekken_tokenizer(data: dict, config: dict) -> Tokenizer:
    """Mistral's: ranks that start after the special ids."""
    settings = data["config"]
    shift = settings["default_num_special_tokens"]
    ids = {base64.b64decode(entry["token_bytes"]): shift + entry["rank"] for entry in
           data["vocab"][:settings["default_vocab_size"] - shift]}
    names = {entry["rank"]: entry["token_str"] for entry in data.get("special_tokens") or []}
    added = [Added(i, name) for i, name in (names or {0: "<unk>", 1: "<s>", 2: "</s>"}).items()]
    return Tokenizer(ByteLevelBPE(ids, settings["pattern"]), added, {"eos_token": "</s>"} | config, bos="<s>",
                     add_bos=True)


def llama2c_pieces(path: Path) -> list[tuple[str, float]] | None:
    """The (piece, score) pairs of a llama2.c tokenizer file, None for anything else."""
    if path.suffix != ".bin" or path.stat().st_size > 1 << 26:
        return None
    data, at, pieces = path.read_bytes(), 4, []
    while at + 8 <= len(data):
        score, length = struct.unpack_from("<fI", data, at)
        pieces.append((data[at + 8:at + 8 + length].decode("utf-8", "replace"), score))
        at += 8 + length
    return pieces if at == len(data) and len(pieces) >= 259 else None


def llama2c_tokenizer(listed: list[tuple[str, float]], config: dict) -> Tokenizer:
    """A sentencepiece BPE of which only pieces and scores are left: the best score merges first."""
    pieces = {name.replace(" ", SPACE): i for i, (name, _) in reversed(list(enumerate(listed))) if i > 2}
    pieces["<unk>"] = 0

    def rank(a: str, b: str) -> float | None:
        made = pieces.get(a + b)
        return None if made is None else -listed[made][1]

    def prefix(texts: list[str], first: bool) -> list[str]:
        return [(SPACE if first else "") + text.replace(" ", SPACE) for text in texts]

    return Tokenizer(Steps(HeapBPE(pieces, rank), cuts=[prefix]), [Added(1, "<s>"), Added(2, "</s>")],
                     {"eos_token": "</s>"} | config, bos="<s>", add_bos=True)


def added_from_config(folder: Path, config: dict) -> list[Added]:
    """Added tokens where no tokenizer.json carries them."""
    listed = config.get("added_tokens_decoder") or {}
    if not listed and (folder / "added_tokens.json").is_file():
        ids = read_json(folder / "added_tokens.json")
        listed = {i: {"content": text, "special": False} for text, i in ids.items()}
    return [added_token(int(i), token) for i, token in listed.items()]


def added_token(i: int, token: dict) -> Added:
    flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
    return Added(i, token["content"], special=token.get("special", True), **flags)


def text_of(token) -> str | None:
    """A token as configs give it: a string, or a dict that has its content. None for anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"'{path}' is not valid JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"'{path}' holds a JSON {type(data).__name__}, not an object; fetch it again")
    return data


def need(package: str):
    """A package that only some tokenizers use."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise TokenizerError(f"this needs the package {name}: pip install {name}") from None
