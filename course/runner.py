"""The process in which tests run: pytest, called once, with functions exchanged between rounds.

It reads a job from stdin (marshal, a dict) and writes a line of JSON per test to the file descriptor
job["fd"], a pipe, which it cannot read back:

    rounds   a list of dicts: `name`; `put`, {"maetok.py:random_mask": code object}, what functions are to do
             in this round (all others do what the source says); `tests`, node ids, where that of a
             parametrised test without [...] means all of its cases; `first`, stop at the first that fails;
             and, where it differs from the process's, `seed`, of the hidden tests' data; `limit`, seconds
             of the processor after which a test fails
    more     whether to read a list of further rounds from stdin when these have been run. Until then the
             process knows nothing of them
    seed     of the hidden tests' data: in the environment while tests are collected, and not afterwards
    nonce    goes into every line; the parent believes no other line
    fence    the only folder in which files may be changed, and with Python's own the only one that may be
             read, or None for no fence; `closed`, folders not to be read wherever they are
    temp     a folder for pytest's temporary files

A function is exchanged by its __code__, in place: modules that imported it by name get the new one too, and
pytest need not collect the tests again.
"""
import importlib
import json
import marshal
import os
import signal
import sys
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol


def function(place):
    """The function at "study/theory.py:mixture_score", under its decorators."""
    file, name = place.split(":")
    found = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    return found


def selected(item, test):
    return item.nodeid == test or item.nodeid.startswith(test + "[")


def out_of_time(*_):
    raise TimeoutError("this test has run for too long")


class Rounds:
    """The plugin. Reports go to `write`, a callable that takes a dict; `more`, None or a callable, returns
    the rounds that come when the others are done."""

    def __init__(self, rounds, write, more=None):
        self.rounds, self.write, self.more = rounds, write, more

    def pytest_collectreport(self, report):
        if report.failed:
            self.write({"broken": str(report.longrepr)[-600:]})

    def pytest_runtestloop(self, session):
        os.environ.pop("COURSE_SEED", None)
        self.write({"started": True})       # nothing of a submission has run yet
        for part in self.rounds:
            self.exchange_and_run(session.items, part)
        if self.more:
            self.write({"answered": True})
            for part in self.more():
                self.exchange_and_run(session.items, part)
        self.write({"finished": True})
        return True

    def exchange_and_run(self, items, part):
        functions = {place: function(place) for place in part["put"]}
        before = {place: f.__code__ for place, f in functions.items()}
        if "seed" in part:
            importlib.import_module("course.hidden.given").SEED = part["seed"]
        self.limit = part.get("limit", 0)                                   # 0: none
        for place, f in functions.items():
            f.__code__ = part["put"][place]
        try:
            self.run(items, part)
        finally:
            for place, f in functions.items():
                f.__code__ = before[place]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        signal.signal(signal.SIGPROF, out_of_time)
        signal.setitimer(signal.ITIMER_PROF, self.limit)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def run(self, items, part):
        for test in part["tests"]:
            for item in (item for item in items if selected(item, test)):
                reports = runtestprotocol(item, nextitem=None, log=False)
                outcome, reason = outcome_of(reports)
                self.write({"round": part["name"], "test": test, "outcome": outcome, "reason": reason,
                            "seconds": sum(report.duration for report in reports)})
                if outcome == "failed" and part["first"]:
                    return


def outcome_of(reports):
    """("passed" or "failed" or "skipped", why) of a test's three phases."""
    for report in reports:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            return "failed", crash.message if crash else str(report.longrepr)
        if report.skipped:
            return "skipped", str(report.longrepr[2])
    return "passed", ""


def put_up_fence(closed, fence):
    """An audit hook, which Python code cannot take down again: no changes outside `fence`; no reading except
    there, of Python and its packages, and of what the system tells everybody; nothing in `closed`; no
    processes, no network, no C functions, no look at the interpreter's objects."""
    inside = lambda path, folder: path == folder or path.startswith(folder + os.sep)
    python = [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sys.path[1:]) if path]
    readable = ["/usr", "/lib", "/lib64", "/etc", "/dev", "/sys", "/proc/cpuinfo", "/proc/meminfo"]
    changes = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink",
               "os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move"}
    refused = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill",
               "pty.", "socket.", "ctypes.dl", "ctypes.call", "gc.get_", "sys._current_frames")

    def check(path, writing):
        if isinstance(path, int) or path is None:
            return
        path = os.path.realpath(os.fsdecode(path))
        if writing and path != os.devnull and not inside(path, fence):
            raise PermissionError(f"outside the grader's copy nothing may be changed: {path}")
        if any(inside(path, folder) for folder in (fence, *python)):
            return
        if any(inside(path, folder) for folder in closed) or not any(inside(path, ok) for ok in readable):
            raise PermissionError(f"closed while tests run: {path}")

    def hook(event, args):
        if event == "open":
            path, mode, flags = args
            check(path, bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)))
        elif event in ("os.listdir", "os.scandir"):
            check(args[0], False)
        elif event in changes:
            for path in args:
                if isinstance(path, (str, bytes)):
                    check(path, True)
        elif event.startswith(refused):
            raise PermissionError(f"not allowed in a submission: {event}")

    sys.addaudithook(hook)


def main():
    parent = os.fdopen(os.dup(0), "rb")
    job = marshal.load(parent)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path.insert(0, os.getcwd())
    os.environ["COURSE_SEED"] = str(job["seed"])
    import torch                        # before the fence: its libraries load, and it may look at the machine
    torch.set_num_threads(1)

    def write(entry, fd=job["fd"], nonce=job["nonce"]):
        entry = {key: value[:600] if isinstance(value, str) else value for key, value in entry.items()}
        os.write(fd, json.dumps(entry | {"nonce": nonce}).encode() + b"\n")

    tests = dict.fromkeys(test.split("[")[0] for part in job["rounds"] for test in part["tests"])
    if job["fence"]:
        put_up_fence(job["closed"], job["fence"])
    status = pytest.main([*tests, "-q", "-p", "no:cacheprovider", "--basetemp",
                          str(Path(job["temp"]) / "pytest")],
                         plugins=[Rounds(job["rounds"], write,
                                         (lambda: marshal.load(parent)) if job["more"] else None)])
    sys.stdout.flush()
    os._exit(int(status))               # threads that the submission has started do not hold the process up


if __name__ == "__main__":
    main()
