"""course/: blanks, folders, the tests that grade, and the grader against submissions that misbehave.

`make course` does more: all made submissions of every assignment, and each folder's own tests.
"""
import ast
import base64
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import checkpoints
import maetok
import sit
from common import UserError
from course import assignments, blanks, check, grade, make, notebook
from study import box

NAMES = [name for name, listed in assignments.ASSIGNMENTS.items() if listed]
BLANKS = [b for name in NAMES for b in assignments.ASSIGNMENTS[name]]
every_blank = pytest.mark.parametrize("b", BLANKS, ids=lambda b: b.id)


def text_of(blank):
    return (ROOT / blank.file).read_text()


# ------------------------------------------------- the data -------------------------------------------------

def test_the_list_of_blanks_is_in_order():
    for name in NAMES:
        listed = assignments.ASSIGNMENTS[name]
        assert [b.id for b in listed] == [f"{name}.{i + 1}" for i in range(len(listed))]
        assert sum(b.points for b in listed) == 60
        for i, b in enumerate(listed):
            assert set(b.needs) <= {other.id for other in listed[:i]}, b.id
            assert b.tests and b.hidden and b.hint and len(b.wrong) >= 3
    assert len(BLANKS) >= 32 and sum(len(b.wrong) for b in BLANKS) >= 183


@every_blank
def test_a_blank_keeps_its_signature_docstring_and_all_else(b):
    before = text_of(b)
    after = blanks.blank(before, b.name, b.message)
    piece = blanks.find(before, b.name)
    old, new = before.splitlines(), after.splitlines()
    assert new[:piece.first] == old[:piece.first] and new[piece.first + 1:] == old[piece.end:]
    assert new[piece.first].strip() == f'raise NotImplementedError("{b.message}")'
    assert blanks.signature(after, b.name) == blanks.signature(before, b.name)
    assert ast.get_docstring(blanks.find(after, b.name).node)
    assert blanks.replace_body(after, b.name, blanks.body(before, b.name)) == before


def test_what_a_tests_line_says_exists():
    there = {}
    for b in BLANKS:
        for test in (*b.tests, *b.hidden):
            file, name = test.split("::")
            if file not in there:
                there[file] = {node.name for node in ast.parse((ROOT / file).read_text()).body
                               if isinstance(node, ast.FunctionDef)}
            assert name.split("[")[0] in there[file], test
            assert file in make.TESTS or file.startswith("course/hidden/")


def test_handouts_carry_the_table_of_blanks():
    for page in sorted((ROOT / "course").glob("A?.md")):
        assert make.with_table(page.read_text(), page.stem) == page.read_text(), (
            "python course/make.py --handouts")
    assert make.with_table("a\n<!-- blanks -->\nold\n<!-- /blanks -->\nb\n", "A3").count("\n| A3.") == 13
    assert "| A1.6 | `hog.hog_features` | Sec. 3.2 | 18 | A1.4, A1.5 |" in make.table("A1")
    with pytest.raises(UserError, match="goes between"):
        make.with_table("no marks", "A3")


# -------------------------------------------- tests of the tests --------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_blanks_tests_fail_empty_pass_alone_and_reject_wrong_answers(name):
    """One wrong answer of twelve; `make course` tries all."""
    complaints, _, (wrong, rejected, _) = check.bank(name, seed=1, every=12)
    assert not complaints, "\n".join(complaints)
    assert rejected == wrong >= 10


# ----------------------------------------------- the folders -----------------------------------------------

def test_a_students_folder_has_blanks_tests_and_no_solution(tmp_path):
    folder = tmp_path / "A2"
    make.main(["A2", "--out", str(folder)])
    assert (folder / "ASSIGNMENT").read_text() == "A2\n" and not (folder / "course").exists()
    for b in BLANKS:
        mine = blanks.body((folder / b.file).read_text(), b.name)
        assert mine.strip().startswith("raise NotImplementedError("), b.id
        assert (b.message in mine) == b.id.startswith("A2."), b.id
    assert not any("hidden" in path.name for path in folder.rglob("*"))
    with pytest.raises(UserError, match="holds files already"):
        make.main(["A2", "--out", str(folder)])
    with pytest.raises(UserError, match="which assignment"):
        make.main(["--out", str(folder)])


WORKS = """
import json, sys, torch
import flow, hog, maetok, metrics, sit
from study import theory
torch.manual_seed(0)
images = torch.randn(2, 3, 16, 16)
cos, sin = maetok.RoPE2D(8)((2, 3), 1)
found = [maetok.patchify(images, 8).sum().item(), cos.sum().item(), *flow.time_grid(5),
         hog.hog_features(images, 8).sum().item(), sit.modulate(images, images, images).sum().item(),
         *metrics.psnr(*(torch.ones(2, 1, 3, 3, 3, dtype=torch.uint8))).tolist(),
         theory.mixture_score(images[0, 0], images[1, 0], 0.5).sum().item()]
print(json.dumps(found))
"""


def test_what_other_assignments_ask_for_works_in_a_folder(tmp_path):
    make.student_folder("A2", tmp_path / "A2")
    done = subprocess.run([sys.executable, "-c", WORKS], cwd=tmp_path / "A2", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = {}
    exec(WORKS, here)
    assert json.loads(done.stdout) == pytest.approx(here["found"], rel=1e-5)


def test_solutions_can_be_read_when_their_deadline_is_over(tmp_path):
    make.main(["A3", "--out", str(tmp_path / "A3"), "--open", "A1", "A4"])
    for b in BLANKS:
        mine = blanks.body((tmp_path / "A3" / b.file).read_text(), b.name)
        assert (mine == blanks.body(text_of(b), b.name)) == (b.id[:2] in ("A1", "A4")), b.id


def test_links_in_a_students_pages_lead_to_the_same_lines_as_before(tmp_path):
    make.student_folder("A2", tmp_path / "A2")
    link, moved = re.compile(r"\]\((?:\.\./)?([\w/]+\.py)(?:#L(\d+))?\)"), 0
    line_of = lambda folder, file, line: (folder / file).read_text().splitlines()[int(line) - 1]
    for page in ("README.md", "docs/equations.md"):
        before, after = (link.findall((folder / page).read_text()) for folder in (ROOT, tmp_path / "A2"))
        assert len(before) == len(after) > 20
        for (file, old), (same, new) in zip(before, after):
            assert file == same and bool(old) == bool(new)
            assert not old or line_of(ROOT, file, old) == line_of(tmp_path / "A2", file, new), file
            moved += old != new
    assert moved > 10


def test_folders_of_code_are_all_copied():
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    copied = {pattern.split("/")[0] for pattern in make.CODE if "/" in pattern}
    assert folders - {"tests", "course", "docs"} == copied


def test_wrong_answers_are_edits_that_apply_once():
    for b in BLANKS:
        texts = [grade.wrong_text(b, wrong) for wrong in b.wrong]
        for text in texts[::8]:                                      # `make course` compiles all
            compile(text, b.file, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_blank_is_called_when_tests_are_collected(tmp_path, name):
    """A blank in a decorator, or at a test file's top, would break every other test of that file."""
    make.student_folder(name, tmp_path / name)
    listed = dict.fromkeys(test.split("::")[0] for b in assignments.ASSIGNMENTS[name] for test in b.tests)
    found = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", *listed],
                           cwd=tmp_path / name, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]


@pytest.mark.slow
def test_a_folder_with_the_solutions_pasted_in_passes_its_own_tests(tmp_path):
    folder = tmp_path / "A1"
    make.student_folder("A1", folder)
    assert "NotImplementedError: A1.1 patchify" in check.in_folder(folder, "A1.1").stdout
    check.answer("A1", folder, "solution")
    tests = check.in_folder(folder, "test")
    assert tests.returncode == 0, tests.stdout[-3000:] + tests.stderr


def test_submit_needs_no_packages_and_says_what_is_empty(tmp_path):
    folder = tmp_path / "A1"
    make.student_folder("A1", folder)
    path = folder / "hog.py"
    path.write_text(blanks.replace_body(path.read_text(), "sobel", "    return images, images"))
    for command in (["make", "submit"], [sys.executable, "-S", "-E", "work.py", "submit"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PATH": os.defpath})
        assert done.returncode == 0, done.stderr
        assert "A1.1 patchify: still empty" in done.stdout and "A1.4 sobel: written" in done.stdout
        assert "functions, classes, constants, imports" in done.stdout
        with zipfile.ZipFile(folder / "submission.zip") as file:
            assert file.namelist() == ["ENVIRONMENT", "ASSIGNMENT", "hog.py", "maetok.py"]
            assert re.fullmatch(rb"Python 3[.\d]+, torch \S+\n", file.read("ENVIRONMENT"))
        (folder / "submission.zip").unlink()
    assert not (folder / ".venv").exists()
    path.write_text("def sobel(images):\n    return images images\n")
    done = subprocess.run(["make", "submit"], cwd=folder, capture_output=True, text=True)
    assert "A1.4 sobel: hog.py does not parse, line 2" in done.stdout


def test_a_folder_without_make_runs_the_same_tests(tmp_path):
    """`make -n` says what it would do; nothing is installed."""
    make.student_folder("A1", tmp_path / "A1")
    would = lambda *words: subprocess.run(["make", "-n", *words], cwd=tmp_path / "A1", capture_output=True,
                                          text=True, env={"PATH": os.defpath}).stdout.splitlines()
    assert would("A1.4") == ["python3 work.py install", ".venv/bin/python work.py A1.4"]
    assert would("A1.4", "VENV=../e", "PYTHON=python3.12") == ["python3.12 work.py install",
                                                               "../e/bin/python work.py A1.4"]
    assert would("test", "PY=python3") == ["python3 work.py test"]
    listed = json.loads((tmp_path / "A1/blanks.json").read_text())["blanks"]
    assert {id: tuple(b["tests"]) for id, b in listed.items()} == {b.id: b.tests for b in
                                                                  assignments.ASSIGNMENTS["A1"]}


@pytest.mark.parametrize("driver", [True, False])
def test_without_an_nvidia_driver_torch_comes_from_the_index_of_cpu_builds(tmp_path, monkeypatch, driver):
    make.student_folder("A1", tmp_path / "A1")
    spec = importlib.util.spec_from_file_location("work", tmp_path / "A1/work.py")
    work = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(work)
    calls = []

    def call(command):
        calls.append(" ".join(map(str, command)))
        if "venv" in command:
            (work.VENV / "bin").mkdir(parents=True)
            (work.VENV / "bin/python").touch()
    monkeypatch.chdir(tmp_path / "A1")
    monkeypatch.setattr(work, "VENV", tmp_path / "shared")
    monkeypatch.setattr(work.subprocess, "call", call)
    monkeypatch.setattr(work.subprocess, "check_call", call)
    monkeypatch.setattr(work.shutil, "which", lambda name: "there" if driver else None)
    work.install()
    pin = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)[0]
    assert [call.endswith(f"https://download.pytorch.org/whl/cpu {pin}") for call in calls] == (
        [False, False] if driver else [False, True, False])
    assert calls[-1].endswith("-r requirements-dev.txt") and (tmp_path / "shared/ready").exists()
    monkeypatch.setattr(work.sys, "version_info", (3, 9))
    with pytest.raises(SystemExit, match="3.10 or newer"):
        work.install()


@pytest.mark.slow
def test_the_autograder_grades_from_its_zip(tmp_path):
    make.main(["A5", "--gradescope", "--seed", "7", "--out", str(tmp_path)])
    with zipfile.ZipFile(tmp_path / "A5-autograder.zip") as file:
        assert file.getinfo("run_autograder").external_attr >> 16 & 0o111
        assert "--seed 7" in file.read("run_autograder").decode() and b"pytest==" in file.read("setup.sh")
        file.extractall(tmp_path)
    folder = tmp_path / "submission"
    make.student_folder("A5", folder)
    check.answer("A5", folder, "solution")
    process = subprocess.run([sys.executable, "repository/course/grade.py", str(folder), "--json"],
                             cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == json.loads(process.stdout) and results["score"] == 10
    assert f"graded with Python {platform.python_version()}, torch {torch.__version__}" in results["output"]
    assert [t["status"] for t in results["tests"]] == ["passed", "passed"]


def test_the_autograder_is_made_for_a_seed_that_the_solution_passes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="give --seed"):
        make.main(["A1", "--gradescope", "--out", str(tmp_path)])
    asked = []
    monkeypatch.setattr(check, "seed_holds", lambda *args: asked.append(args))
    make.main(["A1", "--gradescope", "--seed", "16", "--python", "python3.12", "--out", str(tmp_path)])
    assert asked == [("A1", 16)]
    with zipfile.ZipFile(tmp_path / "A1-autograder.zip") as file:
        setup = file.read("setup.sh").decode()
    assert "install -y python3.12 python3.12-venv" in setup and "python3.12 -m venv" in setup


@pytest.mark.parametrize("kind", ["empty", "solution", "wrong"])
def test_an_experiment_needs_a_report_and_two_seeds(tmp_path, kind):
    folder = tmp_path / "A5"
    folder.mkdir()
    check.answer("A5", folder, kind)
    name, marks = grade.grade(folder, "A5")
    assert sum(m.points for m in marks) == check.expected("A5", kind)
    assert all(m.reasons for m in marks if m.points == 0)


# ---------------------------------------- submissions that misbehave ----------------------------------------

@pytest.mark.parametrize("text, reason", [
    (None, "hog.py is not in the submission"),
    ("def sobel(images):\n    return (", "hog.py does not parse"),
    ("def sobel(pictures):\n    return pictures", "its signature is (pictures), not (images)"),
    ("@cache\ndef sobel(images):\n    return images", "its signature is @cache (images), not (images)"),
    ("def sobel(images, size=print('hello')):\n    return images", "its signature is"),
    ("sobel = 3", "hog.py has no function sobel"),
    ("class sobel: pass", "hog.py has no function sobel"),
    ("def sobel(images): return images", "it is on one line"),
    ("def sobel(images):\n    from math import *\n", "hog.py does not parse: import * only allowed"),
    ("(" * 10_000, "does not parse"),
    ("count = 0\ndef sobel(images):\n    global count\n    count += 1\n", "`global count`"),
    ("def sobel(images):\n    return 1\n".encode("utf-16"), "hog.py is not a text in UTF-8"),
    ("# grün\ndef sobel(images):\n    return 1\n".encode("latin-1"), "hog.py is not a text in UTF-8"),
    (b"def sobel(images):\n    return '\0'\n", "hog.py is not a text in UTF-8"),
    ("#" * 2_000_000, "hog.py has 2000000 bytes")])
def test_what_cannot_be_taken_gets_a_clear_line(tmp_path, text, reason):
    b = assignments.blank_of("A1.4")
    if text is not None:
        (tmp_path / "hog.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as found:
        grade.with_answer(b, text_of(b), grade.Submission(tmp_path))
    assert str(found.value).startswith("hog.py") and reason in str(found.value)


def test_only_the_body_of_the_function_is_taken(tmp_path):
    b = assignments.blank_of("A1.4")
    (tmp_path / "hog.py").write_text("import nothing\n\n\n"
                                     "def sobel(images: 'any') -> None:  # mine\n  'Doc.'\n"
                                     "  # a comment\n  return images, 1\n\nprint('hello')\n")
    found = grade.with_answer(b, text_of(b), grade.Submission(tmp_path))
    assert found == blanks.replace_body(text_of(b), "sobel", "    return (images, 1)")


CLEAN = """
import math
import xml
LIMIT = 3


def other(x):
    return x


def asked(x, size=LIMIT):
    raise NotImplementedError


class Part:
    def asked(self, x):
        raise NotImplementedError
"""
THEIRS = """
import itertools as it
import math
import xml.dom
from functools import lru_cache, reduce
from math import pi as LIMIT, ceil
LIMIT = 4
SIZE, HEIGHT = 10, 2
WIDTH: int = SIZE * 2
table = {"b": 1}
print(1 / 0)
window = 7


def other(x):
    return "changed"


@lru_cache
def deep(n: int = WIDTH):
    return 0 if n == 0 else 1 + deep(n - 1)


class Pair:
    def __init__(self, a):
        self.a, self.b = a, table["b"]


def helper(x):
    return deep(x) + Pair(2).a + window + next(it.count(LIMIT))


def sum(values):
    return 0


def asked(x, size=LIMIT):
    window = other(x)
    return window, [helper(y) for y in (3,)], size, LIMIT, xml.dom.__name__, sum([5])


class Part:
    def extra(self):
        return 1

    def asked(self, x):
        Pair = 0
        return [deep(y) + WIDTH for y in (x,)][0] + Pair + self.extra()
"""


def test_helpers_constants_and_imports_that_a_body_uses_come_with_it():
    names = {}
    exec(blanks.transplant(CLEAN, "asked", THEIRS), names)
    for _ in range(2):
        assert names["asked"](1) == (1, [3 + 2 + 7 + 3], 3, 3, "xml.dom", 0)
    assert names["LIMIT"] == 3 and names["other"](1) == 1       # what was there stays; nothing else is new
    assert not {"it", "SIZE", "table", "deep", "Pair", "helper", "sum"} & names.keys()
    exec(blanks.transplant(CLEAN, "Part.asked", THEIRS), names)
    names["Part"].extra = lambda self: 1                        # methods are not taken
    assert names["Part"]().asked(4) == 4 + 20 + 1
    assert "lru_cache" in blanks.transplant(CLEAN, "asked", THEIRS)
    assert "reduce(" not in blanks.transplant(CLEAN, "asked", THEIRS)
    body = THEIRS.replace("window, [helper(y) for y in (3,)], size, LIMIT, xml.dom.__name__, sum([5])", "x")
    assert blanks.transplant(CLEAN, "asked", body) == blanks.replace_body(
        CLEAN, "asked", "    window = other(x)\n    return x")


def test_links_in_a_submission_are_not_followed(tmp_path):
    (tmp_path / "hog.py").symlink_to(ROOT / "hog.py")
    with pytest.raises(ValueError, match="not in the submission"):
        grade.Submission(tmp_path).text("hog.py")


def test_files_are_found_in_zips_without_their_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("home/me/theory.py", "deep")
        file.writestr("upload/theory.py", "found")
        file.writestr("study.py", "another")
    submission = grade.Submission(tmp_path / "a.zip")
    assert submission.text("study/theory.py") == "found"
    (tmp_path / "b.zip").write_text("no zip")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        grade.Submission(tmp_path / "b.zip")
    with pytest.raises(UserError, match="which one this is"):
        grade.grade(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_systems_and_environments_put_beside_the_files_hides_nothing(tmp_path, zipped):
    found = tmp_path / "sent/a folder/A1-of-me"
    for path, text in {"ASSIGNMENT": "A1\r\n", "hog.py": "mine\r\n", "../old/hog.py": "old"}.items():
        (found / path).parent.mkdir(parents=True, exist_ok=True)
        (found / path).write_bytes(b"\xef\xbb\xbf" + text.encode())
    for folder in (".venv/lib", "__MACOSX", "node_modules", "x/site-packages/metrics", "venv", "more"):
        (found.parents[1] / folder).mkdir(parents=True)
        for name in ("hog.py", "ASSIGNMENT", "maetok.py") if folder != "more" else ("._hog.py", "other.py"):
            (found.parents[1] / folder / name).write_text("not theirs")
    (found.parents[1] / "more/files").mkdir()
    for i in range(5001):
        (found.parents[1] / f"more/files/{i}.py").touch()
    if zipped:
        shutil.make_archive(str(tmp_path / "sent"), "zip", tmp_path / "sent")
        with zipfile.ZipFile(tmp_path / "sent.zip", "a") as file:
            file.writestr("__MACOSX\\hog.py", "not theirs")
    submission = grade.Submission(tmp_path / ("sent.zip" if zipped else "sent"))
    assert submission.text("ASSIGNMENT") == "A1\n" and submission.text("hog.py") == "mine\n"
    with pytest.raises(ValueError, match="maetok.py is not in the submission"):
        submission.text("maetok.py")


def test_another_assignments_folder_gets_nothing(tmp_path):
    make.student_folder("A2", tmp_path / "A2")
    name, (mark,) = grade.grade(tmp_path / "A2", "A1")
    assert (name, mark.points, mark.most) == ("A1", 0, 60)
    assert mark.reasons == ["this is A2, as its file ASSIGNMENT says, and not A1"]
    (tmp_path / "A2/ASSIGNMENT").write_text("A1")
    _, marks = grade.grade(tmp_path / "A2")
    assert [m.reasons for m in marks] == [["still empty"]] * 6 and not any(m.points for m in marks)


SECRET = "AssertionError: COURSE_SEED 16\nassert data"


@pytest.mark.parametrize("why, shown", [
    ("AssertionError: Tensor-likes are not close!\n\nMismatched", "wrong values"),
    ("AssertionError: The values for attribute 'dtype' do not match: torch.float32 != 16", "wrong dtype"),
    ("assert 3 == 16\n +  where", "a value, shape or dtype is not as asked"),
    (SECRET, "a value, shape or dtype is not as asked"),
    ("AssertionError: one channel per head\nassert 3 == 4", "one channel per head"),
    ("Failed: DID NOT RAISE <class 'ValueError'>", "an error that is asked for is not raised"),
    ("Failed: the seed is 16", "an error"),
    ("NotImplementedError: A1.4 sobel: Sec. 3.2",
     "it calls A1.4 sobel: Sec. 3.2, which is empty while this blank is graded"),
    ("NotImplementedError: seed 16", "NotImplementedError"),
    ("NameError: name 'helper' is not defined", "NameError, 'helper'"),
    ("NameError: name 'seed16' is not defined", "NameError"),
    ("ModuleNotFoundError: No module named 'einops'", "ModuleNotFoundError, 'einops'"),
    ("AttributeError: 'Encoder' object has no attribute 'mine'", "AttributeError, 'mine'"),
    ("ValueError: 16", "ValueError"), ("SystemExit: 16", "SystemExit"),
    ("seed16.Mine: 16", "an error"), ("seed16: 16", "an error"),
    ("runtime.processes.UserError: 16", "UserError"),
    ("open: 16", "an error"), ("skipped: seed 16", "it did not run"), ("", "an error")])
def test_what_a_student_reads_of_a_failure_is_no_channel(tmp_path, monkeypatch, why, shown):
    monkeypatch.setattr(grade, "messages", lambda file: {"one channel per head"})
    text = "import einops\ndef f(self):\n    return helper(self.mine)\n"
    assert grade.kind(why, "course/hidden/a1.py::test_x", text) == shown


def test_messages_of_a_file_of_tests_are_its_own_texts(tmp_path, monkeypatch):
    (tmp_path / "tests.py").write_text("assert 1 == 1, 'for students'\nassert 2, f'{1}'\nassert 3, 'more'\n")
    assert grade.messages(tmp_path / "tests.py") == {"for students", "more"}
    for text in grade.messages("course/hidden/given.py"):       # what hidden tests share has texts, too
        assert grade.kind(f"AssertionError: {text}", "course/hidden/a1.py::test_x", "") == text


def test_the_staff_alone_reads_notes():
    marks = [grade.Mark("A1.1", "patchify", 0, 8, ["test a: ValueError"], ["test a: ValueError: 16"])]
    assert "16" not in grade.as_text("A1", marks) and "(staff) test a: ValueError: 16" in grade.as_text(
        "A1", marks, notes=True)
    *visible, staff = grade.as_json("A1", marks)["tests"]
    assert [t["visibility"] for t in visible] == ["visible"] and "16" not in json.dumps(visible)
    assert staff["visibility"] == "hidden" and staff["output"] == "A1.1: test a: ValueError: 16"


PATCHES = """
    from _pytest.reports import TestReport
    report = TestReport.from_item_and_call.__func__
    def passed(cls, item, call):
        call.excinfo = None
        return report(cls, item, call)
    TestReport.from_item_and_call = classmethod(passed)
    return x
"""
READS = """
    source = open(CLONE).read()
    exec(source, globals())
    return self.forward(grid, others)
"""
DELETES = """
    import shutil, os
    for path in (VICTIM, os.path.join(VICTIM, "file")):
        try:
            shutil.rmtree(path)
            os.remove(path)
            open(path, "w").write("gone")
        except OSError:
            pass
    raise ValueError(f"{dict(os.environ)} {open('course/hidden/a1.py').read()}")
"""
# Looks for the nonce where its lines have gone, and leaves as if all were well.
FORGES = """
    import json, os, re
    for fd in range(3, 40):
        try:
            nonce = re.search(rb'"nonce": "(\\w+)"', os.pread(fd, 1 << 20, 0))
            for test in TESTS:
                os.write(fd, json.dumps({"round": "answer", "test": test, "outcome": "passed",
                                         "reason": "", "nonce": nonce[1].decode() if nonce else "0" * 32,
                                         "finished": True}).encode() + b"\\n")
        except OSError:
            pass
    print("50 passed")
    os._exit(0)
"""


@pytest.mark.slow
def test_misbehaviour_gets_nothing_and_harms_nothing(tmp_path):
    folder, victim, clone = tmp_path / "A1", tmp_path / "victim", tmp_path / "clone"
    for other in (victim, clone):
        other.mkdir()
    (victim / "file").write_text("precious")
    shutil.copyfile(ROOT / "maetok.py", clone / "maetok.py")
    make.student_folder("A1", folder)
    first = assignments.blank_of("A1.1")
    for file, name, text in (
            ("maetok.py", "patchify", FORGES.replace("TESTS", repr(first.tests + first.hidden))),
            ("maetok.py", "rotate", PATCHES),
            ("maetok.py", "RoPE2D.forward",
             READS.replace("\n    ", "\n        ").replace("CLONE", repr(str(clone / "maetok.py")))),
            ("hog.py", "sobel", DELETES.replace("VICTIM", repr(str(victim))))):
        path = folder / file
        path.write_text(blanks.replace_body(path.read_text(), name, text.strip("\n")))
    _, marks = grade.grade(folder, seed=16)
    reasons, notes = ({m.id: " ".join(getattr(m, field)) for m in marks} for field in ("reasons", "notes"))
    assert [m.points for m in marks] == [0] * 6
    assert "ended with status 0 before its tests were done" in reasons["A1.1"]
    assert "it has changed tests, pytest" in reasons["A1.2"] and "A1.2: " in notes["A1.2"]
    assert "PermissionError" in reasons["A1.3"] and f"closed while tests run: {clone}" in notes["A1.3"]
    assert all(reason.endswith(": ValueError") for reason in marks[3].reasons)
    assert "ValueError: {'" in notes["A1.4"] and "COURSE_SEED" not in notes["A1.4"]
    assert (victim / "file").read_text() == "precious"


HELPERS = """\
import math

import numpy as np
import torch
from itertools import count as counted

HALF = 0.5


def bell(distance, deviation):
    return np.exp(-HALF * (distance / deviation) ** 2)


def gaussian_window(cell_size=8, device=None):
    numbers = np.array([i for i, _ in zip(counted(), range(2 * cell_size))])
    print("x" * 3_000_000)
    side = bell(numbers - (cell_size - HALF), cell_size)
    return torch.from_numpy(np.outer(side, side) / side.sum() ** 2).float().to(device)
"""


@pytest.mark.slow
def test_a_file_from_windows_with_helpers_in_a_large_zip_gets_its_points(tmp_path):
    b = assignments.blank_of("A1.5")
    clean = re.search(r"def gaussian_window\((.*?)\)", text_of(b))[1]
    text = re.sub(r"def gaussian_window\(.*?\)", lambda _: f"def gaussian_window({clean})", HELPERS)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for i in range(6000):
            file.writestr(f"A1 of me/.venv/lib/{i}.py", "")
        file.writestr("A1 of me/ASSIGNMENT", "\ufeffA1\r\n")
        file.writestr("A1 of me/ENVIRONMENT", "Python 3.13.1, torch 2.13.0\n")
        file.writestr("A1 of me/hog.py", "\ufeff" + text.replace("\n", "\r\n"))
    name, marks = grade.grade(tmp_path / "a.zip")
    assert name == "A1" and [m.points for m in marks] == [0, 0, 0, 0, 4, 0], grade.as_text(name, marks, True)
    assert not marks[4].notes                                   # it is not the solution's text
    assert grade.versions(tmp_path / "a.zip").endswith("the student's: Python 3.13.1, torch 2.13.0")


def run_one(tmp_path, body, **options):
    """(entries, trouble) of A1.5's tests with this body, without the fence, as if that had failed."""
    b = assignments.blank_of("A1.5")
    copy = tmp_path / "copy"
    make.copy_files((*make.CODE, *make.TESTS, *make.HIDDEN), copy)
    code = grade.code_of(blanks.replace_body(text_of(b), b.name, body), b.file, b.name)
    rounds = [dict(name="answer", put={f"{b.file}:{b.name}": code}, tests=[*b.tests], first=False)]
    return grade.run_rounds(rounds, copy, tmp_path, 0, **options, fenced=False)


LOOKS = """
    import gc
    held = gc.get_objects()
    for _ in range(2):
        held = list({id(x): x for x in [*held, *gc.get_referents(*held)]}.values())
    raise ValueError(sum(type(x).__name__ == "code" and x.co_name == "gaussian_window" for x in held))
"""


@pytest.mark.slow
def test_the_process_gets_wrong_answers_after_its_own_alone(tmp_path):
    """Of code with the function's name it holds what is put in its place, and no more."""
    b = assignments.blank_of("A1.5")
    asked = []

    def more(found):
        asked.append([entry["reason"] for entry in found if "reason" in entry])
        return grade.rounds_of(b, b.wrong)

    entries, trouble = run_one(tmp_path, LOOKS.strip("\n"), seconds=60, processor=60, more=more)
    assert trouble is None and asked == [["ValueError: 1"] * len(b.tests)]
    assert {e["round"] for e in entries if "round" in e} == {"answer", *(f"A1.5: {w[0]}" for w in b.wrong)}


HANGS = """
    import subprocess, time
    keep = "echo $$ >> pids; exec env -i /bin/sleep 600"
    for command in (["sh", "-c", keep], ["setsid", "sh", "-c", keep],
                    ["setsid", "sh", "-c", f"sh -c '{keep}' & exit"]):
        subprocess.Popen(command)
    time.sleep(600)
"""


@pytest.mark.slow
def test_what_hangs_is_ended_with_all_that_it_started(tmp_path):
    """Asleep, with a child in its group, one in a session of its own, and one whose parent is gone, too."""
    entries, trouble = run_one(tmp_path, HANGS.strip("\n"), seconds=6, processor=30)
    assert trouble == "not finished after 6 s"
    assert [set(entry) for entry in entries] == [{"started", "nonce"}]              # and no test's verdict
    pids = (tmp_path / "copy/pids").read_text().split()
    assert len(set(pids)) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


# ----------------------------------------------- the notebook -----------------------------------------------

def test_the_notebook_is_made_of_its_script():
    page = ROOT / "course/walkthrough.ipynb"
    if not page.exists():
        pytest.skip("not made yet: python course/notebook.py")
    cells = json.loads(page.read_text())["cells"]
    assert ([(cell["cell_type"] == "markdown", "".join(cell["source"])) for cell in cells]
            == notebook.cells_of((ROOT / "course/walkthrough.py").read_text())), "python course/notebook.py"
    assert sum("image/png" in output.get("data", {}) for cell in cells
               for output in cell.get("outputs", ())) >= 8
    assert page.stat().st_size < 2_000_000


def test_the_notebooks_first_cell_fetches_the_code_where_it_is_hosted(tmp_path, monkeypatch):
    first = next(source for text, source in notebook.cells_of((ROOT / "course/walkthrough.py").read_text())
                 if not text)
    origin, commands = tmp_path / "origin", []
    origin.mkdir()
    (origin / "maetok.py").write_text("")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    run = subprocess.run
    (tmp_path / "host").mkdir()
    monkeypatch.chdir(tmp_path / "host")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", lambda command, **more: commands.append(command) or (
        run(command, **more) if command[0] == "git" else None))
    with pytest.raises(AssertionError, match="set REPOSITORY"):
        exec(first, {})
    exec(first.replace('REPOSITORY = ""', f'REPOSITORY = "file://{origin}"'), {})
    assert sys.path[0] == str(tmp_path / "host/maetok") and (tmp_path / "host/maetok/maetok.py").exists()
    assert commands[1][1:4] == ["-m", "pip", "install"] and len(commands) == 2
    assert "github/OWNER/NAME/blob/main/course/walkthrough.ipynb" in (ROOT / "course/README.md").read_text()


@pytest.mark.slow
def test_the_notebook_runs_from_image_to_sample(tmp_path, monkeypatch):
    """With a small model that is not trained; what the pictures show is not tested."""
    tokenizer = maetok.MAETok(maetok.MAETokConfig(image_size=32, patch_size=8, width=16, heads=2,
                                                  encoder_depth=1, decoder_depth=1, num_latents=4,
                                                  latent_dim=4))
    model = sit.SiT(sit.SiTConfig(num_latents=4, latent_dim=4, width=16, heads=2, depth=1, num_classes=10))
    as_dict = lambda part: vars(part.config)
    torch.save({"kind": "diffusion", "step": 1, "config": as_dict(model) | {"path": "linear"},
                "add": [], "ema": model.state_dict(), "classes": [],
                "tokenizer": {"kind": "tokenizer", "config": as_dict(tokenizer), "add": [],
                              "ema": tokenizer.state_dict(), "stage": 1, "measured": True}},
               tmp_path / "run.pt")
    box.pack(tmp_path / "run.pt", tmp_path / "box.pt")
    monkeypatch.setattr(checkpoints, "DEFAULT_MODEL", tmp_path / "box.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    script = (ROOT / "course/walkthrough.py").read_text().replace("Path.cwd().parent", f"Path({str(ROOT)!r})")
    try:
        page = notebook.notebook(script)
    finally:
        torch.set_grad_enabled(True)
    outputs = [output for cell in page["cells"] for output in cell.get("outputs", ())]
    pictures = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
    assert len(pictures) == 9
    for picture in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(picture))).size) > 60
    assert any("PSNR" in line for output in outputs for line in output.get("text", ()))
