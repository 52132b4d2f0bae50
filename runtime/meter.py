"""What a run costs: memory, time waited for data, and the part of the GPU's speed that it uses.

A reader of the paper need not open this file.
"""
import contextlib
import functools
import sys
import time

from runtime.processes import autocast_dtype    # before torch, see there
from runtime import loaders

import torch
from torch.utils.flop_counter import FlopCounterMode

try:
    import resource
except ImportError:                                                                               # Windows
    resource = None


class Meter:
    """Of one training loop and process, for the lines of its log."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        self.waited, self.counter = loaders.waited[0], None
        self.flops, self.terms = 0, None              # of a step, and the loss's terms when they were counted

    @contextlib.contextmanager
    def counted(self, terms):
        """Around a step. terms: the names of the loss's terms so far; new ones mean other operations."""
        if self.device.type == "cuda" and terms != self.terms:
            self.terms, self.counter = terms, FlopCounterMode(display=False)
            self.counter.__enter__()
        try:
            yield
        finally:
            self.end_step()

    def end_step(self):
        """The step itself is over; what follows, such as drawing, is not counted."""
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.flops, self.counter = self.counter.get_total_flops(), None

    def read(self, steps, seconds):
        """{name: value} since the last call, `steps` and `seconds` ago."""
        waited, self.waited = loaders.waited[0] - self.waited, loaders.waited[0]
        found = {"data_wait_seconds": waited, "peak_memory_gib": peak_memory(self.device)}
        if self.flops:
            found["gpu_speed_used"] = self.flops * steps / seconds / product_speed(self.device, self.dtype)
        return found


def peak_memory(device):
    """The most memory so far, GiB: of the GPU, as PyTorch allots it, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


@functools.cache
def product_speed(device, dtype, size=8192, times=10):
    """FLOP/s of a large matrix product in --dtype on this GPU: its peak, measured once, in milliseconds."""
    a = torch.ones(size, size, device=device, dtype=autocast_dtype(dtype, device))
    for repeat in range(2):                                                                # first: warm-up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            torch.mm(a, a)
        torch.cuda.synchronize(device)
    return times * 2 * size ** 3 / (time.perf_counter() - start)
