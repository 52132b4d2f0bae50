"""Make the folders of the course from the working code.

    python course/make.py A2 --out DIR               # the student's folder: A2's functions are blank
    python course/make.py --all --out DIR            # DIR/A1 ... DIR/A5
    python course/make.py A2 --solutions --out DIR   # a staff copy: nothing blank, with the hidden tests
    python course/make.py A2 --gradescope --out DIR  # DIR/A2-autograder.zip
    python course/make.py --handouts                 # write the tables of blanks into course/A*.md

The sources carry no marks: assignments.py names the functions, and their bodies are cut out here. Assignments
before and after keep their solutions, so that every script runs as soon as the folder's own blanks are
filled.
"""
import argparse
import re
import shutil
import stat
import sys
import zipfile
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
TESTS = ("tests/conftest.py", "tests/forked.py", "tests/random_frozen.py",
         *(f"tests/test_{name}.py" for name in
           ("maetok", "hog", "losses", "train_tokenizer", "train_gan", "flow", "sit", "metrics", "theory")))
# What tests and grades; a copy in which submissions run has HIDDEN alone.
GRADER = ("course/*.py", "course/bank/*.py", "course/hidden/*.py")
HIDDEN = ("course/hidden/*.py", "course/runner.py")
COURSE = (*GRADER, "course/*.md", "docs/figures/*")

MAKEFILE = """\
# {title}. PYTHON=... chooses another interpreter (3.10 or newer), PY=... one that has the packages already.
PYTHON ?= python3
PY := .venv/bin/python
TESTS := {tests}
SUBMIT := {submit}

.PHONY: test submit {ids}

# All tests that you may see. One blank's: make {first}.
test: .venv/ready
	$(PY) -m pytest -q $(TESTS)
{targets}
# What you hand in.
submit:
	$(PY) -c "import glob, zipfile; z = zipfile.ZipFile('submission.zip', 'w'); \\
	[z.write(f) for p in '$(SUBMIT)'.split() for f in sorted(glob.glob(p, recursive=True))]; z.close()"
	@echo wrote submission.zip

.venv/ready: requirements.txt requirements-dev.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
"""

SETUP = """\
#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the container. Only the CPU is used.
set -e
apt-get update -y && apt-get install -y python3 python3-venv
python3 -m venv /opt/course
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


def cut_out(name, out, keep=()):
    """Blank the functions of assignment `name` in the folder `out`, but those whose ids are in `keep`."""
    for blank in assignments.ASSIGNMENTS[name]:
        if blank.id not in keep:
            path = out / blank.file
            path.write_text(blanks.blank(path.read_text(), blank.name, blank.message))


def pytest_pin():
    """The line "pytest==..." of the repository's requirements."""
    return re.search(r"^pytest==\S+", (ROOT / "requirements-dev.txt").read_text(), re.M)[0]


def makefile(name, hidden=False):
    """The text of a folder's Makefile. hidden: with the tests that students do not see."""
    listed = {b.id: [*b.tests, *(b.hidden if hidden else ())] for b in assignments.ASSIGNMENTS[name]}
    quote = lambda tests: " ".join(f"'{t}'" if "[" in t else t for t in dict.fromkeys(tests))
    targets = "".join(f"{id}: .venv/ready\n\t$(PY) -m pytest -q {quote(tests)}\n"
                      for id, tests in listed.items())
    files = sorted({b.file for b in assignments.ASSIGNMENTS[name]}) or [
        "report.*", "runs/**/config.json", "runs/**/metrics.jsonl"]
    # A5 has nothing blank, so nothing of it can be tested: what is there runs a look at the small parts.
    return MAKEFILE.format(title=f"{name}: {assignments.TITLES[name]}", ids=" ".join(listed),
                           tests=(quote(t for tests in listed.values() for t in tests)
                                  or "tests/test_maetok.py"),
                           submit=" ".join(["ASSIGNMENT", *files]), first=next(iter(listed), "test"),
                           targets=targets)


def hints(name):
    """HINTS.md: one for each blank, folded up."""
    parts = [f"<details><summary>{b.id} {b.name}</summary>\n\n{b.hint}\n\n</details>\n"
             for b in assignments.ASSIGNMENTS[name]]
    return f"# {name}: one hint for each blank\n\n" + "\n".join(parts)


def student_folder(name, out, solutions=False):
    """What a student works in; with `solutions` the staff's copy, which has everything."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds files already: choose another --out, or delete it")
    copy_files((*CODE, *READ, *TESTS, *(COURSE if solutions else ())), out)
    if not solutions:
        cut_out(name, out)
        for path in out.glob("docs/reading.*"):                     # they show the lines that are blank
            path.unlink()
    handout = ROOT / f"course/{name}.md"
    if handout.exists():
        (out / "HANDOUT.md").write_text(handout.read_text().replace("](../", "]("))
    if assignments.ASSIGNMENTS[name]:
        (out / "HINTS.md").write_text(hints(name))
    (out / "ASSIGNMENT").write_text(name + "\n")
    (out / "Makefile").write_text(makefile(name, hidden=solutions))
    (out / "requirements-dev.txt").write_text(f"-r requirements.txt\n{pytest_pin()}\n")


def gradescope(name, out, seed):
    """The autograder's zip, as Gradescope wants it: setup.sh, run_autograder,
    and the repository to grade with."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-autograder.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for script, text in (("setup.sh", SETUP.format(pytest=pytest_pin())),
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
    rows = [(b.id, f"`{Path(b.file).stem}.{b.name}`", b.source, b.points, b.checks)
            for b in assignments.ASSIGNMENTS[name]]
    head = "| blank | function | source | points | what the tests check |\n|---|---|---|---|---|\n"
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
    add("--solutions", action="store_true",
        help="the staff's copy: nothing blank, hidden tests, wrong answers")
    add("--gradescope", action="store_true", help="the autograder's zip instead of a folder")
    add("--seed", type=common.number(common.Seed), default=0,
        help="with --gradescope: of the hidden tests' data (default 0)")
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
    for name in assignments.ASSIGNMENTS if args.all else [args.assignment]:
        if args.gradescope:
            print(f"wrote {gradescope(name, args.out, args.seed)}")
        else:
            out = args.out / name if args.all else args.out
            student_folder(name, out, args.solutions)
            print(f"wrote {out}")


if __name__ == "__main__":
    processes.run(main)
