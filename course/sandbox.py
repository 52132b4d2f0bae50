"""The process in which tests run (runner.py), seen from outside: its limits, what it is told, what is
believed of what it says, and its end.
"""
import contextlib
import ctypes
import json
import marshal
import os
import pwd
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import UserError

START = 300                            # seconds until the first test has to begin: imports
LIMITS = {"RLIMIT_AS": 6 << 30, "RLIMIT_FSIZE": 64 << 20, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 512}
LONGEST = 1 << 20                      # characters of a line from the process


def children():
    """The ids of this process's children."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


def end(process, before):
    """Kill a process, and all that it has started in whatever session: its orphans become children of this
    process, which has asked for that. before: the children from before."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while orphans := children() - before:
        for orphan in orphans:
            os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            os.waitpid(orphan, 0)


def adopt(orphans):
    """Whether this process is to become the parent of its descendants' orphans. Linux's prctl."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0)


def send(process, value):
    """Hand a value to a process that may never read it."""
    def write():
        with contextlib.suppress(OSError):
            process.stdin.write(marshal.dumps(value))
            process.stdin.flush()
    threading.Thread(target=write, daemon=True).start()


def listen(process, pipe, nonce, seconds, more):
    """(the lines from the pipe that carry the nonce, whether it was ended by the limit). `more` as in
    run_rounds."""
    found, rest, deadline = [], b"", time.monotonic() + START
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([pipe], [], [], min(left, 0.1))[0]:
            if process.poll() is not None:                     # a child of its may hold the pipe open
                return found, False
            continue
        if not (chunk := os.read(pipe, 1 << 16)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(left)
            return found, process.returncode is None
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[-LONGEST:]
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(entry, dict) or entry.get("nonce") != nonce:
                continue
            found.append(entry)
            if "started" in entry:
                deadline = time.monotonic() + seconds
            if "answered" in entry:
                send(process, more(found))
    return found, True


def run_rounds(rounds, folder, temporary, seed, seconds, processor, closed=(), fenced=True, user=None,
               more=None):
    """Run runner.py on `rounds` in a copy of the repository.

    folder: the copy. temporary: a folder of the grader's own. seconds: the limit, from the first test on;
    processor: of processor time. more: None, or a function that gets the lines so far when `rounds` are done,
    and returns further rounds. Returns (lines that carry the nonce, why the process did not finish or None).
    Raises UserError where it has not come to the first test: that is no submission's fault.
    """
    nonce, temp = secrets.token_hex(16), folder / "tmp"
    temp.mkdir(exist_ok=True)
    who = {}
    if user:
        entry = pwd.getpwnam(user)
        who = dict(user=entry.pw_uid, group=entry.pw_gid, extra_groups=[])
        for path in (folder, *folder.rglob("*")):
            os.chown(path, entry.pw_uid, entry.pw_gid)

    def limit():
        for name, value in LIMITS.items():
            resource.setrlimit(getattr(resource, name), (value, value))
        resource.setrlimit(resource.RLIMIT_CPU, (processor, processor + 5))         # SIGXCPU, then SIGKILL
        if user:
            resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))

    environment = {"PATH": "/usr/bin:/bin", "HOME": str(temp), "TMPDIR": str(temp), "OMP_NUM_THREADS": "1",
                   "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    before, (reading, writing) = children(), os.pipe()
    with tempfile.TemporaryFile(dir=temporary) as output:
        job = dict(rounds=rounds, more=more is not None, seed=seed, nonce=nonce, fd=writing,
                   closed=[str(c) for c in closed], temp=str(temp),
                   fence=os.path.realpath(folder) if fenced else None)
        adopt(orphans=True)
        try:
            process = subprocess.Popen([sys.executable, "course/runner.py"], cwd=folder, env=environment,
                                       stdin=subprocess.PIPE, stdout=output, stderr=output,
                                       pass_fds=[writing], start_new_session=True, preexec_fn=limit, **who)
            try:
                os.close(writing)
                send(process, job)
                found, late = listen(process, reading, nonce, seconds, more)
            finally:
                end(process, before)
                with contextlib.suppress(OSError):
                    process.stdin.close()
        except PermissionError as e:
            raise UserError(f"user {user} cannot run {sys.executable}: {e}") from e
        finally:
            adopt(orphans=False)
            os.close(reading)
        trouble = f"not finished after {seconds} s" if late else None
        if trouble is None and not any(entry.get("finished") for entry in found):
            status = process.returncode
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            trouble = (f"more than {processor} s of processor time" if status == -signal.SIGXCPU else
                       f"the process ended {how} before its tests were done")
        broken = [entry["broken"] for entry in found if "broken" in entry]
        if broken or trouble and not any(entry.get("started") for entry in found):
            output.seek(0, os.SEEK_END)
            output.seek(max(0, output.tell() - 2000))
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"the grader itself does not work here: {[*broken, *last, trouble][0]}")
    return found, trouble
