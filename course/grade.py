"""Grade a submission: a student's folder, or the zip that `make submit` wrote in it.

    python course/grade.py SUBMISSION                    # points and reasons; writes results.json as well
    python course/grade.py SUBMISSION --json             # the same as JSON, in Gradescope's form
    python course/grade.py SUBMISSION --assignment A2 --seed 7 --results FILE --user nobody
                                                         # Gradescope's call

Only the bodies of the blank functions are taken, by qualified name; what else was changed or added does not
count. Each goes alone into a clean copy of the repository in which the assignment's other functions are
empty; those that its tests need (`needs`) come from the solution as compiled code. The tests run in a
separate process: time, memory and file sizes are limited, its output is kept out of the report, its
environment is six variables, its folder and TMPDIR are the copy, and it and all it started are killed at the
end. An audit hook (runner.py) forbids it to change files outside the copy, to read this repository or the
submission, to start processes and to open connections.

Exit status and output prove nothing. A test counts as passed if the process wrote so to a file, with a nonce
that is in no environment, argument or file. Before and after the submission's code has run, the same tests
judge the wrong answers of assignments.py; a submission that weakens the tests (a patched assert_close, a
patched pytest) changes that verdict and gets nothing.

What this does not stop: the submission's code shares a process with the tests. Made for the purpose it could
find the nonce, or the values that a test compares with, in the interpreter's memory, repair what it has
patched before the second judgement, or get around the audit hook through a C library; and without --user it
has this user's rights. A grader runs on Linux, in a container that holds nothing worth stealing; there, as
root, --user nobody shuts the rest of the machine off. Points that matter are confirmed by a look at the code:
it is short.
"""
import argparse
import json
import marshal
import os
import pwd
import resource
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # called as a script, from anywhere

import common  # noqa: E402
from runtime import processes  # noqa: E402
from common import UserError  # noqa: E402
from course import assignments, blanks, make  # noqa: E402

# For one blank, start included. A loop meets the limit of processor time, a sleep the other; a solution is
# far from both, on a busy machine too.
SECONDS, PROCESSOR = 180, 60
LIMITS = {"RLIMIT_AS": 6 << 30, "RLIMIT_FSIZE": 64 << 20, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 512}
LARGEST = 1 << 20                      # bytes of a source file, several times that of the longest here
MOST = 5000                            # files that are looked at


class Mark(NamedTuple):
    """What a blank got, and why not more."""
    id: str
    name: str
    points: int
    most: int
    reasons: list


# -------------------------------------------- what was handed in --------------------------------------------

class Submission:
    """The files of a folder or a zip, by their path from its top: only regular ones, only small ones. A link
    could lead to the solution."""

    def __init__(self, path):
        self.zip, self.files = None, {}
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
                for name in sorted(names):
                    full = Path(folder, name)
                    if stat.S_ISREG(full.lstat().st_mode) and len(self.files) < MOST:
                        self.files[full.relative_to(path).as_posix()] = full, full.stat().st_size
        else:
            try:
                self.zip = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as e:
                raise UserError(f"{path} is neither a folder nor a zip file: {e}") from e
            for info in self.zip.infolist()[:MOST]:
                if not info.is_dir():
                    self.files[info.filename] = info, info.file_size

    def find(self, file):
        """The path of `file`: where it belongs, else the least deep of those that end like it or have its
        name (Gradescope's upload of single files forgets folders). None: not there."""
        parts = PurePosixPath(file).parts
        there = sorted((PurePosixPath(p) for p in self.files), key=lambda p: (len(p.parts), str(p)))
        for tail in (parts, parts[-1:]):
            for path in there:
                if path.parts[-len(tail):] == tail:
                    return str(path)
        return None

    def text(self, file):
        """The file's text. ValueError, with the reason, for one that is missing, too large or not UTF-8."""
        path = self.find(file)
        if path is None:
            raise ValueError(f"{file} is not in the submission")
        where, size = self.files[path]
        if size > LARGEST:
            raise ValueError(f"{path} has {size} bytes; {LARGEST} are the most")
        try:
            if self.zip is None:
                return where.read_text(encoding="utf-8")
            with self.zip.open(where) as entry:
                return entry.read(LARGEST + 1).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not a text in UTF-8") from None
        except (OSError, RuntimeError, zipfile.BadZipFile) as e:          # RuntimeError: a password
            raise ValueError(f"{path} cannot be read: {e}") from None


def with_answer(blank, clean, submission):
    """The clean text of a blank's file with the submission's body in it. ValueError, with the reason, if that
    cannot be."""
    text = submission.text(blank.file)
    try:
        filled = blanks.transplant(clean, blank.name, text)
        compile(filled, blank.file, "exec")
    except SyntaxError as e:
        raise ValueError(f"{blank.file} does not parse: {e.msg}, line {e.lineno}") from None
    except KeyError:
        raise ValueError(f"{blank.file} has no function {blank.name}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{blank.file} is nested too deeply to be read") from None
    except ValueError as e:
        raise ValueError(f"{blank.file}: {blank.name}: {e}") from None
    return filled


# ---------------------------------------------- running tests ----------------------------------------------

def code_of(source, file, name):
    """The code object of a function in a source text."""
    found = compile(source, file, "exec")
    for part in name.split("."):
        found = [c for c in found.co_consts if hasattr(c, "co_name") and c.co_name == part][-1]
    return found


def solution(blank):
    """{place: code object} of a blank's own solution, as runner.py takes it."""
    return {f"{blank.file}:{blank.name}": code_of((ROOT / blank.file).read_text(), blank.file, blank.name)}


def empty(blank):
    """The same of the function as students find it."""
    source = blanks.blank((ROOT / blank.file).read_text(), blank.name, blank.message)
    return {f"{blank.file}:{blank.name}": code_of(source, blank.file, blank.name)}


def wrong_text(blank, wrong):
    """The text of a blank's file with one of its wrong answers. ValueError unless each edit applies once."""
    source = (ROOT / blank.file).read_text()
    text, (_, *edits) = blanks.body(source, blank.name), wrong
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        if text.count(old) != 1:
            raise ValueError(f"{blank.id}, {wrong[0]!r}: {old!r} is there {text.count(old)} times")
        text = text.replace(old, new)
    return blanks.replace_body(source, blank.name, text)


def mistaken(blank, wrong):
    """{place: code object} of a wrong answer."""
    return {f"{blank.file}:{blank.name}": code_of(wrong_text(blank, wrong), blank.file, blank.name)}


def run_rounds(rounds, folder, temporary, seed, seconds, processor, closed=(), fenced=True, user=None):
    """Run runner.py on `rounds` in a copy of the repository.

    folder: the copy. temporary: a folder of the grader's own. seconds, processor: limits, the latter of
    processor time. Returns (lines that carry the nonce, why the process did not finish or None). Raises
    UserError where it has not come to the first test: that is no submission's fault.
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
                   "COURSE_SEED": str(seed), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile(dir=temporary) as lines, tempfile.TemporaryFile(dir=temporary) as output:
        job = dict(rounds=rounds, nonce=nonce, fd=lines.fileno(), closed=[str(c) for c in closed],
                   temp=str(temp), fence=os.path.realpath(folder) if fenced else None)
        try:
            process = subprocess.Popen([sys.executable, "course/runner.py"], cwd=folder, env=environment,
                                       stdin=subprocess.PIPE, stdout=output, stderr=output,
                                       pass_fds=[lines.fileno()], start_new_session=True, preexec_fn=limit,
                                       **who)
        except PermissionError as e:
            raise UserError(f"user {user} cannot run {sys.executable}: {e}") from e
        trouble = None
        try:
            process.communicate(marshal.dumps(job), timeout=seconds)
        except subprocess.TimeoutExpired:
            trouble = f"not finished after {seconds} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)                  # with all that it has started
            except ProcessLookupError:
                pass
            process.wait()
        lines.seek(0)
        found = []
        for line in lines.read(LARGEST * 8).splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and secrets.compare_digest(str(entry.get("nonce")), nonce):
                found.append(entry)
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


def failures(entries, name, tests):
    """{test: why} of those that did not pass in the round of this name: a case failed, or none has run."""
    found = {}
    for test in tests:
        cases = [e for e in entries if e.get("round") == name and e["test"] == test]
        bad = [e["reason"] for e in cases if e["outcome"] == "failed"]
        if bad:
            found[test] = bad[0]
        elif not any(e["outcome"] == "passed" for e in cases):
            found[test] = "skipped: " + cases[0]["reason"] if cases else "it did not run"
    return found


def one_line(text):
    """The first line that says something, short."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 160 else line[:157] + "..."


def grade_blank(blank, clean, submission, temporary, seed, user, closed):
    """The Mark of one blank."""
    mark = lambda points, *reasons: Mark(blank.id, blank.name, points, blank.points, list(reasons))
    source = (clean / blank.file).read_text()
    try:
        text = with_answer(blank, source, submission)
    except ValueError as e:
        return mark(0, str(e))
    if text == blanks.transplant(source, blank.name, source):
        return mark(0, "still empty")
    folder = temporary / blank.id
    shutil.copytree(clean, folder)
    (folder / blank.file).write_text(text)
    needs = {place: code for id in blank.needs for place, code in solution(assignments.blank_of(id)).items()}
    tests = [*blank.tests, *blank.hidden]
    check = lambda when: [dict(name=f"{when} {i}", put=needs | mistaken(blank, wrong), tests=tests,
                               first=False)
                          for i, wrong in enumerate(blank.wrong)]
    rounds = [*check("before"), dict(name="answer", put=needs, tests=tests, first=False), *check("after")]
    entries, trouble = run_rounds(rounds, folder, temporary, seed, SECONDS, PROCESSOR, closed, user=user)
    shutil.rmtree(folder, ignore_errors=True)
    reasons = [f"{'hidden' if test in blank.hidden else 'test'} {test.split('::')[1]}: {one_line(why)}"
               for test, why in failures(entries, "answer", tests).items() if why != "it did not run"]
    if trouble:
        reasons.append(trouble)
    elif not reasons:
        for i in range(len(blank.wrong)):
            if (failures(entries, f"before {i}", tests).keys()
                    != failures(entries, f"after {i}", tests).keys()):
                reasons = ["after this code has run the tests judge other answers differently than before: "
                           "it has changed the tests, pytest, torch or numpy"]
    if any("NameError" in reason for reason in reasons):
        reasons.append("only the body of this function is taken: put helpers and imports inside it")
    return mark(0 if reasons else blank.points, *reasons)


# -------------------------------------------- A5, and the report --------------------------------------------

def check_experiment(submission):
    """A5's marks: is a report there, are there runs of two seeds. The rest is read by people."""
    marks = []
    (first, points, _), (second, others, _) = assignments.A5_CHECKS
    reasons = []
    if not submission.find("report.pdf"):
        try:
            words = len(submission.text("report.md").split())
            if not 100 <= words <= 1200:
                reasons = [f"report.md has {words} words: 100 to 1200 are two pages"]
        except ValueError as e:
            reasons = [f"no report.pdf, and {e}"]
    marks.append(Mark(first, "report", 0 if reasons else points, points, reasons))
    seeds = {}
    for path in submission.files:
        if PurePosixPath(path).name == "config.json":
            try:
                config = json.loads(submission.text(path))
                own = {"seed", "out", "tokenizer", "init"}                # what may differ between seeds
                key = json.dumps({k: v for k, v in config.items() if k not in own}, sort_keys=True)
                seeds.setdefault(key, set()).add(config["seed"])
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                continue
    reasons = [] if any(len(found) > 1 for found in seeds.values()) else [
        f"{len(seeds)} kinds of runs, but none with two seeds: hand in runs/*/config.json of every run"]
    marks.append(Mark(second, "runs", 0 if reasons else others, others, reasons))
    return marks


def grade(path, name=None, seed=0, user=None):
    """(assignment's name, list of Mark) of the submission at `path`. name: None,
    as its file ASSIGNMENT says."""
    if not path.exists():
        raise UserError(f"there is nothing at {path}")
    submission = Submission(path)
    if name is None:
        try:
            name = submission.text("ASSIGNMENT").strip()
        except ValueError:
            name = ""
        if name not in assignments.ASSIGNMENTS:
            raise UserError(f"{path}: no file ASSIGNMENT says which one this is: give --assignment A1 ... A5")
    if name == "A5":
        return name, check_experiment(submission)
    temporary = Path(tempfile.mkdtemp(prefix="grade-"))
    try:
        os.chmod(temporary, 0o711 if user else 0o700)
        clean = temporary / "clean"
        make.copy_files((*make.CODE, *make.TESTS, *make.HIDDEN), clean)
        make.cut_out(name, clean)
        os.chmod(clean, 0o700)
        closed = [ROOT, os.path.realpath(path)]
        return name, [grade_blank(b, clean, submission, temporary, seed, user, closed)
                      for b in assignments.ASSIGNMENTS[name]]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_json(name, marks):
    """Gradescope's results.json."""
    return {"score": sum(m.points for m in marks),
            "output": f"{name}: {assignments.TITLES[name]}",
            "tests": [{"name": f"{m.id} {m.name}", "score": m.points, "max_score": m.most,
                       "status": "passed" if m.points == m.most else "failed",
                       "output": "\n".join(m.reasons), "visibility": "visible"} for m in marks]}


def as_text(name, marks):
    """What is printed."""
    rows = []
    for m in marks:
        rows.append(f"{m.id:6} {m.name:28} {m.points:3} of {m.most}")
        rows += [f"       - {reason}" for reason in m.reasons]
    return "\n".join([*rows, f"{name}: {sum(m.points for m in marks)} of "
                             f"{sum(m.most for m in marks)} points"])


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("submission", type=Path, help="a student's folder or the zip of `make submit`")
    add("--assignment", choices=tuple(assignments.ASSIGNMENTS), help="default: what its file ASSIGNMENT says")
    add("--json", action="store_true", help="print JSON")
    add("--results", type=Path, default=Path("results.json"),
        help="write Gradescope's JSON here (results.json)")
    add("--seed", type=common.number(common.Seed), default=0, help="of the hidden tests' data (default 0)")
    add("--user", help="run the submission's code as this user; needs root")
    args = parser.parse_args(argv)
    if args.user and os.geteuid() != 0:
        raise UserError("--user needs root: leave it out, and grade in a container")
    name, marks = grade(args.submission, args.assignment, args.seed, args.user)
    args.results.write_text(json.dumps(as_json(name, marks), indent=1) + "\n")
    print(json.dumps(as_json(name, marks), indent=1) if args.json else as_text(name, marks))


if __name__ == "__main__":
    processes.run(main)
