"""Grade a submission: a student's folder, or the zip that `make submit` wrote in it.

    python course/grade.py SUBMISSION                    # points and reasons; writes results.json as well
    python course/grade.py SUBMISSION --json             # the same as JSON, in Gradescope's form
    python course/grade.py SUBMISSION --assignment A2 --seed 7 --results FILE --user nobody
                                                         # Gradescope's call

Only the bodies of the blank functions are taken, by qualified name, each with what it uses of the functions,
classes, constants and imports that the student added to the file; these are moved into it (blanks.py). All
else that was changed or added does not count. Each goes alone into a clean copy of the repository in which
the assignment's other functions are empty; those that its tests need (`needs`) come from the solution as
compiled code. The tests run in a separate process: time, memory and file sizes are limited, its output is
kept out of the report, its environment is six variables, its folder and TMPDIR are the copy. At the end it
and all that it started are killed: this process inherits what its child leaves, whatever session that is in.
An audit hook (runner.py) forbids it to change files outside the copy, to read others than Python's, to start
processes, to open connections and to call C functions through ctypes.

Exit status and output prove nothing. A test counts as passed if the process wrote so into a pipe, with a
nonce that is in no environment, argument or file. When the answer has passed, the process is sent some of the
blank's wrong answers, drawn by chance; before, it holds none of them. Every test that rejects one in a
process of the grader's own has to reject it here too. So a submission that weakens the tests (a patched
assert_close, a patched pytest) gets nothing.

A student reads of a failure which test it was and of what kind, and of a message only what is a text of the
test's own or a name out of the submission's file: else the submission's code could send the hidden tests or
the seed home. The whole messages are for the staff: --notes here, an entry of visibility "hidden" in
Gradescope. There they also find which bodies are the published solution except for comments and layout. That
is no verdict: two people write the same short function.

What this does not stop: the submission's code shares a process with the tests. Made for the purpose it could
walk the call stack to the nonce, to the seed and to the values that a test compares with, repair what it has
patched before the wrong answers come, read files through a library's C++ (torch.from_file), or tell a bit of
the seed by each test that it passes or fails on purpose. Without --user it has this user's rights, and
another clone of the repository on the machine is closed to Python's functions alone. A grader runs on Linux,
in a container that holds nothing worth stealing; there, as root, --user nobody shuts off the rest of the
machine, except for files that everybody may read. Points that matter are confirmed by a look at the code: it
is short.
"""
import argparse
import ast
import builtins
import functools
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # called as a script, from anywhere

import common  # noqa: E402
from runtime import processes  # noqa: E402
from common import UserError  # noqa: E402
from course import assignments, blanks, make  # noqa: E402
from course.sandbox import run_rounds  # noqa: E402
from course.submission import Submission  # noqa: E402

# For one blank, from its first test on. A loop meets the limit of processor time, which counts from the
# process's start, a sleep the other; a solution is far from both, on a busy machine too.
SECONDS, PROCESSOR = 180, 60
# What torch.testing.assert_close says first, and what a student reads of it.
COMPARED = {"Tensor-likes are not close": "wrong values", "Scalars are not close": "wrong values",
            "The values for attribute 'shape'": "wrong shape",
            "The values for attribute 'dtype'": "wrong dtype"}
CANARIES = 5                           # wrong answers that are judged after a blank's own


class Mark(NamedTuple):
    """What a blank got, and why not more: `reasons` for the student, `notes` for the staff alone."""
    id: str
    name: str
    points: int
    most: int
    reasons: list
    notes: list = []


# -------------------------------------------- what was handed in --------------------------------------------

def with_answer(blank, clean, submission):
    """The clean text of a blank's file with the submission's body in it, and what that uses of the
    submission's additions. ValueError, with the reason, if that cannot be."""
    text = submission.text(blank.file)
    try:
        filled = blanks.transplant(clean, blank.name, text)
        compile(filled, blank.file, "exec")
    except SyntaxError as e:
        raise ValueError(f"{blank.file} does not parse: {e.msg}, line {e.lineno}, in Python "
                         f"{platform.python_version()}") from None
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


def rounds_of(blank, wrongs):
    """Rounds in which these wrong answers of a blank are judged by its tests, all else as for an answer."""
    return [dict(name=f"{blank.id}: {wrong[0]}", put=needed(blank) | mistaken(blank, wrong),
                 tests=[*blank.tests, *blank.hidden], first=False) for wrong in wrongs]


def needed(blank):
    """{place: code object} of what a blank's tests need of the other solutions."""
    return {place: code for id in blank.needs
            for place, code in solution(assignments.blank_of(id)).items()}


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


@functools.cache
def messages(file):
    """The texts that a file of tests has for students: `assert ..., "text"`."""
    return {node.msg.value for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.Assert) and isinstance(node.msg, ast.Constant)}


def kind(why, test, text):
    """What a student may read of a failure. why: as it was reported. text: of the submission's file. Nothing
    here can be chosen at will by the code under test."""
    error, _, message = one_line(why).partition(": ")
    if message in messages(test.split("::")[0]) | messages("course/hidden/given.py"):
        return message
    if message in {b.message for listed in assignments.ASSIGNMENTS.values() for b in listed}:
        return f"it calls {message}, which is empty while this blank is graded"
    if error.startswith("assert") or error == "AssertionError":
        return next((what for start, what in COMPARED.items() if message.startswith(start)),
                    "a value, shape or dtype is not as asked")
    if error == "Failed" and message.startswith("DID NOT RAISE"):
        return "an error that is asked for is not raised"
    if error in ("skipped", "it did not run"):
        return "it did not run"
    if error == "runtime.processes.UserError":
        return "UserError"
    if not isinstance(found := getattr(builtins, error, None), type) or not issubclass(found, BaseException):
        return "an error"
    name = re.search(r"(?:name|module named|attribute|variable) '(\w+)'", message)
    return f"{error}, '{name[1]}'" if name and re.search(rf"\b{name[1]}\b", text) else error


def grade_blank(blank, clean, submission, temporary, seed, user, closed):
    """(the Mark of one blank, {round: tests that failed in it} of wrong answers, if its own has passed)."""
    mark = lambda points, reasons, notes=(): Mark(blank.id, blank.name, points, blank.points, reasons,
                                                  [*notes])
    source = (clean / blank.file).read_text()
    try:
        text = with_answer(blank, source, submission)
    except ValueError as e:
        return mark(0, [str(e)]), {}
    if blanks.body(text, blank.name).strip().startswith("raise NotImplementedError("):
        return mark(0, ["still empty"]), {}
    folder = temporary / blank.id
    shutil.copytree(clean, folder)
    (folder / blank.file).write_text(text)
    tests = [*blank.tests, *blank.hidden]
    canaries = rounds_of(blank, secrets.SystemRandom().sample(blank.wrong, min(CANARIES, len(blank.wrong))))
    answer = [dict(name="answer", put=needed(blank), tests=tests, first=False)]
    entries, trouble = run_rounds(answer, folder, temporary, seed, SECONDS, PROCESSOR, closed, user=user,
                                  more=lambda found: [] if failures(found, "answer", tests) else canaries)
    shutil.rmtree(folder, ignore_errors=True)
    failed = {test: why for test, why in failures(entries, "answer", tests).items()
              if not trouble or why != "it did not run"}
    what = {test: ("hidden " if test in blank.hidden else "test ") + test.split("::")[1] for test in failed}
    own = submission.text(blank.file)
    reasons = [f"{what[test]}: {kind(why, test, own)}" for test, why in failed.items()]
    notes = [f"{what[test]}: {one_line(why)}" for test, why in failed.items()]
    if trouble:
        reasons.append(trouble)
    if any(re.search(r"\b(Name|Attribute|Import|ModuleNotFound)Error", reason) for reason in reasons):
        reasons.append("taken are the function's body and what you added at the top level of its file; not "
                       "methods, changes of what was there, other files")
    if text == blanks.transplant(source, blank.name, (ROOT / blank.file).read_text()):
        notes.append("equals the published solution, except for comments and layout")
    return (mark(0 if reasons else blank.points, reasons, notes),
            {} if reasons else {c["name"]: failures(entries, c["name"], tests).keys() for c in canaries})


def with_verdicts(marks, seen, clean, temporary, seed):
    """The marks, with 0 where after the answer a test let a wrong answer pass that it rejects in a process in
    which no submission has run. seen: {blank's id: {round: tests that failed in it}}."""
    rounds = [r for mark in marks for b in [assignments.blank_of(mark.id)] for r in rounds_of(b, b.wrong)
              if r["name"] in seen[b.id]]
    if not rounds:
        return marks
    folder = temporary / "verdicts"
    shutil.copytree(clean, folder)
    entries, trouble = run_rounds(rounds, folder, temporary, seed, 10 * SECONDS, 10 * SECONDS, fenced=False)
    if trouble:
        raise UserError(f"the grader itself does not work here: {trouble}")
    rejected = {r["name"]: failures(entries, r["name"], r["tests"]).keys() for r in rounds}
    judged = []
    for mark in marks:
        passed = [name for name, tests in seen[mark.id].items() if not rejected[name] <= tests]
        judged.append(mark if not passed else mark._replace(points=0, notes=[*mark.notes, *passed], reasons=[
            "after this code has run, tests let wrong answers pass: it has changed tests, pytest, torch or "
            "numpy"]))
    return judged


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
    try:
        said = submission.text("ASSIGNMENT").strip()
    except ValueError:
        said = ""
    if name is None and said not in assignments.ASSIGNMENTS:
        raise UserError(f"{path}: no file ASSIGNMENT says which one this is: give --assignment A1 ... A5")
    if name and said in assignments.ASSIGNMENTS and said != name:
        most = (sum(b.points for b in assignments.ASSIGNMENTS[name])
                or sum(points for _, points, _ in assignments.A5_CHECKS))
        return name, [Mark(name, assignments.TITLES[name], 0, most,
                           [f"this is {said}, as its file ASSIGNMENT says, and not {name}"])]
    name = name or said
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
        marks, seen = [], {}
        for b in assignments.ASSIGNMENTS[name]:
            mark, seen[b.id] = grade_blank(b, clean, submission, temporary, seed, user, closed)
            marks.append(mark)
        return name, with_verdicts(marks, seen, clean, temporary, seed)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def versions(path):
    """Whose Python and torch graded, and which the student had, as `make submit` wrote it."""
    try:
        theirs = " ".join(Submission(path).text("ENVIRONMENT").split())[:100]
    except ValueError:
        theirs = "not said"
    return (f"graded with Python {platform.python_version()}, torch {importlib.metadata.version('torch')}; "
            f"the student's: {theirs}")


def as_json(name, marks, environment=""):
    """Gradescope's results.json. What is for the staff alone is in a test without points that students do not
    see."""
    tests = [{"name": f"{m.id} {m.name}", "score": m.points, "max_score": m.most,
              "status": "passed" if m.points == m.most else "failed",
              "output": "\n".join(m.reasons), "visibility": "visible"} for m in marks]
    if notes := [f"{m.id}: {note}" for m in marks for note in m.notes]:
        tests.append({"name": "for the staff", "score": 0, "max_score": 0, "status": "passed",
                      "output": "\n".join(notes), "visibility": "hidden"})
    return {"score": sum(m.points for m in marks),
            "output": "\n".join(filter(None, [f"{name}: {assignments.TITLES[name]}", environment])),
            "tests": tests}


def as_text(name, marks, notes=False):
    """What is printed. notes: with what is for the staff alone."""
    rows = []
    for m in marks:
        rows.append(f"{m.id:6} {m.name:28} {m.points:3} of {m.most}")
        rows += [f"       - {reason}" for reason in m.reasons]
        rows += [f"       (staff) {note}" for note in m.notes if notes]
    return "\n".join([*rows, f"{name}: {sum(m.points for m in marks)} of "
                             f"{sum(m.most for m in marks)} points"])


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("submission", type=Path, help="a student's folder or the zip of `make submit`")
    add("--assignment", choices=tuple(assignments.ASSIGNMENTS), help="default: what its file ASSIGNMENT says")
    add("--json", action="store_true", help="print JSON")
    add("--notes", action="store_true", help="print what is for the staff alone, too; --json always has it")
    add("--results", type=Path, default=Path("results.json"),
        help="write Gradescope's JSON here (results.json)")
    add("--seed", type=common.number(common.Seed), default=0, help="of the hidden tests' data (default 0)")
    add("--user", help="run the submission's code as this user; needs root")
    args = parser.parse_args(argv)
    if args.user and os.geteuid() != 0:
        raise UserError("--user needs root: leave it out, and grade in a container")
    name, marks = grade(args.submission, args.assignment, args.seed, args.user)
    environment = versions(args.submission)
    results = json.dumps(as_json(name, marks, environment), indent=1)
    args.results.write_text(results + "\n")
    print(results if args.json else f"{as_text(name, marks, args.notes)}\n{environment}")


if __name__ == "__main__":
    processes.run(main)
