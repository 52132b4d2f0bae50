"""Scripts as forks of a server that has imported everything, which takes a new interpreter three seconds, and
torchrun three interpreters. Where the start itself is tested, tests start the scripts as users do.
"""
import importlib
import multiprocessing
import os
import socket
import sys

import torch

from runtime import processes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_tokenizer", "train_diffusion", "sample", "evaluate", "forked"])


def child(script, argv, environment, log, prepare=None):
    """In a fork: run script.main(argv) as a script, its output appended to the file `log`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    if prepare is not None:
        prepare()
    processes.run(lambda: importlib.import_module(script).main(argv))


def in_two_processes(script, argv, log, prepare=None):
    """script.main(argv) in two processes of one group, as torchrun has them. Raises AssertionError with their
    output if one fails. prepare: called in both before; a function of a test module."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [SERVER.Process(target=child, args=(script, [str(a) for a in argv],
                                                group | {"RANK": str(n), "LOCAL_RANK": str(n)}, log, prepare))
             for n in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [0, 0], open(log).read()


# This module can take the place of subprocess in study.study.
from subprocess import TimeoutExpired  # noqa: E402, F401


class Popen:
    """In place of subprocess.Popen of [python, PATH/SCRIPT.py, ...] with stdout=an open file."""

    def __init__(self, argv, stdout, stderr, env):
        script = os.path.basename(argv[1]).removesuffix(".py")
        self.process = SERVER.Process(target=child, args=(script, [str(a) for a in argv[2:]],
                                                          {"OMP_NUM_THREADS": "1"}, stdout.name))
        self.process.start()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutExpired("a fork", timeout)
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()
