"""Make the folders of the course from the working code.

    python course/make.py A2 --out DIR               # the student's folder: A2's functions are blank
    python course/make.py A2 --open A1 --out DIR     # A1's deadline is over: its solutions can be read
    python course/make.py --all --out DIR            # DIR/A1 ... DIR/A5
    python course/make.py A2 --solutions --out DIR   # a staff copy: nothing blank, with the hidden tests
    python course/make.py A2 --gradescope --seed 7 --out DIR   # DIR/A2-autograder.zip
    python course/make.py --handouts                 # write the tables of blanks into course/A*.md

The sources carry no marks: assignments.py names the functions, and their bodies are cut out here. What the
other assignments ask for works in every folder, so that its scripts run as soon as its own blanks are filled;
but it is packed (solved.py), so that one folder does not show the solutions of another.
"""
import argparse
import difflib
import json
import re
import shutil
import stat
import sys
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # called as a script, from anywhere

import common  # noqa: E402
from runtime import processes  # noqa: E402
from common import UserError  # noqa: E402
from course import assignments, blanks  # noqa: E402

CODE = ("*.py", "after/*.py", "frozen/*.py", "measures/*.py", "runtime/*.py", "variants/*.py", "study/*.py",
        "pictures/*", "requirements.txt", "pyproject.toml")
READ = ("README.md", "LICENSE", "CITATION.cff", ".gitignore", "docs/*", "assets/*")
# The files of the visible tests, and what those import.
TESTS = ("tests/conftest.py", "tests/cuda_autocast.py", "tests/forked.py", "tests/random_frozen.py",
         *(f"tests/test_{name}.py" for name in
           ("maetok", "hog", "losses", "train_tokenizer", "train_gan", "flow", "sit", "metrics", "theory")))
# What tests and grades; a copy in which submissions run has HIDDEN alone.
GRADER = ("course/*.py", "course/bank/*.py", "course/hidden/*.py")
HIDDEN = ("course/hidden/*.py", "course/runner.py")
COURSE = (*GRADER, "course/right/*.py", "course/*.md", "course/staff/*", "docs/figures/*")

MAKEFILE = """\
# {title}. Without make (Windows): `python work.py TARGET` does the same.
# PYTHON=... chooses the interpreter (3.10 or newer), VENV=../.venv one environment for several folders,
# PY=... an interpreter that has the packages already.
PYTHON ?= python3
VENV ?= .venv
export VENV
ifeq ($(origin PY),undefined)
READY := $(VENV)/ready
PY := $(VENV)/bin/python
endif

.PHONY: test submit {ids}

# All tests that you may see. One blank's: make {first}.
test {ids}: $(READY)
	$(PY) work.py $@

# What you hand in.
submit:
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) work.py submit

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) work.py install
"""

# Where functions are that other assignments ask for, behind the last of them.
SOLVED = '__import__("solved").put("{file}", globals())     # the functions of other assignments: solved.py\n'

SETUP = """\
#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the container. Only the CPU is used.
set -e
apt-get update -y && apt-get install -y {python} {python}-venv
{python} -m venv /opt/course
/opt/course/bin/python -m pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \\
    -r /autograder/source/repository/requirements.txt {pytest}
"""

RUN = """\
#!/usr/bin/env bash
# Gradescope runs this for every submission, as root. The submission's code runs as `nobody`, which can read
# neither the solution nor what others handed in, and cannot write the results.
chmod -R go-rwx /autograder/source /autograder/submission /autograder/results
cd /autograder/source/repository
exec /opt/course/bin/python course/grade.py /autograder/submission --assignment {name} --seed {seed} \\
    --user nobody --results /autograder/results/results.json
"""


def copy_files(patterns, out):
    """Copy what the patterns match in the repository to the folder `out`, at the same places."""
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                target = out / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def cut_out(name, out):
    """Blank the functions of assignment `name` in the folder `out`."""
    for blank in assignments.ASSIGNMENTS[name]:
        path = out / blank.file
        path.write_text(blanks.blank(path.read_text(), blank.name, blank.message))


def pack(names, out):
    """Take the solutions of the assignments `names` out of the folder's sources, and put them into
    solved.bin. What calls the functions does not notice."""
    texts = {}
    for blank in (b for name in names for b in assignments.ASSIGNMENTS[name]):
        source, path = (ROOT / blank.file).read_text(), out / blank.file
        shell = "".join(f"{' ' * 4 * depth}class {part}:\n"
                        for depth, part in enumerate(blank.name.split(".")[:-1]))
        texts.setdefault(blank.file, {})[blank.name] = shell + blanks.function(source, blank.name)
        path.write_text(blanks.blank(path.read_text(), blank.name, f"{blank.id} {blank.name}: see solved.py"))
    for file in texts:
        before, guard, after = (out / file).read_text().partition('\n\nif __name__ == "__main__":')
        (out / file).write_text(f"{before.rstrip()}\n\n\n{SOLVED.format(file=file)}{guard}{after}")
    (out / "solved.bin").write_bytes(zlib.compress(json.dumps(texts).encode(), 9))
    shutil.copyfile(ROOT / "course/solved.py", out / "solved.py")


def right_lines(out):
    """In the folder's pages, links to lines of a source (maetok.py#L120) lead to where these lines are now,
    or, if they are cut out, to the file."""
    moved = {}

    def right(match):
        file = match[1].removeprefix("../")
        if file not in moved:
            old, new = ((folder / file).read_text().splitlines() for folder in (ROOT, out))
            blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
            moved[file] = {b.a + i: b.b + i for b in blocks for i in range(b.size)}
        line = moved[file].get(int(match[2]) - 1)
        return f"]({match[1]})" if line is None else f"]({match[1]}#L{line + 1})"

    for page in (*out.glob("*.md"), *out.glob("docs/*.md")):
        page.write_text(re.sub(r"\]\(([\w./]+\.py)#L(\d+)\)", right, page.read_text()))


def pytest_pin():
    """The line "pytest==..." of the repository's requirements."""
    return re.search(r"^pytest==\S+", (ROOT / "requirements-dev.txt").read_text(), re.M)[0]


def commands(name, hidden=False):
    """(Makefile, blanks.json) of a folder. hidden: with the tests that students do not see."""
    listed = {b.id: {"file": b.file, "name": b.name, "message": b.message,
                     "tests": [*b.tests, *(b.hidden if hidden else ())]}
              for b in assignments.ASSIGNMENTS[name]}
    files = sorted({b["file"] for b in listed.values()}) or [
        "report.*", "runs/**/config.json", "runs/**/metrics.jsonl"]
    return (MAKEFILE.format(title=f"{name}: {assignments.TITLES[name]}", ids=" ".join(listed),
                            first=next(iter(listed), "test")),
            json.dumps({"blanks": listed, "submit": ["ASSIGNMENT", *files]}, indent=1) + "\n")


def hints(name):
    """HINTS.md: one for each blank, folded up."""
    parts = [f"<details><summary>{b.id} {b.name}</summary>\n\n{b.hint}\n\n</details>\n"
             for b in assignments.ASSIGNMENTS[name]]
    return f"# {name}: one hint for each blank\n\n" + "\n".join(parts)


def student_folder(name, out, solutions=False, opened=()):
    """What a student works in; with `solutions` the staff's copy, which has everything. opened: assignments
    whose solutions may be read in it."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds files already: choose another --out, or delete it")
    copy_files((*CODE, *READ, *TESTS, *(COURSE if solutions else ())), out)
    handout = ROOT / f"course/{name}.md"
    if handout.exists():
        (out / "HANDOUT.md").write_text(handout.read_text().replace("](../", "]("))
    if not solutions:
        cut_out(name, out)
        if closed := [n for n, listed in assignments.ASSIGNMENTS.items()
                      if listed and n not in (name, *opened)]:
            pack(closed, out)
        for path in out.glob("docs/reading.*"):                     # they show the lines that are blank
            path.unlink()
        right_lines(out)
    if assignments.ASSIGNMENTS[name]:
        (out / "HINTS.md").write_text(hints(name))
    (out / "ASSIGNMENT").write_text(name + "\n")
    for file, text in zip(("Makefile", "blanks.json"), commands(name, hidden=solutions)):
        (out / file).write_text(text)
    shutil.copyfile(ROOT / "course/work.py", out / "work.py")
    (out / "requirements-dev.txt").write_text(f"-r requirements.txt\n{pytest_pin()}\n")


def gradescope(name, out, seed, python="python3"):
    """The autograder's zip, as Gradescope wants it: setup.sh, run_autograder, and the repository to grade
    with. python: the package and command of its Python. Raises UserError where the tests do not hold with
    this seed."""
    from course import check                                        # it imports this module
    check.seed_holds(name, seed)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-autograder.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for script, text in (("setup.sh", SETUP.format(python=python, pytest=pytest_pin())),
                             ("run_autograder", RUN.format(name=name, seed=seed))):
            entry = zipfile.ZipInfo(script, (2025, 1, 1, 0, 0, 0))
            entry.external_attr = (stat.S_IFREG | 0o755) << 16
            file.writestr(entry, text)
        for pattern in (*CODE, *TESTS, *GRADER):
            for source in sorted(ROOT.glob(pattern)):
                if source.is_file():
                    file.write(source, f"repository/{source.relative_to(ROOT)}")
    return path


def table(name):
    """The table of blanks for a handout, in Markdown."""
    rows = [(b.id, f"`{Path(b.file).stem}.{b.name}`", b.source, b.points, ", ".join(b.needs) or "–",
             b.checks) for b in assignments.ASSIGNMENTS[name]]
    head = ("| blank | function | source | points | needs | what the tests check |\n"
            "|---|---|---|---|---|---|\n")
    if not rows:
        rows = assignments.A5_CHECKS
        head = "| check | points | what a program looks for |\n|---|---|---|\n"
    return head + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def with_table(text, name):
    """The handout's text with the table of blanks between its two marks.
    Raises UserError where one is missing."""
    parts = re.split(r"(?<=<!-- blanks -->\n)(.*?)(?=<!-- /blanks -->)", text, flags=re.S)
    if len(parts) != 3:
        raise UserError(f"course/{name}.md: the table goes between lines <!-- blanks --> and "
                        "<!-- /blanks -->")
    return parts[0] + table(name) + parts[2]


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("assignment", nargs="?", choices=tuple(assignments.ASSIGNMENTS))
    add("--all", action="store_true", help="every assignment, each in a folder of its name under --out")
    add("--out", type=Path, help="the folder to make; it must be empty or not there")
    add("--open", nargs="+", default=[], choices=tuple(assignments.ASSIGNMENTS), metavar="A",
        help="assignments whose solutions may be read in the folders: their deadline is over (default: none)")
    add("--solutions", action="store_true",
        help="the staff's copy: nothing blank, hidden tests, wrong answers")
    add("--gradescope", action="store_true", help="the autograder's zip instead of a folder")
    add("--seed", type=common.number(common.Seed),
        help="with --gradescope: of the hidden tests' data, a number for each term")
    add("--python", default="python3",
        help="with --gradescope: the base image's package of the Python to grade with, e.g. python3.12")
    add("--handouts", action="store_true", help="write the tables of blanks into course/A*.md")
    args = parser.parse_args(argv)
    if args.handouts:
        for name in assignments.ASSIGNMENTS:
            page = ROOT / f"course/{name}.md"
            if page.exists():
                page.write_text(with_table(page.read_text(), name))
                print(f"wrote the table of {page.relative_to(ROOT)}")
        return
    if bool(args.assignment) == args.all:
        raise UserError("which assignment? One of A1 ... A5, or --all")
    if args.out is None:
        raise UserError("give --out DIR")
    if args.gradescope and args.seed is None:
        raise UserError("give --seed, a number that no student knows")
    for name in assignments.ASSIGNMENTS if args.all else [args.assignment]:
        if args.gradescope:
            print(f"wrote {gradescope(name, args.out, args.seed, args.python)}")
        else:
            out = args.out / name if args.all else args.out
            student_folder(name, out, args.solutions, args.open)
            print(f"wrote {out}")


if __name__ == "__main__":
    processes.run(main)
