"""How good is a model? Perplexity on a text file, and the tasks of lm-evaluation-harness.

    python eval.py --perplexity stories.txt
    python eval.py --checkpoint_path model_int4.g32.safetensors --tasks hellaswag winogrande --limit 100

What it is: `score`, the log-probabilities of given ids, on which both stand; `perplexity`; and an adapter for
lm-eval (optional: pip install 'lm_eval>=0.4.13'). What it is not: a set of tasks; those are lm-eval's, or your own
YAML files. Figures go to stdout, progress to stderr. It works on whatever generate.py loads.
"""
import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # said when torch is imported; nothing here needs it

import torch
from torch import Tensor

import ranks
from generate import (BUNDLED, PAD, attended, compile_steps, generate_rows, load_model, make_room, rows_for,
                      symbolic)
from gptq import document
from model import Transformer
from quantize import describe
from sampling import Sampling
from tokenizer import Tokenizer

LOGITS = 1 << 26                        # numbers in one call's logits: 256 MB, whatever the vocabulary


# ---- scoring -----------------------------------------------------------------------------------------------

def score_chunk(model: Transformer, tokens: Tensor, targets: Tensor, input_pos: Tensor,
                key_pos: Tensor) -> tuple[Tensor, Tensor]:
    """log p(targets) and whether each is the most likely id, both [B, T], of a chunk at input_pos [B, T]."""
    logits = model(tokens, input_pos, slots=key_pos.shape[0])                        # [B, T, V]
    logp = logits.log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    return logp, logits.argmax(-1) == targets


@torch.no_grad()
def score(model: Transformer, texts: list[tuple[list[int], int]], *, batch_size: int = 8, chunk: int = 0,
          step: Callable = score_chunk, progress: Callable[[int, int], None] | None = None) -> list[tuple[float, bool]]:
    """For each (ids, n): the log-probability (nats) of its last n ids after those before them, and whether
    greedy decoding would have said them. Batched by length; logits exist for a few positions at a time, at most `chunk`
    (0: as many as fit)."""
    results: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))               # the longest first: fail early
    for at in range(0, len(order), batch_size):
        batch = order[at:at + batch_size]
        logp, greedy = score_batch(model, [texts[i][0] for i in batch], step, chunk)
        for row, i in enumerate(batch):
            ids, n = texts[i]
            span = slice(len(ids) - 1 - n, len(ids) - 1)
            results[i] = (logp[row, span].double().sum().item(), bool(greedy[row, span].all()))
        if progress:
            progress(min(at + batch_size, len(order)), len(order))
    return results


def score_batch(model: Transformer, rows: list[list[int]], step: Callable, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Position t of the result [B, T - 1] tells of id t + 1. Rows are padded to the right, as in prefill."""
    device, longest = model.norm.weight.device, max(map(len, rows))
    width = -(-max(longest - 1, 1) // PAD) * PAD                # few widths, and each a multiple: see compile_steps
    ids = torch.tensor([row + [0] * (width + 1 - len(row)) for row in rows], device=device)
    make_room(model, len(rows), width)
    chunk = -(-chunk // PAD) * PAD or max(PAD, LOGITS // (len(rows) * model.args.vocab_size) // PAD * PAD)
    found = []
    for begin in range(0, width, chunk):
        end = min(begin + chunk, width)
        tokens, targets = ids[:, begin:end].contiguous(), ids[:, begin + 1:end + 1].contiguous()
        input_pos = torch.arange(begin, end, device=device).expand(tokens.shape).contiguous()
        found.append(step(model, *(symbolic(t, 1) for t in (tokens, targets, input_pos)), attended(model, end)))
    return torch.cat([logp for logp, _ in found], 1), torch.cat([greedy for _, greedy in found], 1)


def scoring_step(compiled: bool) -> Callable:
    return torch.compile(score_chunk, fullgraph=True, dynamic=True) if compiled else score_chunk


# ---- perplexity --------------------------------------------------------------------------------------------

def windows(tokenizer: Tokenizer, text: str, length: int) -> list[tuple[list[int], int]]:
    """Non-overlapping windows of at most `length` ids, the tail too, every id of the text scored once. Each
    begins with BOS; without a BOS with the id before it, so that the first id of all is not scored."""
    ids = tokenizer.encode(text, bos=False)
    if tokenizer.bos_id is not None:
        starts = range(0, len(ids), length - 1)
        return [([tokenizer.bos_id, *ids[i:i + length - 1]], len(ids[i:i + length - 1])) for i in starts]
    return [(ids[i:i + length], len(ids[i:i + length]) - 1) for i in range(0, len(ids) - 1, length - 1)]


def perplexity(model: Transformer, tokenizer: Tokenizer, text: str | list[str], *, length: int = 0,
               **options) -> dict:
    """Nats over all tokens of a text, or of several that do not see each other, divided once. options: as
    `score`'s. Raises ValueError where there is nothing to predict."""
    length = length or min(model.limit, 2048)
    if length < 2:
        raise ValueError(f"max_seq_length is {length}; a window needs 2 tokens or more")
    documents = [text] if isinstance(text, str) else text
    texts = [window for document in documents for window in windows(tokenizer, document, length)]
    tokens, nbytes = sum(n for _, n in texts), sum(len(document.encode()) for document in documents)
    if not tokens:
        raise ValueError("the text is too short: it has no token to predict")
    nats = -math.fsum(logp for logp, _ in score(model, texts, **options))
    return {"perplexity": math.exp(nats / tokens), "nats": nats, "tokens": tokens, "bytes": nbytes,
            "nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / nbytes,
            "documents": len(documents), "windows": len(texts), "window_length": length, "bos_per_window": tokenizer.bos_id is not None}


# ---- lm-eval -----------------------------------------------------------------------------------------------

def adapter(model: Transformer, tokenizer: Tokenizer, o: argparse.Namespace):
    """Our model as lm-eval sees one. Raises ValueError where lm-eval is not installed."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError:
        raise ValueError("--tasks needs lm-eval: pip install 'lm_eval>=0.4.13' (--perplexity FILE needs "
                         "nothing)") from None
    step = scoring_step(o.compile)
    steps = compile_steps(o.compile, model=model)
    limit = min(o.max_seq_length or 2048, model.limit)

    class Ours(TemplateLM):
        tokenizer_name = "fast-generate"
        batch_size = o.batch_size
        max_length = limit

        @property
        def eot_token_id(self) -> int:
            return min(model.end_ids | tokenizer.eos_ids, default=0)

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos_id is None else tokenizer.bos_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            ids = tokenizer.encode(string, bos=add_special_tokens)
            twice = add_special_tokens is None and ids[:2] == [tokenizer.bos_id] * 2     # a template wrote it
            return ids[1:] if twice else ids

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
            texts = [((context + goal)[-(limit + 1):], min(len(goal), limit)) for _, context, goal in requests]
            return score(model, texts, batch_size=o.batch_size, step=step,
                         progress=None if disable_tqdm or o.quiet else progress_line("scored"))

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            cut = [[make_disjoint_window(w) for w in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, limit, 1)] for request in requests]
            flat = self._loglikelihood_tokens([(None, *w) for document in cut for w in document], disable_tqdm)
            logps = iter(logp for logp, _ in flat)
            return [math.fsum(next(logps) for _ in document) for document in cut]

        def generate_until(self, requests, disable_tqdm=False):
            report = None if disable_tqdm or o.quiet else progress_line("generated")
            return generate_until(model, tokenizer, [r.args for r in requests], limit, o.batch_size, steps,
                                  self.tok_encode, report)

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template=False):
            return tokenizer.chat_template if chat_template else None

    return Ours()


def generate_until(model, tokenizer, requests: list, limit: int, batch_size: int, steps, encode,
                   progress) -> list[str]:
    """Answers to (context, {"until": stops, "max_gen_toks": n, temperature, ...}), alike ones in batches."""
    def settings(kwargs: dict) -> tuple:
        until = kwargs.get("until") or []
        new = next((kwargs[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in kwargs), 256)
        sampled = kwargs.get("do_sample") or "do_sample" not in kwargs and kwargs.get("temperature", 0) > 0
        temperature = float(kwargs.get("temperature", 1.0)) if sampled else 0.0
        return (until,) if isinstance(until, str) else tuple(until), new, temperature, kwargs.get("top_p"), \
            kwargs.get("top_k")
    kinds: dict[tuple, list[int]] = {}
    for i, (_, kwargs) in enumerate(requests):
        kinds.setdefault(settings(kwargs), []).append(i)
    answers, done = [""] * len(requests), 0
    for (until, new, temperature, top_p, top_k), members in kinds.items():
        if new >= limit:
            raise ValueError(f"a task asks for {new} new tokens, but a row holds {limit}; raise --max_seq_length")
        prompts = {i: encode(requests[i][0])[-(limit - new):] for i in members}
        members = sorted(members, key=lambda i: -len(prompts[i]))
        for at in range(0, len(members), batch_size):
            batch = members[at:at + batch_size]
            rows = rows_for(model, tokenizer, [prompts[i] for i in batch], new, until)
            how = Sampling.of(model, temperature=temperature, top_p=top_p or 1.0, top_k=top_k or 0,
                              min_p=0.0, repetition_penalty=1.0, seed=0)
            for _ in generate_rows(model, rows, how, steps=steps):
                pass
            for i, row in zip(batch, rows):             # the answer alone, as lm-eval's own model decodes it
                text = tokenizer.decode(row.ids)
                answers[i] = text[:min((text.find(stop) for stop in until if stop in text), default=None)]
            done += len(batch)
            if progress:
                progress(done, len(requests))
    return answers


def run_tasks(model: Transformer, tokenizer: Tokenizer, o: argparse.Namespace) -> dict:
    """lm-eval's results: {"results": {task: {metric: value}}, ...}."""
    ours = adapter(model, tokenizer, o)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=o.include_path)
    unknown = [t for t in o.tasks if t not in manager.all_tasks and not Path(t).is_file()]
    if unknown:
        raise ValueError(f"lm-eval knows no task '{unknown[0]}'; `lm-eval ls tasks` lists them, and --include_path "
                         "FOLDER adds your own")
    return simple_evaluate(model=ours, tasks=o.tasks, task_manager=manager, num_fewshot=o.num_fewshot, limit=o.limit,
                           apply_chat_template=o.apply_chat_template, bootstrap_iters=o.bootstrap_iters,
                           confirm_run_unsafe_code=False)


# ---- the command -------------------------------------------------------------------------------------------

def progress_line(word: str) -> Callable[[int, int], None]:
    """On a terminal after each batch, elsewhere ten times in all."""
    def show(done: int, total: int):
        if sys.stderr.isatty() or done == total or 10 * done // total > 10 * (done - 1) // total:
            print(f"\r{word} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    return show


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Perplexity of a text file, or lm-eval's tasks.")
    add = p.add_argument
    add("--checkpoint_path", default=str(BUNDLED), help="a folder, a file or a hub id; default: the bundled model")
    add("--perplexity", metavar="FILE", help="a text in UTF-8, read as one; or .jsonl, a document with a \"text\" in each line")
    add("--tasks", nargs="+", default=[], help="of lm-eval: hellaswag, winogrande, wikitext, ...")
    add("--include_path", help="a folder with task files of your own")
    add("--limit", type=float, help="documents of each task; below 1: a share")
    add("--num_fewshot", type=int, help="examples before each question; default: the task's")
    add("--apply_chat_template", action="store_true", help="questions through the model's chat template")
    add("--bootstrap_iters", type=int, default=1000, help="for the standard errors; 0: none")
    add("--max_seq_length", type=int, default=0, help="tokens in a window; default: 2048, or what the model takes")
    add("--batch_size", type=int, default=8)
    add("--chunk", type=int, default=0,
        help="tokens of a row in a forward of --perplexity, a multiple of 16; 16, with --batch_size 1, take decode's kernels")
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--compile", action="store_true", help="compile scoring and the one-token step")
    add("--trust_architecture", action="store_true", help="load a model_type this program does not know")
    add("--json", action="store_true", help="print one JSON object")
    add("--quiet", action="store_true", help="nothing on stderr but errors")
    return p


def run(o: argparse.Namespace):
    if not (o.perplexity or o.tasks):
        raise ValueError("nothing to do: give --perplexity FILE or --tasks NAME ...")
    for name, low in (("batch_size", 1), ("max_seq_length", 0), ("chunk", 0)):
        if getattr(o, name) < low:
            raise ValueError(f"{name} is {getattr(o, name)}; it must be {low} or more")
    if o.tasks:
        import importlib.util
        if importlib.util.find_spec("lm_eval") is None:         # before the model is loaded
            adapter(None, None, o)
    text = read_text(o.perplexity) if o.perplexity else ""
    model, tokenizer = load_model(o.checkpoint_path, o.device, o.dtype, trust_architecture=o.trust_architecture)
    if o.max_seq_length > model.limit and not o.quiet:
        print(f"note: max_seq_length {o.max_seq_length} is beyond the {model.limit} tokens the model was trained for",
              file=sys.stderr)
    model.limit = max(model.limit, o.max_seq_length)
    report = {"model": o.checkpoint_path, "quant": describe(model), "dtype": str(model.norm.weight.dtype)[6:],
              "torch": torch.__version__}
    began = time.perf_counter()
    if o.perplexity:
        report |= {"file": o.perplexity} | perplexity(
            model, tokenizer, text, length=o.max_seq_length, batch_size=o.batch_size, chunk=o.chunk,
            step=scoring_step(o.compile), progress=None if o.quiet else progress_line("windows"))
    if o.tasks:
        found = run_tasks(model, tokenizer, o)
        report |= {key: found[key] for key in ("results", "versions", "n-shot") if key in found}
    report["seconds"] = time.perf_counter() - began
    print(json.dumps(report, default=str) if o.json else readable(report, found if o.tasks else None))


def read_text(path: str) -> str | list[str]:
    """A text, or the documents of a .jsonl file."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8: byte {error.start} is not text; convert it first") from None
    if not path.endswith(".jsonl"):
        return text
    return [document(line, path, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def readable(report: dict, tasks: dict | None) -> str:
    lines = []
    if "perplexity" in report:
        begin = "BOS" if report["bos_per_window"] else "the token before"
        lines.append(f"{report['file']}: perplexity {report['perplexity']:.4f}, {report['bits_per_byte']:.4f} bits per "
                     f"byte, {report['nats']:.2f} nats over {report['tokens']:,} tokens ({report['bytes']:,} bytes, "
                     f"{report['documents']} documents) in {report['windows']} windows of at most {report['window_length']}, {begin} first; "
                     f"{report['quant'] or report['dtype']}, {report['seconds']:.1f} s")
    if tasks:
        from lm_eval.utils import make_table
        lines.append(make_table(tasks))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    ranks.hush()
    o = parser().parse_args(argv)
    try:
        ranks.start(o.device)
        run(o)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        ranks.fail(error)
        return 2 if type(error) is ValueError else 1


if __name__ == "__main__":
    sys.exit(main())
