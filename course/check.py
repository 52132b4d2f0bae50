"""Check the course: what `make course` runs.

    python course/check.py               # all below but --seeds, and three submissions of each folder
    python course/check.py A3 --bank     # wrong answers alone: each blank's tests reject every one
    python course/check.py --right       # right answers alone: the tests accept each, at ten seeds
    python course/check.py --seeds 200   # the solution alone: the hidden tests accept it, at 200 seeds

Each runs in one process per assignment, in which runner.py exchanges functions: hundreds of runs of a few
tests. The submissions go through make.py and grade.py as a student's would, with one process per blank.
"""
import argparse
import importlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # called as a script, from anywhere

import common  # noqa: E402
from runtime import processes  # noqa: E402
from common import UserError  # noqa: E402
from course import assignments, blanks, grade, make  # noqa: E402


# -------------------------------------------- tests of the tests --------------------------------------------

def rounds_of(name, every=1):
    """What has to be run to prove the tests of an assignment, as runner.py's rounds: for every blank

    empty    its function alone is as students find it
    alone    it and what it needs are solved, all other functions of the assignment are empty
    wrong i  its i-th wrong answer, of each `every` the first
    """
    rounds = []
    for b in assignments.ASSIGNMENTS[name]:
        tests = [*b.tests, *b.hidden]
        rounds.append(dict(name=f"{b.id} empty", put=grade.empty(b), tests=tests, first=False))
        rounds.append(dict(name=f"{b.id} alone", put=others_empty(b), tests=tests, first=False))
        rounds += [dict(name=f"{b.id} wrong {i}", put=grade.mistaken(b, wrong), tests=tests, first=True)
                   for i, wrong in enumerate(b.wrong) if i % every == 0]
    return rounds


def others_empty(blank):
    """{place: code object} of the assignment's other functions as students find them, except those that the
    blank's tests need."""
    return {place: code for other in assignments.ASSIGNMENTS[blank.id.split(".")[0]]
            if other.id not in (blank.id, *blank.needs) for place, code in grade.empty(other).items()}


def run(rounds, seed=0, seconds=3600):
    """run_rounds on a copy of the solution, without fence. seconds: limit, of processor time as well."""
    with tempfile.TemporaryDirectory(prefix="check-") as temporary:
        folder = Path(temporary, "copy")
        make.copy_files((*make.CODE, *make.TESTS, *make.HIDDEN), folder)
        return grade.run_rounds(rounds, folder, temporary, seed, seconds, seconds, fenced=False)


def bank(name, seed=0, every=1):
    """Run all rounds_of of an assignment on a copy of the solution.

    Returns (complaints, seconds, counts): what the tests do wrong, a line each; how long each blank's tests
    take; the numbers of wrong answers, of those rejected, and of those that visible tests alone reject.
    """
    entries, trouble = run(rounds_of(name, every), seed)
    complaints = [trouble] if trouble else []
    times, rejected, by_visible = {}, 0, 0
    for b in assignments.ASSIGNMENTS[name]:
        tests = [*b.tests, *b.hidden]
        times[b.id] = sum(e["seconds"] for e in entries if e.get("round") == f"{b.id} alone")
        for test in tests:
            cases = [e for e in entries if e.get("round") == f"{b.id} empty" and e["test"] == test]
            if not cases or not all(e["outcome"] == "failed"
                                    and f"NotImplementedError: {b.message}" in e["reason"]
                                    for e in cases):
                complaints.append(f"{b.id} empty: {test} does not fail with its NotImplementedError")
        for test, why in grade.failures(entries, f"{b.id} alone", tests).items():
            complaints.append(f"{b.id} solved, others empty: {test}: {grade.one_line(why)}")
        for i, wrong in list(enumerate(b.wrong))[::every]:
            found = [e for e in entries if e.get("round") == f"{b.id} wrong {i}" and e["outcome"] == "failed"]
            if not found:
                complaints.append(f"{b.id}: no test rejects {wrong[0]!r}")
            rejected += bool(found)
            by_visible += any(e["test"] in b.tests for e in found)
    wrong = sum(len(b.wrong[::every]) for b in assignments.ASSIGNMENTS[name])
    return complaints, times, (wrong, rejected, by_visible)


def right_answers(name):
    """[(blank, how it differs from the solution, {place: code object})] of right/."""
    found = []
    for id, how, text in importlib.import_module(f"course.right.{name.lower()}").RIGHT:
        b = assignments.blank_of(id)
        source = (ROOT / b.file).read_text()
        indent = " " * (blanks.find(source, b.name).node.col_offset + 4)
        body = textwrap.indent(textwrap.dedent(text).strip("\n"), indent)
        filled = blanks.replace_body(source, b.name, body)
        found.append((b, how, {f"{b.file}:{b.name}": grade.code_of(filled, b.file, b.name)}))
    return found


def right(name, seeds=range(10), every=1):
    """Run each right answer, of each `every` the first, as the grader does: alone, its visible tests once
    and its hidden ones at every seed. Returns (complaints, number of answers)."""
    answers = right_answers(name)[::every]
    rounds = [dict(name=f"{i} {seed}", put=others_empty(b) | put, first=False, seed=seed,
                   tests=[*(b.tests if seed == seeds[0] else ()), *b.hidden])
              for i, (b, _, put) in enumerate(answers) for seed in seeds]
    complaints, entries = together(rounds)
    for i, (b, how, _) in enumerate(answers):
        complaints += [f"{b.id}, right: {how}: {line}" for line in
                       at_seeds([e for e in entries if e["round"].split()[0] == str(i)],
                                [*b.tests, *b.hidden], len(seeds))]
    return complaints, len(answers)


def solution(name, seeds):
    """Run the hidden tests on the solution at every one of these seeds. Returns complaints."""
    tests = list(dict.fromkeys(test for b in assignments.ASSIGNMENTS[name] for test in b.hidden))
    complaints, entries = together([dict(name=f"solution {seed}", put={}, tests=tests, first=False, seed=seed)
                                    for seed in seeds])
    return complaints + [f"{name}, the solution: {line}" for line in at_seeds(entries, tests, len(seeds))]


def together(rounds):
    """`run` without a seed of its own. Returns (complaints, lines of tests)."""
    entries, trouble = run(rounds)
    return [trouble] if trouble else [], [e for e in entries if "round" in e]


def at_seeds(entries, tests, count):
    """Lines of complaint on those tests that do not pass at every seed, of rounds named "... seed"."""
    lines = []
    for test in tests:
        ran = [e for e in entries if e["test"] == test and e["outcome"] != "skipped"]
        bad = {e["round"].split()[-1]: e["reason"] for e in ran if e["outcome"] == "failed"}
        if bad:
            lines.append(f"{test} fails at {len(bad)} of {count} seeds ({', '.join([*bad][:5])}): "
                         + grade.one_line(next(iter(bad.values()))))
        elif not ran:
            lines.append(f"{test} did not run")
    return lines


def seed_holds(name, seed):
    """Raise UserError unless at this seed an assignment's tests accept the solution and every right answer,
    and reject empty blanks and every wrong answer. It takes a minute or two."""
    if assignments.ASSIGNMENTS[name]:
        complaints = bank(name, seed)[0] + right(name, [seed])[0]
        if complaints:
            raise UserError(f"at seed {seed} the tests of {name} do not hold; take another, or correct them:"
                            + "".join(f"\n{line}" for line in complaints))


# --------------------------------------------- made submissions ---------------------------------------------

def answer(name, folder, kind):
    """Fill a student's folder: "empty" as it is, "solution", or "wrong", a wrong answer in every blank."""
    for i, b in enumerate(assignments.ASSIGNMENTS[name]):
        path, source = folder / b.file, (ROOT / b.file).read_text()
        if kind == "wrong":
            source = grade.wrong_text(b, b.wrong[i % len(b.wrong)])
        if kind != "empty":
            path.write_text(blanks.replace_body(path.read_text(), b.name, blanks.body(source, b.name)))
    if name == "A5" and kind != "empty":
        (folder / "report.md").write_text("word " * (500 if kind == "solution" else 5000))
        for seed in (0, 1):
            (folder / f"runs/{seed}").mkdir(parents=True)
            (folder / f"runs/{seed}/config.json").write_text(
                f'{{"steps": {100 if kind == "solution" else 100 + seed}, "seed": {seed}}}')


def expected(name, kind):
    """The points that a made submission has to get."""
    worth = ([b.points for b in assignments.ASSIGNMENTS[name]]
             or [points for _, points, _ in assignments.A5_CHECKS])
    return sum(worth) if kind == "solution" else 0


def in_folder(folder, target):
    """`make target` in a student's folder, with this interpreter's packages. Returns its process."""
    return subprocess.run(
        ["make", "--no-print-directory", "-o", ".venv/ready", f"PY={sys.executable}", target],
        cwd=folder, capture_output=True, text=True)


def submissions(name, temporary):
    """Make a student's folder, hand it in three ways and grade each. Returns complaints."""
    complaints = []
    for kind in ("empty", "solution", "wrong"):
        folder = Path(temporary, name, kind)
        make.student_folder(name, folder)
        answer(name, folder, kind)
        begun = time.time()
        if kind == "solution":
            tests = in_folder(folder, "test")
            print(f"{name}: make test, {time.time() - begun:.0f} s: {tests.stdout.strip().splitlines()[-1]}")
            if tests.returncode:
                complaints.append(f"{name}: the solution fails `make test`:\n"
                                  f"{tests.stdout[-2000:]}{tests.stderr}")
        in_folder(folder, "submit")
        begun = time.time()
        _, marks = grade.grade(folder / "submission.zip")
        points = sum(mark.points for mark in marks)
        print(f"{name} {kind}: {points} points, {time.time() - begun:.0f} s", flush=True)
        if points != expected(name, kind):
            complaints.append(f"{name} {kind}: {points} points, not {expected(name, kind)}\n"
                              + grade.as_text(name, marks))
        shutil.rmtree(folder)
    return complaints


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("assignments", nargs="*", help="default: all")
    add("--bank", action="store_true", help="the bank of wrong answers alone")
    add("--right", action="store_true", help="the bank of right answers alone, at ten seeds from --seed on")
    add("--seeds", type=common.number(common.Count), metavar="N",
        help="the solution alone: the hidden tests at N seeds from --seed on")
    add("--seed", type=common.number(common.Seed), default=0, help="of the hidden tests' data (default 0)")
    args = parser.parse_args(argv)
    if unknown := set(args.assignments) - set(assignments.ASSIGNMENTS):
        raise UserError(f"there is no assignment {sorted(unknown)[0]}: choose A1 ... A5")
    everything = not (args.bank or args.right or args.seeds)
    complaints, total = [], [0, 0, 0]
    with tempfile.TemporaryDirectory(prefix="course-") as temporary:
        for name in args.assignments or assignments.ASSIGNMENTS:
            some = bool(assignments.ASSIGNMENTS[name])
            if some and (args.bank or everything):
                begun = time.time()
                found, times, counts = bank(name, args.seed)
                complaints += found
                total = [a + b for a, b in zip(total, counts)]
                print(f"{name} bank: {counts[1]} of {counts[0]} wrong answers rejected, {counts[2]} by "
                      f"visible tests; {time.time() - begun:.0f} s; each blank's own tests: "
                      + ", ".join(f"{id} {seconds:.1f} s" for id, seconds in times.items()), flush=True)
            if some and (args.right or everything):
                begun = time.time()
                found, count = right(name, range(args.seed, args.seed + 10))
                complaints += found
                print(f"{name}: {count} right answers at 10 seeds, {len(found)} complaints; "
                      f"{time.time() - begun:.0f} s", flush=True)
            if some and args.seeds:
                begun = time.time()
                found = solution(name, range(args.seed, args.seed + args.seeds))
                complaints += found
                print(f"{name}: the solution at {args.seeds} seeds, {len(found)} complaints; "
                      f"{time.time() - begun:.0f} s", flush=True)
            if everything:
                complaints += submissions(name, temporary)
    if args.bank or everything:
        print(f"in all: {total[1]} of {total[0]} wrong answers rejected, {total[2]} by visible tests alone")
    if complaints:
        print("\n".join(complaints))
        raise UserError(f"the course has {len(complaints)} faults, listed above")


if __name__ == "__main__":
    processes.run(main)
