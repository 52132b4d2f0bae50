"""Loader processes: enough room for them before they start, and no harm from the signals that stop a run.

A reader of the paper need not open this file.
"""
import atexit
import contextlib
import multiprocessing
import os
import re
import signal
import time

from runtime.processes import STOPPING, UserError, signalled    # before torch, see there

import torch

PREFETCH = 2                                            # batches that each worker makes ahead
SHM = "/dev/shm"                                        # through which workers hand them over, on Linux
# What torch and the system say where workers cannot be started, or end on the way.
TROUBLE = re.compile(r"DataLoader worker \(pid|shared memory|Too many open files|start new thread|"
                     "temporarily unavailable|allocate memory", re.I)

waited = [0.0]                                          # seconds for batches, of all loaders together


def batches(dataset, workers, batch_sampler, **options):
    """An iterator over a DataLoader's batches. Raises UserError where its workers fail for want of memory,
    open files or processes."""
    if workers:
        check_shared_memory(dataset, batch_sampler, workers)
        options |= dict(prefetch_factor=PREFETCH, worker_init_fn=_ignore_signals)
    iterator, end = None, object()
    while True:
        start = time.perf_counter()
        try:
            if iterator is None:
                with _signals_held():
                    iterator = iter(torch.utils.data.DataLoader(dataset, batch_sampler=batch_sampler,
                                                                num_workers=workers, **options))
                atexit.register(_end_workers)
            batch = next(iterator, end)
        except (OSError, EOFError, RuntimeError, MemoryError) as e:
            # A worker that dies while it hands over a batch breaks the connection.
            trouble = isinstance(e, (ConnectionError, EOFError)) or TROUBLE.search(str(e))
            if not workers or signalled() or not trouble:
                raise
            said = (str(e) or type(e).__name__).splitlines()[0][:200]
            raise UserError(f"the {workers} loader processes failed ({said}): there "
                            f"may be too little memory or {SHM}, too few open files (ulimit -n) or processes "
                            "(ulimit -u); give fewer --workers, 0 for none") from e
        waited[0] += time.perf_counter() - start
        if batch is end:
            return
        yield batch


@contextlib.contextmanager
def _signals_held():
    """SIGTERM and SIGHUP wait until the block is over. A worker that starts in it is born with them held, and
    lets go when it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):                                             # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker):
    """In a worker: torchrun and clusters signal all processes of a group. The main process finishes its step,
    for which it needs the workers, and they end with it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _end_workers():
    """When Python ends, multiprocessing would send SIGTERM, which they ignore, and wait for them for ever."""
    if hasattr(signal, "SIGCHLD"):                   # PyTorch's handler raises where a worker ends otherwise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def room(path):
    """(bytes, free bytes) of the file system at `path`."""
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def check_shared_memory(dataset, batch_sampler, workers):
    """Refuse to start workers whose batches do not fit into /dev/shm: they would hang, without a word."""
    keys = next(iter(batch_sampler), None)
    if not os.path.isdir(SHM) or not keys:
        return
    item = dataset[keys[0]]
    if isinstance(item, UserError):                                      # which the loader will raise
        return
    held = sum(value.nbytes for value in item if isinstance(value, torch.Tensor)) * len(keys)
    held *= workers * PREFETCH
    total, free = room(SHM)
    everyone = held * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if held > free or everyone > total:
        raise UserError(f"{SHM} has {free / 1e6:,.0f} of {total / 1e6:,.0f} MB free, but the loader's "
                        f"{workers} processes hold {everyone / 1e6:,.0f} MB in it: start the container with "
                        "--shm-size=2g or --ipc=host, or in training give fewer --workers (0: none)")
