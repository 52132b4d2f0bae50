"""The process in which tests run: pytest, called once, with functions exchanged between rounds.

It reads a job from stdin (marshal, a dict) and writes a line of JSON per test to the file descriptor
job["fd"]:

    rounds   a list of dicts: `name`; `put`, {"maetok.py:random_mask": code object}, what functions are to do
             in this round (all others do what the source says); `tests`, node ids, where that of a
             parametrised test without [...] means all of its cases; `first`, stop at the first that fails
    nonce    goes into every line; the parent believes no other line
    fence    the only folder in which files may be changed, or None for no fence; `closed`, folders
             not to be read
    temp     a folder for pytest's temporary files

A function is exchanged by its __code__, in place: modules that imported it by name get the new one too, and
pytest need not collect the tests again.
"""
import importlib
import json
import marshal
import os
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


class Rounds:
    """The plugin. Reports go to `write`, a callable that takes a dict."""

    def __init__(self, rounds, write):
        self.rounds, self.write = rounds, write

    def pytest_collectreport(self, report):
        if report.failed:
            self.write({"broken": str(report.longrepr)[-600:]})

    def pytest_runtestloop(self, session):
        self.write({"started": True})       # nothing of a submission has run yet
        for part in self.rounds:
            functions = {place: function(place) for place in part["put"]}
            before = {place: f.__code__ for place, f in functions.items()}
            for place, f in functions.items():
                f.__code__ = part["put"][place]
            try:
                self.run(session.items, part)
            finally:
                for place, f in functions.items():
                    f.__code__ = before[place]
        self.write({"finished": True})
        return True

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
    """An audit hook, which Python code cannot take down again: no changes outside `fence`, no reading in
    `closed`, no processes, no network."""
    inside = lambda path, folder: path == folder or path.startswith(folder + os.sep)
    readable = (fence, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix))
    changes = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink",
               "os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move"}
    refused = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill",
               "pty.", "socket.")

    def check(path, writing):
        if isinstance(path, int) or path is None:
            return
        path = os.path.realpath(os.fsdecode(path))
        if writing and path != os.devnull and not inside(path, fence):
            raise PermissionError(f"outside the grader's copy nothing may be changed: {path}")
        if any(inside(path, folder) for folder in closed) and not any(inside(path, ok) for ok in readable):
            raise PermissionError(f"closed while tests run: {path}")

    def hook(event, args):
        if event == "open":
            path, mode, flags = args
            check(path, bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)))
        elif event in changes:
            for path in args:
                if isinstance(path, (str, bytes)):
                    check(path, True)
        elif event.startswith(refused):
            raise PermissionError(f"not allowed in a submission: {event}")

    sys.addaudithook(hook)


def main():
    job = marshal.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path.insert(0, os.getcwd())
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
                         plugins=[Rounds(job["rounds"], write)])
    sys.stdout.flush()
    os._exit(int(status))               # threads that the submission has started do not hold the process up


if __name__ == "__main__":
    main()
