"""What a run reads, and what its machine could: bytes per token, memory bandwidth, memory at its peak.

What it is not: the figures' printing, which is cli.py's, or a benchmark: that is scripts/benchmark.py.
"""
import sys
import time

import torch

from kernels import cpu
from model import KVCache, MoEFeedForward, Transformer


def bytes_per_token(model: Transformer) -> int:
    """Weight bytes that one decode step reads: everything but an embedding table that is not also the
    head, and the experts that a token does not choose."""
    unread = None if model.output is None else model.tok_embeddings
    modules = [m for m in model.modules() if m is not unread and not isinstance(m, KVCache)]

    def weights(modules) -> int:
        return sum(t.nbytes for m in modules for n, t in [*m.named_parameters("", False), *m.named_buffers("", False)]
                   if not (n in ("weight", "scales", "zeros") and getattr(m, "packed", None) is not None))     # twins, for many rows
    idle = [(moe, 1 - moe.active / len(moe.experts)) for moe in modules if isinstance(moe, MoEFeedForward)]
    return weights(modules) - round(sum(weights(moe.experts.modules()) * share for moe, share in idle))


def probe_bandwidth(device: torch.device, nbytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second at which the device reads memory: the best of a few passes over a buffer larger than
    its caches."""
    data = cpu.in_large_pages(nbytes).view(torch.int64) if device.type == "cpu" else \
        torch.empty(nbytes // 8, dtype=torch.int64, device=device)         # as packed weights lie
    data.fill_(1)
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        data.max().item()
        best = max(best, nbytes / (time.perf_counter() - began))
    return best


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process had resident on the host, or allocated on the device. 0 where nothing
    tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource                 # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
