"""Train a small story-telling Llama on a few megabytes of text, on a CPU, in about an hour.

What it is: files of stories -> clean, split, held out -> a sentencepiece tokenizer -> this repository's own Transformer,
trained -> a Hugging Face folder with a model card whose every figure was measured. It made the two models in
checkpoints/; each card has the exact commands. DATA is a folder of .txt files with English stories, here about 3 MB
of TinyStories; INIT and TEACHER are folders that this script wrote:

    torchrun --nproc_per_node 2 scripts/train_stories.py --data DATA --out stories
    python scripts/train_stories.py --data DATA --out stories-again --init stories --lr 2e-3
    python scripts/train_stories.py --data DATA --out draft --teacher stories --dim 64 --layers 4 --heads 2 --ffn_dim 192

What it is not: a trainer for anything large. One process is one thread, nothing is sharded, nothing is resumed.

Reading order: `main`; `split_stories` and `split_held_out` (what is trained on, and what is judged); `batches`,
`train`; `bits_per_byte`; `save_folder`.
"""
import argparse
import io
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_checkpoint  # noqa: E402
from generate import generate, load_model  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402

BOS, EOS = 1, 2
BALANCE = 0.01          # the load-balancing loss counts so much
END_OF_TEXT = "<|endoftext|>"


def log(*words):
    print(*words, file=sys.stderr, flush=True)


# ---- text: files to stories ------------------------------------------------------------------------------------

MOJIBAKE = {"â€œ": '"', "â€™": "'", "â€˜": "'", "â€\u009d": '"', "â€": '"'}       # UTF-8 once read as cp1252
TYPOGRAPHY = {"“": '"', "”": '"', "’": "'", "‘": "'", "—": " - ", "–": "-", "…": "...", "\u00a0": " "}
# What a story begins with, for files that set no mark between stories. A day may also come in mid-story, so that
# it counts only where somebody new is named.
OPENING = re.compile(r"Once upon|Once,? (there|a|in)\b|There (once )?was (once )?a\b|Long ago|A long time ago"
                     r"|(One|On a) [\w ]*?(day|morning|night|evening)[^.!?]*? (named|called) "
                     r"|One day,? (a|an|two) (little|young|small) (girl|boy|cat|dog|bird|bear|bunny)\b")


def clean(text: str) -> str:
    """One spelling for quotes, dashes and paragraph breaks (one newline)."""
    for table in (MOJIBAKE, TYPOGRAPHY):
        for bad, good in table.items():
            text = text.replace(bad, good)
    paragraphs = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(p for p in paragraphs if p)


def split_stories(text: str) -> list[str]:
    """A file's stories. Three habits are known: a mark between stories; paragraphs parted by an empty line and stories
    by a mere newline; the same empty line for both, where only a story's opening words tell."""
    text = text.replace("\r\n", "\n")
    if END_OF_TEXT in text:
        return [clean(story) for story in text.split(END_OF_TEXT)][:-1]             # the last one may be cut short
    blocks = re.split(r"\n[ \t]*\n\s*", text.strip())                                # at empty lines
    single = sum("\n" in block for block in blocks) > len(blocks) / 20               # newlines that part stories
    stories, story = [], []
    for block in blocks:
        first, *others = re.split(r"\n(?![\"“ ])", block) if single else [block]
        if not single and OPENING.match(first) and story:
            stories, story = stories + [story], []
        story.append(first)
        for other in others:
            stories, story = stories + [story], [other]
    return [clean("\n\n".join(story)) for story in stories]                        # `story`, the last one, likewise


def read_stories(folder: Path, talk: bool = True) -> list[str]:
    """All stories of the .txt files under a folder: whole, English, each once."""
    stories = []
    for path in sorted(folder.rglob("*.txt")):
        found = split_stories(path.read_text(encoding="utf-8"))
        good = [s for s in found if 150 <= len(s) <= 4000 and s.isascii()
                and (s[0].isupper() or s[0] == '"') and s[-1] in '.!?"']
        if talk:
            log(f"{path.name}: {len(good)} of {len(found)} stories, {sum(map(len, good)):,} bytes")
        stories += good
    return list(dict.fromkeys(stories))


def shingles(story: str, n: int = 6) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", story.lower())
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def split_held_out(stories: list[str], share: float = 0.05, seed: int = 1234) -> tuple[list[str], list[str]]:
    """(train, held out) by whole stories. A training story that has a fifth of its six-word runs in common with the
    held-out ones is dropped as a near-duplicate."""
    order = list(range(len(stories)))
    random.Random(seed).shuffle(order)
    n = round(share * len(stories))
    held_out = [stories[i] for i in sorted(order[:n])]
    return unlike([stories[i] for i in sorted(order[n:])], held_out), held_out


def unlike(stories: list[str], held_out: list[str], most: float = 0.2) -> list[str]:
    runs = set().union(*map(shingles, held_out))
    return [story for story in stories if len(shingles(story) & runs) <= most * len(shingles(story))]


# ---- a model's folder ------------------------------------------------------------------------------------------

def hf_names(name: str, tensor: Tensor, args: ModelArgs) -> dict[str, Tensor]:
    """One of our parameters as Hugging Face names it; the fused ones come apart."""
    if not name.startswith("layers."):
        names = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        return {names[name]: tensor}
    _, layer, rest = name.split(".", 2)
    kv_dim = args.n_kv_heads * args.head_dim
    if found := re.match(r"feed_forward\.experts\.(\d+)\.(w13|w2)\.weight", rest):
        expert = f"model.layers.{layer}.block_sparse_moe.experts.{found[1]}"
        names = ["w1", "w3"] if found[2] == "w13" else ["w2"]
        return {f"{expert}.{name}.weight": t.contiguous() for name, t in zip(names, tensor.chunk(len(names)))}
    parts, rows = {
        "attention.wqkv.weight": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                                  [args.n_heads * args.head_dim, kv_dim, kv_dim]),
        "attention.wo.weight": (["self_attn.o_proj"], None),
        "feed_forward.w13.weight": (["mlp.gate_proj", "mlp.up_proj"], [args.ffn_dim, args.ffn_dim]),
        "feed_forward.w2.weight": (["mlp.down_proj"], None),
        "feed_forward.router.weight": (["block_sparse_moe.gate"], None),
        "attention_norm.weight": (["input_layernorm"], None),
        "ffn_norm.weight": (["post_attention_layernorm"], None),
    }[rest]
    tensors = tensor.split(rows) if rows else [tensor]
    return {f"model.layers.{layer}.{part}.weight": t.contiguous() for part, t in zip(parts, tensors)}


def save_folder(model: Transformer, tokenizer: SentencePieceProcessor, folder: Path):
    """Hugging Face's layout: weights in bfloat16, the configs, the tokenizer in both of its forms."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, tensor in model.state_dict().items():
        weights |= hf_names(name, tensor.bfloat16(), model.args)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
    for name, content in {"config.json": hf_config(model.args), "generation_config.json": GENERATION_CONFIG,
                          "tokenizer_config.json": TOKENIZER_CONFIG | {"model_max_length": model.args.max_position},
                          "tokenizer.json": fast_tokenizer(tokenizer)}.items():
        indent = None if name == "tokenizer.json" else 2
        (folder / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


GENERATION_CONFIG = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.6, "top_k": 50,
                     "top_p": 0.9}
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False,
                    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False,
                    "clean_up_tokenization_spaces": False}


def hf_config(args: ModelArgs) -> dict:
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} if not args.n_experts else {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": args.n_experts,
        "num_experts_per_tok": args.active_experts, "sliding_window": None}
    return kind | {
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS, "eos_token_id": EOS, "hidden_act": "silu", "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim, "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads, "num_key_value_heads": args.n_kv_heads, "head_dim": args.head_dim,
        "vocab_size": args.vocab_size, "max_position_embeddings": args.max_position,
        "rms_norm_eps": args.norm_eps, "rope_theta": args.ropes[0].theta, "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.02}


def fast_tokenizer(tokenizer: SentencePieceProcessor) -> dict:
    """tokenizer.json with the pieces of tokenizer.model, for readers that do not know sentencepiece. A merge's rank is
    that of the piece it makes; pieces come from sentencepiece in that order."""
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
    rank = {piece: i for i, piece in enumerate(pieces)}
    merges = [(piece[:cut], piece[cut:]) for i, piece in enumerate(pieces) if i > EOS and not tokenizer.is_byte(i)
              for cut in range(1, len(piece)) if piece[:cut] in rank and piece[cut:] in rank]
    special = [{"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False} for i in (0, BOS, EOS)]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
            "pre_tokenizer": None,
            "post_processor": {"type": "TemplateProcessing", "single": [bos, one], "pair": [bos, one, bos, two],
                               "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": rank, "merges": [f"{left} {right}" for left, right in merges]}}


# ---- measure ---------------------------------------------------------------------------------------------------

@torch.inference_mode()
def bits_per_byte(model: Transformer, tokenizer: SentencePieceProcessor, stories: list[str]) -> float:
    """Total nats over the stories / ln 2 / their UTF-8 bytes. Each story stands alone after BOS; its end token is not
    counted. A story longer than the model's context is read in windows that advance by half of it, so that each token
    is judged once, with at least half a context before it."""
    nats, context = 0.0, model.args.max_position
    for story in stories:
        ids = torch.tensor([BOS] + tokenizer.encode(story))
        done = 1                                                                     # ids[:done] are judged
        while done < len(ids):
            start = 0 if len(ids) <= context or done == 1 else done - context // 2
            window = ids[start:start + context]
            losses = F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none")
            nats += losses[done - start - 1:].sum().item()
            done = start + len(window)
    return nats / math.log(2) / sum(len(story.encode()) for story in stories)


# ---- tokenizer -------------------------------------------------------------------------------------------------

def train_tokenizer(stories: list[str], vocab_size: int) -> SentencePieceProcessor:
    """Llama's kind of sentencepiece BPE: ids 0, 1, 2 are unk, BOS, EOS, then 256 bytes (the newline is one of them)."""
    file = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for story in stories for line in story.split("\n")]), model_writer=file,
        model_type="bpe", vocab_size=vocab_size, unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        character_coverage=1.0, num_threads=1, minloglevel=2)
    return SentencePieceProcessor(model_proto=file.getvalue())


def open_tokenizer(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# ---- training --------------------------------------------------------------------------------------------------

def batches(stories: list[str], tokenizer: SentencePieceProcessor, context: int, batch_tokens: int,
            bpe_dropout: float, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [B, T], one story a row, for ever. Rows of like length meet, so that little is padding; each
    epoch cuts the words anew (BPE-dropout: Provilkov et al. 2020), so that a story is rarely seen twice alike."""
    while True:
        rng.shuffle(stories)
        for first in range(0, len(stories), 4096):
            chunk = stories[first:first + 4096]
            rows = tokenizer.encode(chunk, enable_sampling=True, alpha=bpe_dropout) if bpe_dropout \
                else tokenizer.encode(chunk)
            rows = sorted(([BOS, *row, EOS][:context + 1] for row in rows), key=len)
            ready, batch = [], []
            for row in rows:
                width = -(-(len(row) - 1) // 64) * 64
                if batch and width * (len(batch) + 1) > batch_tokens:
                    ready, batch = ready + [batch], []
                batch.append(row)
            ready.append(batch)
            rng.shuffle(ready)
            for batch in ready:
                T = -(-(max(map(len, batch)) - 1) // 64) * 64
                x, y = torch.full((len(batch), T), EOS), torch.full((len(batch), T), -100)
                for i, row in enumerate(batch):
                    x[i, :len(row) - 1] = torch.tensor(row[:-1])
                    y[i, :len(row) - 1] = torch.tensor(row[1:])
                yield x, y


def add_dropout(model: Transformer, p: float):
    """On what attention and feed-forward add to the residual stream. Our model has none, for it is made to infer."""
    for layer in model.layers:
        for part in (layer.attention, layer.feed_forward):
            part.register_forward_hook(lambda module, inputs, out: F.dropout(out, p, module.training))


def init_weights(model: Transformer):
    """Small normal weights; what writes to the residual stream is scaled down by the depth."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("wo.weight", "w2.weight"))
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * model.args.n_layers) if residual else 0.02)


def optimizers(model: Transformer, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for the embedding and the norms."""
    def is_matrix(name: str, p: Tensor) -> bool:
        return p.dim() == 2 and name.startswith("layers.") and "router" not in name
    matrices = [p for name, p in model.named_parameters() if is_matrix(name, p)]
    others = [p for name, p in model.named_parameters() if not is_matrix(name, p)]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.95))]


def lr_factor(progress: float, warmup: float = 0.03) -> float:
    """Up in a straight line, then down the half of a cosine to a hundredth."""
    if progress < warmup:
        return progress / warmup
    progress = min(progress, 1.0)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Balance:
    """The load-balancing loss of Fedus et al. 2022 (section 2.2): 1 where the routers use all experts alike."""

    def __init__(self, model: Transformer):
        self.active, self.terms = model.args.active_experts, []
        for layer in model.layers if model.args.n_experts else []:
            layer.feed_forward.router.register_forward_hook(lambda router, args, logits: self.add(logits))

    def add(self, logits: Tensor):
        X = logits.shape[-1]
        chosen = torch.zeros_like(logits).scatter_(1, logits.topk(self.active).indices, 1.0)
        self.terms.append(X / self.active * (chosen.mean(0) * logits.float().softmax(-1).mean(0)).sum())

    def take(self) -> Tensor | float:
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean() if terms else 0.0


def loss_of(model: Transformer, x: Tensor, y: Tensor, teacher: Transformer | None,
            weight: float) -> tuple[Tensor, float]:
    """The mean loss a token, and its cross-entropy in nats. With a teacher, `weight` of the loss is the divergence of
    the model's distribution from the teacher's."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)[y >= 0]                                                    # [tokens, V]
        wanted = teacher(x)[y >= 0] if teacher else None
    cross_entropy = F.cross_entropy(logits, y[y >= 0])
    if teacher is None:
        return cross_entropy, cross_entropy.item()
    divergence = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    return (1 - weight) * cross_entropy + weight * divergence, cross_entropy.item()


def agree(model: Transformer, seconds: float) -> float:
    """Several processes, each with its own stories: all take the mean gradient, and the mean of their clocks."""
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([seconds])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, mean in zip(grads, flat[:-1].split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))
    return flat[-1].item()


def train(model: Transformer, tokenizer: SentencePieceProcessor, stories: list[str], args: argparse.Namespace,
          teacher: Transformer | None = None) -> dict:
    """The training loop, until its time is spent; returns what the model card says of it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(args.seed + rank)
    add_dropout(model, args.dropout)
    opts = optimizers(model, args.lr, args.weight_decay)
    data = batches(list(stories), tokenizer, args.context, args.batch_tokens, args.bpe_dropout,
                   random.Random(args.seed + rank))
    start, seconds, step, seen, mean = time.time(), 0.0, 0, 0, None
    balance = Balance(model)
    model.train()
    while seconds < 60 * args.minutes:
        progress = seconds / 60 / args.minutes
        x, y = next(data)
        loss, nats = loss_of(model, x, y, teacher, args.teacher_weight)
        (loss + BALANCE * balance.take()).backward()
        for p in model.parameters():    # an expert that nobody chose has none
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        seconds = time.time() - start if world == 1 else agree(model, time.time() - start)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * lr_factor(progress)
            opt.step()
            opt.zero_grad()
        step, seen = step + 1, seen + world * (y >= 0).sum().item()
        mean = nats if mean is None else 0.98 * mean + 0.02 * nats
        if rank == 0 and step % 50 == 0:
            log(f"step {step}  {mean:.3f} nats/token  {seen / seconds:,.0f} tokens/s  {seconds / 60:.1f} minutes")
    model.eval().requires_grad_(False)
    return {"steps": step, "tokens": seen, "minutes": seconds / 60, "processes": world}


# ---- the model card --------------------------------------------------------------------------------------------

CARD = """---
license: other
language: en
pipeline_tag: text-generation
---
# {title}

A {kind} of {params:,} parameters ({layers} layers, width {dim}, {heads} heads, {vocab} pieces, context {context}),
{megabytes:.2f} MB in bfloat16. It tells short stories for small children and does nothing else: it knows no facts,
answers no questions and follows no instructions. It is here so that the commands of this repository have something to
run on.

## Figures

| model | parameters | held-out bits per byte |
|---|---:|---:|
| {title} | {params:,} | **{bits:.4f}** |
{others}
Held out: {held_out} stories, {held_out_bytes:,} bytes, that no training step has seen, nor any story of which more
than a fifth of the six-word runs occur in them. Bits per byte: the nats of all their tokens / ln 2 / their bytes in
UTF-8; each story alone after BOS, its end token not counted, stories longer than the context in windows that advance
by half of it. The figure is that of the weights as stored, in bfloat16, computed in float32. The first {sample}
held-out stories stand in `held_out.txt`. On training stories the figure is {train_bits:.4f}.
{note}
## How it was made

Data: {stories:,} English stories, {train_bytes:,} bytes (TinyStories of Eldan and Li 2023, generated by GPT-3.5 and
GPT-4; CDLA-Sharing-1.0), from three public excerpts. Tokenizer: sentencepiece BPE, trained on the same stories.
{how}On 2 cores of an AMD EPYC (Zen 5) that others used at the same time, with
{runs}
The schedule follows the clock, so that the same minutes give other numbers of steps on other machines.

## A story, unedited

`python generate.py --checkpoint_path checkpoints/{title} --prompt "{prompt}" --seed {seed}` (settings of
`generation_config.json`, bfloat16, CPU):

> {story}
"""
RUN = """
```
{command}
```
{steps:,} steps, {tokens:,} tokens ({epochs:.1f} epochs), {minutes:.1f} minutes.
"""


def count_parameters(model: Transformer) -> int:
    """A head that only repeats the embedding is not counted."""
    head = model.output is not None and torch.equal(model.output.weight, model.tok_embeddings.weight)
    return sum(p.numel() for p in model.parameters()) - head * model.tok_embeddings.weight.numel()


def tell(folder: Path, seed: int) -> str:
    """What generate.py prints for this folder at its defaults."""
    model, tokenizer = load_model(folder)
    return generate(model, tokenizer, [PROMPT], seed=seed)[0].text


def write_card(args: argparse.Namespace, model: Transformer, figures: dict, train_stories: list[str],
               held_out: list[str]) -> str:
    """The model's README.md. Every number in it was measured in this run."""
    params = count_parameters(model)
    others = "".join(f"| {name} | {size:,} | {bits:.4f} |\n" for name, size, bits in figures["others"])
    how = f"Distilled: {args.teacher_weight:.0%} of the loss is the divergence from `{Path(args.teacher).name}`. " \
        if args.teacher else ""
    return CARD.format(
        title=args.out.name, params=params,
        kind=f"mixture of {model.args.n_experts} experts, {model.args.active_experts} active,"
        if model.args.n_experts else "Llama", megabytes=2 * params / 1e6, layers=model.args.n_layers,
        dim=model.args.dim, heads=model.args.n_heads, vocab=model.args.vocab_size, context=model.args.max_position,
        bits=figures["bits"], train_bits=figures["train_bits"], others=others, note=COMPARED if others else "", how=how,
        held_out=len(held_out), held_out_bytes=sum(map(len, held_out)), sample=SAMPLE, stories=len(train_stories),
        train_bytes=sum(map(len, train_stories)),
        prompt=PROMPT, seed=SEED, story="\n> \n> ".join((PROMPT + tell(args.out, SEED)).split("\n")),
        runs="".join(RUN.format(**run) for run in figures["history"]))


COMPARED = """
stories260K (karpathy/tinyllamas, MIT) has 512 pieces and was trained on all of TinyStories, some 2 GB, which may
include the stories held out here. Paragraphs are parted by one newline; by an empty line its figure is worse.
"""
PROMPT, SEED = "Once upon a time", 1
SAMPLE = 12         # held-out stories written beside the model, for a test


# ---- command line ----------------------------------------------------------------------------------------------

def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of .txt files with stories")
    add("--out", type=Path, required=True, help="folder to write: weights, configs, tokenizer, model card")
    add("--init", type=Path, help="folder of a model to go on from; its sizes and its tokenizer are used")
    add("--teacher", type=Path, help="folder of a model to learn from as well; its tokenizer is used")
    add("--teacher_weight", type=float, default=0.5, help="share of the loss that is the teacher's")
    add("--split_only", action="store_true", help="only write what is trained on and what is held out, as .jsonl")
    add("--compare", type=Path, nargs="*", default=[], help="folders of models to judge on the same held-out stories")
    add("--vocab_size", type=int, default=2048, help="sentencepiece pieces")
    add("--context", type=int, default=512, help="tokens; the few longer stories are cut")
    add("--dim", type=int, default=192, help="model width")
    add("--layers", type=int, default=6, help="blocks")
    add("--heads", type=int, default=3, help="attention heads; 64 wide is fastest on a CPU")
    add("--ffn_dim", type=int, default=512, help="feed-forward width")
    add("--experts", type=int, default=0, help="feed-forwards of that width in each layer; 0: one, for all tokens")
    add("--active", type=int, default=2, help="of them, for each token")
    add("--minutes", type=float, default=30, help="training time; the schedule follows the clock")
    add("--batch_tokens", type=int, default=2048, help="tokens a step and process, padding included")
    add("--lr", type=float, default=8e-3, help="peak learning rate")
    add("--weight_decay", type=float, default=0.1, help="of the layers' matrices")
    add("--dropout", type=float, default=0.1, help="on what each half of a block adds")
    add("--bpe_dropout", type=float, default=0.0, help="share of merges left out when a story is cut into pieces")
    add("--seed", type=int, default=0, help="of weights, order and dropout; the held-out split does not depend on it")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder; give one with .txt files of stories")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(1)        # small matrices: two processes of one thread beat one of two
    torch.manual_seed(args.seed)
    if "RANK" in os.environ:        # torchrun --nproc_per_node N
        dist.init_process_group("gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    train_stories, held_out = split_held_out(read_stories(args.data, talk=first))
    if args.split_only:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, stories in (("train", train_stories), ("held_out", held_out)):
            (args.out / f"{name}.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in stories))
        return
    if not held_out:
        sys.exit(f"error: too few stories in {args.data}; a hundred or more are needed")

    model, tokenizer = begin(args, train_stories)
    teacher = load_checkpoint(args.teacher, dtype=torch.float32) if args.teacher else None
    figures = train(model, tokenizer, train_stories, args, teacher)
    if first:
        finish(args, model, tokenizer, figures, train_stories, held_out)
    if dist.is_initialized():
        dist.destroy_process_group()


def begin(args: argparse.Namespace, stories: list[str]) -> tuple[Transformer, SentencePieceProcessor]:
    """The model to train, and its tokenizer: another's where the flags say so."""
    if args.init:
        return load_checkpoint(args.init, dtype=torch.float32).requires_grad_(True), open_tokenizer(args.init)
    tokenizer = open_tokenizer(args.teacher) if args.teacher else train_tokenizer(stories, args.vocab_size)
    model = Transformer(ModelArgs(
        vocab_size=tokenizer.get_piece_size(), dim=args.dim, n_layers=args.layers, n_heads=args.heads,
        ffn_dim=args.ffn_dim, max_position=args.context, tied=True, n_experts=args.experts,
        active_experts=args.active if args.experts else 0))
    init_weights(model)
    return model, tokenizer


def finish(args: argparse.Namespace, model: Transformer, tokenizer: SentencePieceProcessor, run: dict,
           train_stories: list[str], held_out: list[str]):
    """Measure what will be stored, and write the folder."""
    model.bfloat16().float()                                                         # the weights as they are stored
    figures = {"bits": bits_per_byte(model, tokenizer, held_out),
               "train_bits": bits_per_byte(model, tokenizer, train_stories[::20]),
               "others": [judge(folder, held_out) for folder in args.compare]}
    log(f"held-out bits per byte {figures['bits']:.4f}; on training stories {figures['train_bits']:.4f}; others: "
        f"{figures['others']}")
    run["epochs"] = run["tokens"] / sum(map(len, tokenizer.encode(train_stories)))
    run["command"] = command_line(run.pop("processes"))
    history = json.loads((args.init / "training.json").read_text()) if args.init else []
    figures["history"] = history + [run]
    save_folder(model, tokenizer, args.out)
    (args.out / "README.md").write_text(write_card(args, model, figures, train_stories, held_out), encoding="utf-8")
    (args.out / "training.json").write_text(json.dumps(figures["history"], indent=2) + "\n")
    (args.out / "held_out.txt").write_text(f"\n{END_OF_TEXT}\n".join(held_out[:SAMPLE]) + "\n", encoding="utf-8")


def judge(folder: Path, held_out: list[str]) -> tuple[str, int, float]:
    """Another model's name, size and bits per byte on the same stories."""
    model = load_checkpoint(folder, dtype=torch.float32)
    name = folder.resolve().parent.name if folder.name == "hf" else folder.name
    return name, count_parameters(model), bits_per_byte(model, open_tokenizer(folder), held_out)


def command_line(processes: int) -> str:
    """How this run was started, without the paths of this machine."""
    launch = f"torchrun --nproc_per_node {processes}" if processes > 1 else "python"
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join([launch, "scripts/train_stories.py", *words])


if __name__ == "__main__":
    main()
