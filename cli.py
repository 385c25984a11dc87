"""The command line of generate.py: flags, prompts, chat, figures. `python generate.py --help` lists the
flags.

What it is not: how text is generated; that is generate.py, which this file only calls. stdout carries the
generated text, or with --json one object, and nothing else; notes and figures go to stderr. Exit codes: 2
for a wrong argument, 1 for a run that failed, 130 for Ctrl-C; an error is one sentence.
"""
import argparse
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

import ranks
from experts import pack_part
from figures import bytes_per_token, peak_memory, probe_bandwidth
from generate import (BUCKET, BUNDLED, EAGER, PAD, Figures, Row, Steps, compile_steps, decode_n_tokens, generate_rows, load_model,
                      make_room, rows_for, run_prefill)
from kernels import cpu, cpu_block
from model import Transformer
from quantize import describe
from sampling import Sampler, Sampling
from speculate import (MOST, Acceptance, Speculation, SpeculativeSteps, check_same_tokens,
                       compile_speculation, plain_step_seconds)
from speculate import warm_up as warm_up_speculation
from tokenizer import Tokenizer


# ---- flags -------------------------------------------------------------------------------------------------

def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


def guesses(text: str) -> int | str:
    if text != "auto" and not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is not in 1 ... {MOST}, the tokens for which the cache has "
                                         "room behind the text, nor auto")
    return text if text == "auto" else int(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(usage="%(prog)s [flags]; --help lists them",
                                description="Generate text, to stdout; figures and notes go to stderr.")
    add = p.add_argument
    add("--checkpoint_path", default=str(BUNDLED),
        help="a folder, a file or a hub id; default: the bundled model")
    add("--prompt", nargs="+", action="extend", default=[],
        help="text, or an integer for that many synthetic tokens; several make one batch of different rows")
    add("--prompt_file", help="read one prompt from this file, - for stdin")
    add("--chat", action="store_true",
        help="use the model's chat template: answer --prompt, or without it converse")
    add("--system", help="the system message of a chat")
    add("--template_arg", action="append", default=[], metavar="KEY=VALUE",
        help="variable for the chat template")
    add("--interactive", action="store_true", help="read prompts line by line, each a text of its own")
    add("--num_samples", type=positive, default=1, help="run the prompts this many times, with other seeds")
    add("--batch_size", type=positive, default=1, help="rows per prompt, each drawn on its own")
    add("--max_new_tokens", type=not_negative, help="default: 256, or what fits; in a chat 1024")
    add("--max_seq_length", type=positive,
        help="tokens a row may hold, prompt included; default: the model's own limit")
    add("--temperature", type=float, help="0: the most likely token; default: the model's, else 0.8")
    add("--top_k", type=int,
        help="draw from the k most likely tokens; 0: off; default: the model's, else 200")
    add("--top_p", type=float, help="draw from the most likely tokens that make up this mass; 1: off")
    add("--min_p", type=float, help="drop tokens less likely than this times the most likely; 0: off")
    add("--repetition_penalty", type=float, help="1: off")
    add("--seed", type=not_negative, help="same seed, same text; default: another one each run")
    add("--stop", action="append", default=[], help="a string that ends the text; may be repeated")
    add("--ignore_eos", action="store_true", help="generate max_new_tokens whatever comes")
    add("--device", default="auto",
        help="cpu, cuda, cuda:1, mps, xpu; default: the accelerator if there is one")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--compile", action="store_true", help="compile the one-token step (some seconds to a minute, once)")
    add("--compile_prefill", action="store_true", help="compile the prompt's step too")
    add("--draft_checkpoint_path", metavar="PATH",
        help="a smaller model with the same tokenizer: it guesses, the model checks several tokens a step")
    add("--prompt_lookup", action="store_true",
        help="guess without a draft: copy what followed the last tokens where they stood before")
    add("--speculate_k", type=guesses, metavar="K",
        help=f"tokens to guess a step, 1 to {MOST}, or auto: as many as pay, perhaps none; default: 4")
    add("--lookup_ngram", type=positive, metavar="N",
        help="longest run of tokens that is looked up; default: 3")
    add("--profile", metavar="FILE", help="write a trace of the last sample for chrome://tracing")
    add("--json", action="store_true",
        help="print one JSON object with texts and figures instead of the text")
    add("--quiet", action="store_true", help="nothing on stderr but errors")
    add("--trust_architecture", action="store_true", help="load a model_type this program does not know")
    return p


# ---- prompts -----------------------------------------------------------------------------------------------

def say(o: argparse.Namespace, text: str):
    if not o.quiet:
        print(text, file=sys.stderr, flush=True)


def read_prompt_file(path: str) -> str:
    """Its text without the last newline; - is stdin."""
    if path == "-":
        data = ranks.hear(lambda: sys.stdin.buffer.read().decode("latin-1")).encode("latin-1")
    else:
        data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file '{path}' is not UTF-8: byte {error.start} is "
                         f"0x{data[error.start]:02x}; convert it first") from None
    if not text:
        raise ValueError(f"the prompt is empty: prompt_file '{path}' has no text")
    return text


def read_prompts(o: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> list:
    """The prompts of the command line and the file as text, chat messages as ids, --prompt's integers as that many
    synthetic ids."""
    prompts = o.prompt + ([o.file_text] if o.file_text else []) or ["Once upon a time"]
    for i, prompt in enumerate(prompts):
        if i < len(o.prompt) and prompt.isascii() and prompt.isdigit():
            ids = torch.randint(min(vocab_size, tokenizer.vocab_size), (int(prompt),),
                                generator=torch.Generator().manual_seed(0))
            prompts[i] = ids.tolist()
        elif o.chat:
            prompts[i] = chat_ids(o, tokenizer, [*system_message(o), {"role": "user", "content": prompt}])
    return prompts * o.batch_size


def system_message(o: argparse.Namespace) -> list[dict]:
    return [{"role": "system", "content": o.system}] if o.system else []


def chat_ids(o: argparse.Namespace, tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """A conversation as ids, through the model's template; without one as plain text, a message a line."""
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n".join(m["content"] for m in messages))
    arguments = {}
    for item in o.template_arg:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--template_arg '{item}' is not KEY=VALUE")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return tokenizer.encode_chat(messages, **arguments)


def sampling_flags(o: argparse.Namespace, sample: int = 0) -> dict:
    flags = {name: getattr(o, name) for name in Sampling.__dataclass_fields__}
    return flags | ({"seed": o.seed + sample} if o.seed is not None else {})


# ---- one run -----------------------------------------------------------------------------------------------

def load_speculation(o: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, report: dict):
    """What the flags ask for: a Speculation, or None."""
    if not (o.draft_checkpoint_path or o.prompt_lookup):
        return None
    draft = None
    if o.draft_checkpoint_path:
        draft, draft_tokenizer = load_model(o.draft_checkpoint_path, model.norm.weight.device, o.dtype,
                                            trust_architecture=o.trust_architecture)
        check_same_tokens(tokenizer, draft_tokenizer)
        ours, theirs = bytes_per_token(model), bytes_per_token(draft)
        say(o, f"draft {o.draft_checkpoint_path}: {theirs / 1e6:.1f} MB a token beside the model's "
               f"{ours / 1e6:.1f}")
        if theirs >= ours:
            say(o, f"note: the draft reads {theirs / 1e6:.1f} MB a token, the model {ours / 1e6:.1f}; only a "
                   "smaller draft saves time")
        if draft.limit < model.limit:
            say(o, f"note: the draft was trained for {draft.limit} tokens, the model may hold {model.limit}; "
                   "beyond, it guesses badly, and the text stays right")
        report["draft"] = o.draft_checkpoint_path
    steps = compile_speculation(model, draft) if o.compile else SpeculativeSteps()
    return Speculation(draft, o.speculate_k or 4, o.lookup_ngram or 3, steps)


def warm_up(o: argparse.Namespace, model: Transformer, steps: Steps, rows: list[Row], length: int, tokenizer: Tokenizer,
            speculation) -> float:
    """Compile what such rows of `length` tokens will use, and return the seconds it took."""
    if steps == EAGER and (not speculation or speculation.steps == SpeculativeSteps()):
        return 0.0
    began, n, filled = time.perf_counter(), len(rows), max(len(row.prompt) for row in rows) + 1
    later = [slots + 1 for slots in (BUCKET << i for i in range(20)) if filled <= slots < length] if steps.blocks else []
    with torch.no_grad():
        make_room(model, n, length)
        zeros = torch.zeros(n, dtype=torch.long, device=model.norm.weight.device)
        # a recorded block holds its draws and the slots it looks at: so they are the run's own
        sampler = Sampler(Sampling.of(model, **sampling_flags(o, 0)), [[0]] * n, model.args.vocab_size, zeros.device)
        for _ in range(2):              # the second time finds every graph there; on CUDA it records them
            if steps.pad > 1:
                run_prefill(model, steps, [[0] * PAD] * n)
            for slots in (filled, *later):
                for _ in decode_n_tokens(model, steps, zeros, zeros, slots, 2, sampler, rows[0].ends):
                    pass
    if speculation:
        warm_up_speculation(speculation, model, steps, tokenizer, n, length)
    return time.perf_counter() - began


def run_prompts(o: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, speculation, report: dict):
    """Answer the prompts num_samples times, streaming when there is but one row, and report each run."""
    prompts = read_prompts(o, tokenizer, model.args.vocab_size)
    new = o.max_new_tokens
    if new is None:                     # a default bends to what fits, a wish does not
        longest = max(len(p if isinstance(p, list) else tokenizer.encode(p)) for p in prompts)
        new = max(min(256, model.limit - longest), 1)
    steps = compile_steps(o.compile, o.compile_prefill, model)
    rows = rows_for(model, tokenizer, prompts, new, o.stop, o.ignore_eos, o.chat)
    length = max(len(row.prompt) for row in rows) + new
    report["compile_s"] = warm_up(o, model, steps, rows, length, tokenizer, speculation)
    single = len(rows) == 1 and not o.json
    if single and sys.stdout.isatty() and sys.stderr.isatty() and isinstance(prompts[0], str):
        print(prompts[0], end="", file=sys.stderr, flush=True)      # so that a person reads the whole text
    finished, total = [], Figures()
    for sample in range(o.num_samples):
        settings, figures = Sampling.of(model, **sampling_flags(o, sample)), Figures()
        if sample:
            rows = rows_for(model, tokenizer, prompts, new, o.stop, o.ignore_eos, o.chat)
        with tracing(o.profile if sample == o.num_samples - 1 else None, model):
            for _, piece in generate_rows(model, rows, settings, steps=steps, figures=figures,
                                          speculation=speculation):
                if single:
                    print(piece, end="", flush=True)
        if single:
            print(flush=True)
        for i, row in enumerate([] if single or o.json else rows):
            say(o, f"row {i + 1} of {len(rows)}:")
            print(row.text, flush=True)
        report_run(o, model, report, rows, settings, figures, speculation)
        if speculation:
            report_speculation(o, model, steps, speculation, report, rows, settings, figures)
        finished += rows
        total = Figures(**{k: v + getattr(total, k) for k, v in asdict(figures).items()})
    if o.json:
        print(json.dumps(summary(model, report, finished, total, settings)))


@contextmanager
def tracing(path: str | None, model: Transformer):
    if path is None:
        yield
        return
    path += f".rank{ranks.rank()}" if ranks.size() > 1 else ""
    Path(path).touch()                  # fail now, not after the work
    with torch.profiler.profile() as profile:
        yield
    profile.export_chrome_trace(path)


# ---- figures -----------------------------------------------------------------------------------------------

def rate(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def report_run(o, model: Transformer, report: dict, rows: list[Row], settings: Sampling, f: Figures,
               speculation: Speculation | None = None):
    """One line of figures. Bandwidth: the bytes all steps read, over the decode time, beside what the
    machine reads."""
    steps = max((len(row.ids) for row in rows), default=1) - 1
    report["bytes_per_token"] = bytes_per_token(model)
    read = report["bytes_per_token"] * (speculation.acceptance.model_steps if speculation else steps)
    if speculation and speculation.draft is not None:
        read += bytes_per_token(speculation.draft) * speculation.acceptance.draft_steps
    report["bandwidth_gbs"] = rate(read, f.decode_s) / 1e9
    if (o.json or not o.quiet) and "bandwidth_probe_gbs" not in report:
        report["bandwidth_probe_gbs"] = probe_bandwidth(model.norm.weight.device) / 1e9
    if report.get("compile_s"):
        say(o, f"compiled in {report['compile_s']:.1f} s")
    say(o, f"prefill {f.prompt_tokens} tokens, {rate(f.prompt_tokens, f.prefill_s):.1f} tok/s; "
           f"first token after {f.ttft_s:.3f} s; "
           f"decode {f.decode_tokens} tokens, {rate(f.decode_tokens, f.decode_s):.1f} tok/s, "
           f"{report['bytes_per_token'] / 1e6:.1f} MB a token, "
           f"{report['bandwidth_gbs']:.1f} of {report.get('bandwidth_probe_gbs', 0):.1f} GB/s; "
           f"peak memory {peak_memory(model.norm.weight.device) / 1e9:.2f} GB; "
           f"seed {settings.seed}; "
           f"{', '.join(sorted({row.finish_reason for row in rows}))}")


def report_speculation(o, model: Transformer, steps: Steps, speculation: Speculation, report: dict,
                       rows: list[Row], settings: Sampling, f: Figures):
    """A line on what speculation brought; report["acceptance"] and ["speedup"] sum up all samples. The
    speed-up compares with plain steps timed now, behind the text, so that both see the same machine."""
    report.setdefault("acceptances", Acceptance()).add(speculation.acceptance)
    report["acceptance"] = report["acceptances"].figures()
    if f.decode_s and (o.json or not o.quiet):
        plain = plain_step_seconds(model, steps, rows, settings) * (max(len(row.ids) for row in rows) - 1)
        times = report.setdefault("speculation_times", [0.0, 0.0])
        times[:] = times[0] + plain, times[1] + f.decode_s
        report["speedup"] = rate(*times)
    a = speculation.acceptance.figures()
    say(o, f"speculation: {a['tokens_per_step']:.2f} tokens a step; of {sum(a['histogram'])} blocks "
           f"{', '.join(f'{count} accepted {n}' for n, count in enumerate(a['histogram']))}, "
           f"{a['mean']:.2f} on average, {100 * a['rate']:.0f} % of what was guessed; "
           f"{a['plain_steps']} plain steps; "
           f"{report.get('speedup', 0):.2f} x the speed of plain steps timed after the text")


def summary(model: Transformer, report: dict, rows: list[Row], f: Figures, settings: Sampling) -> dict:
    """The object that --json prints; keys are stable, numbers are numbers."""
    report = {key: value for key, value in report.items() if key not in ("acceptances", "speculation_times")}
    return report | asdict(settings) | {
        "prompt_tokens": f.prompt_tokens, "prefill_s": f.prefill_s,
        "prefill_tok_s": rate(f.prompt_tokens, f.prefill_s),
        "ttft_s": f.ttft_s, "new_tokens": f.new_tokens, "decode_s": f.decode_s,
        "decode_tok_s": rate(f.decode_tokens, f.decode_s),
        "peak_mem_bytes": peak_memory(model.norm.weight.device),
        "text": rows[0].text, "finish_reason": rows[0].finish_reason,
        "rows": [{"text": row.text, "ids": row.ids, "prompt_tokens": len(row.prompt),
                  "new_tokens": len(row.ids), "finish_reason": row.finish_reason} for row in rows]}


# ---- conversation ------------------------------------------------------------------------------------------

def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def read_turn() -> str:
    """One message from stdin; a line that ends in a backslash goes on. EOFError at the end of the input."""
    lines = []
    while True:
        print("... " if lines else "> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line and not lines:
            raise EOFError
        lines.append(line.rstrip("\n").removesuffix("\\"))
        if not line.rstrip("\n").endswith("\\"):
            return "\n".join(lines)


def converse(o: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, speculation, report: dict):
    """Read, answer, repeat. In a chat the whole conversation is rendered each turn, and only the part that
    differs from what the cache holds is run. Ctrl-C stops the answer, and what was printed of it stays in
    the conversation."""
    steps = compile_steps(o.compile, o.compile_prefill, model)
    # room for a long talk at once: each time the cache grows, a compiled step is compiled anew
    rows = rows_for(model, tokenizer, [[0]], 1, o.stop, o.ignore_eos, o.chat)
    report["compile_s"] = warm_up(o, model, steps, rows, min(model.limit, 4096) - PAD, tokenizer, speculation)
    say(o, "/reset forgets the conversation, /system TEXT sets the system message, /exit or the input's end "
           "ends it.")
    messages, held = system_message(o), []          # held: the ids whose keys and values are in the cache
    while True:
        try:
            text = ranks.hear(read_turn)
        except EOFError:
            return
        command, _, argument = text.strip().partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            o.system = argument or None if command == "/system" else o.system
            messages = system_message(o)
            continue
        if not text.strip():
            continue
        asked = [*messages, {"role": "user", "content": text}] if o.chat else []
        try:
            ids = chat_ids(o, tokenizer, asked) if o.chat else tokenizer.encode(text)
            default = max(min(1024 if o.chat else 256, model.limit - len(ids)), 1)
            new = default if o.max_new_tokens is None else o.max_new_tokens
            row = rows_for(model, tokenizer, [ids], new, o.stop, o.ignore_eos, o.chat)[0]
        except ValueError as error:              # too long, or the template refuses: the conversation goes on
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        held = answer(o, model, row, steps, min(common_prefix(held, ids), len(ids) - 1), speculation, report)
        messages = [*asked, {"role": "assistant", "content": row.text}] if o.chat else []


def answer(o, model: Transformer, row: Row, steps: Steps, cached: int, speculation,
           report: dict) -> list[int]:
    """Print one answer; return the ids that the cache holds afterwards."""
    figures, settings = Figures(), Sampling.of(model, **sampling_flags(o))
    try:
        pieces = generate_rows(model, [row], settings, steps=steps, cached=cached, figures=figures,
                               speculation=speculation)
        with closing(pieces):
            for _, piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        row.finish_reason = "interrupted"
    print(flush=True)
    report_run(o, model, report, [row], settings, figures, speculation)
    if speculation:
        report_speculation(o, model, steps, speculation, report, [row], settings, figures)
    return row.prompt + row.ids[:-1] if row.ids else row.prompt[:cached]    # the last id was never fed


# ---- entry -------------------------------------------------------------------------------------------------

def conversing(o: argparse.Namespace) -> bool:
    return o.interactive or (o.chat and not o.prompt and not o.prompt_file)


def load_compiler():
    """It takes two seconds: meanwhile, the weights are read."""
    with suppress(Exception):           # an inner matter of PyTorch's: where it has moved, it takes its time later
        importlib.import_module("torch._inductor.compile_fx")
        importlib.import_module("torch._inductor.codecache").CacheBase.get_system()


def load(o: argparse.Namespace, report: dict) -> tuple[Transformer, Tokenizer]:
    """The model of --checkpoint_path. Another entry script may bring its own, and add to the report."""
    compiler, wanted = threading.Thread(target=load_compiler, daemon=True), o.compile or o.compile_prefill

    def pack(model: Transformer, part: torch.nn.Module):
        pack_part(model, part)
        if wanted and compiler.ident is None and part is not model and not cpu_block.known(part, PAD if o.compile_prefill else 1):
            compiler.start()            # something is not one call
    if not conversing(o):               # whoever stays for a talk gains more from the faster step
        cpu.HURRY["pages are slow"] = False
    return load_model(o.checkpoint_path, o.device, o.dtype, pack, trust_architecture=o.trust_architecture)


def run(o: argparse.Namespace, load: Callable = load):
    ranks.start(o.device)
    ranks.same("their flags", {k: v for k, v in vars(o).items() if not k.endswith("path")})
    o.file_text = read_prompt_file(o.prompt_file) if o.prompt_file else None        # a wrong path fails before the model loads
    began, report = time.perf_counter(), {}
    model, tokenizer = load(o, report)
    weight = model.norm.weight
    if o.max_seq_length is not None:
        if o.max_seq_length > model.args.max_position:
            say(o, f"note: max_seq_length {o.max_seq_length} is beyond the {model.args.max_position} tokens "
                   "the model was trained for")
        model.limit = o.max_seq_length
    report |= {"model": o.checkpoint_path, "params": model.n_parameters,
              "dtype": str(weight.dtype).removeprefix("torch."), "quant": describe(model), "device": str(weight.device),
              "torch": torch.__version__, "python": sys.version.split()[0],
              "load_s": time.perf_counter() - began}
    say(o, f"{o.checkpoint_path}: {report['params'] / 1e6:.1f} M parameters, "
           f"{report['quant'] + ' and ' if report['quant'] else ''}{report['dtype']} on "
           f"{f'{ranks.size()} ranks, here ' if ranks.size() > 1 else ''}{weight.device}, "
           f"loaded in {report['load_s']:.2f} s")
    speculation = load_speculation(o, model, tokenizer, report)
    if o.chat and tokenizer.chat_template is None:
        say(o, "note: this model has no chat template; messages go in as plain text")
    elif tokenizer.chat_template is not None and not (o.chat or o.interactive):
        say(o, "note: this model has a chat template; --chat uses it")
    if conversing(o):
        converse(o, model, tokenizer, speculation, report)
    else:
        run_prompts(o, model, tokenizer, speculation, report)


def main(argv: list[str] | None = None, p: argparse.ArgumentParser | None = None, load: Callable = load) -> int:
    ranks.hush()
    p = p or parser()
    o = p.parse_args(argv)
    o.quiet = o.quiet or o.json
    try:
        if any(getattr(o, name) is not None for name in Sampling.__dataclass_fields__):
            Sampling(**{k: v for k, v in sampling_flags(o).items() if v is not None}).check()
    except ValueError as error:
        p.error(str(error))
    if {"", "0"} & set(o.prompt):
        p.error("the prompt is empty; give some text, or a number of synthetic tokens from 1 on")
    if o.draft_checkpoint_path and o.prompt_lookup:
        p.error("--draft_checkpoint_path and --prompt_lookup both guess; give one of them")
    if o.speculate_k and not (o.draft_checkpoint_path or o.prompt_lookup):
        p.error("--speculate_k needs --draft_checkpoint_path or --prompt_lookup to guess with")
    if o.lookup_ngram and not o.prompt_lookup:
        p.error("--lookup_ngram belongs to --prompt_lookup")
    try:
        run(o, load)
    except torch.OutOfMemoryError as error:
        ranks.fail(f"out of memory on {o.device}: {str(error).splitlines()[0]}")
        return 1
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):                      # the reader has enough: not an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        ranks.fail(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if ranks.size() == 1:
            raise
        ranks.fail(f"rank {ranks.rank()} lost the others: {str(error).splitlines()[0]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
