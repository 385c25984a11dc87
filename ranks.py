"""The processes that torchrun started, as ranks of one program: who is there, who talks, and what all agree on.

What it is: a thin layer over torch.distributed, NCCL on CUDA and gloo elsewhere; with one process every function is a
no-op. Rank 0 reads the input, its draws are everybody's, it alone prints; whichever rank fails first says why. What it
is not: how a model is shared out; that is tp.py, which is what to read next.
"""
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import cpu


def start(device: str = "auto"):
    """Join the ranks that torchrun started, if there are several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # torchrun ends on Ctrl-C; who waits for a sum would not hear it
    on_cuda = device.startswith(("auto", "cuda")) and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(minutes=10))
    if on_cuda:                         # small messages in one step over NVLink: compiled code chooses by size
        try:
            from torch.distributed._symmetric_memory import enable_symm_mem_for_group
            enable_symm_mem_for_group(dist.group.WORLD.group_name)
            torch._inductor.config._collective.auto_select = True
        except (ImportError, AttributeError, RuntimeError) as error:
            print(f"note: all-reduce goes through NCCL alone: {str(error).splitlines()[0]}", file=sys.stderr)


@cache
def share_memory() -> bool:
    """Whether all ranks run on CPUs of this machine and can add up small tensors in its memory, which takes a tenth of
    gloo's time. The file they map has no name any more afterwards."""
    if dist.get_backend() != "gloo" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return False
    store, path = dist.distributed_c10d._get_default_store(), ""
    if rank() == 0:
        if os.path.isdir("/dev/shm"):
            file, path = tempfile.mkstemp(dir="/dev/shm")
            os.close(file)
        store.set("shared memory", path)
    path = store.get("shared memory").decode()
    joined = torch.tensor(float(path != "" and cpu.share_memory(path, rank(), size())))
    dist.all_reduce(joined, dist.ReduceOp.MIN)
    if path and rank() == 0:
        os.unlink(path)
    return bool(joined)


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def hush():
    """Only rank 0 talks: what the others print goes nowhere."""
    if int(os.environ.get("RANK", 0)):
        sys.stdout = sys.stderr = open(os.devnull, "w")


def notice(text: str, told=set()):
    """One line on stderr, once."""
    if text not in told:
        told.add(text)
        print(f"note: {text}", file=sys.stderr, flush=True)


def fail(reason: str | Exception):
    """One message, from whichever rank fails first; the others fail because of it."""
    message = str(reason) or type(reason).__name__
    if isinstance(reason, OSError) and reason.strerror and reason.filename:
        message = f"'{reason.filename}': {reason.strerror}"     # without the number
    if size() == 1 or dist.distributed_c10d._get_default_store().add("failed", 1) == 1:
        print(f"error: {message}", file=sys.__stderr__ if rank() else sys.stderr, flush=True)    # others are hushed


def agree(t: Tensor) -> Tensor:
    """Rank 0's values, on every rank: seeds alone could let ranks drift apart."""
    if size() > 1:
        t = t.contiguous()
        dist.broadcast(t, 0)
    return t


def same(what: str, value):
    """ValueError on every rank where not all have the same value: unlike programs would wait for each other."""
    told = [value] * size()
    if size() > 1:
        dist.all_gather_object(told, value)
    if told != [value] * size():
        raise ValueError(f"the ranks differ in {what}: start all of them with the same command and checkpoint")


def hear(ask: Callable[[], str], turns=count()) -> str:
    """What `ask` returns on rank 0, EOFError too. Through the store: a person may think for longer than a
    collective waits."""
    if size() == 1:
        return ask()
    store, key = dist.distributed_c10d._get_default_store(), f"heard {next(turns)}"
    if rank() == 0:
        try:
            store.set(key, "+" + ask())
        except EOFError:
            store.set(key, "-")
    store.wait([key], timedelta(days=30))
    text = store.get(key).decode()
    if text == "-":
        raise EOFError
    return text[1:]
