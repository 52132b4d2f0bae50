"""course/: blanks, folders, the tests that grade, and the grader against submissions that misbehave.

`make course` does more: all made submissions of every assignment, and each folder's own tests.
"""
import ast
import base64
import io
import json
import os
import subprocess
import sys
import time
import zipfile

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
    for b in BLANKS:
        for test in (*b.tests, *b.hidden):
            file, name = test.split("::")
            assert blanks.find((ROOT / file).read_text(), name.split("[")[0]), test
            assert file in make.TESTS or file.startswith("course/hidden/")


def test_handouts_carry_the_table_of_blanks():
    for page in sorted((ROOT / "course").glob("A?.md")):
        assert make.with_table(page.read_text(), page.stem) == page.read_text(), (
            "python course/make.py --handouts")
    assert make.with_table("a\n<!-- blanks -->\nold\n<!-- /blanks -->\nb\n", "A3").count("| A3.") == 13
    with pytest.raises(UserError, match="goes between"):
        make.with_table("no marks", "A3")


# -------------------------------------------- tests of the tests --------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_blanks_tests_fail_empty_pass_alone_and_reject_all_wrong_answers(name):
    complaints, _, (wrong, rejected, _) = check.bank(name, seed=1)
    assert not complaints, "\n".join(complaints)
    assert rejected == wrong


# ----------------------------------------------- the folders -----------------------------------------------

def test_a_students_folder_has_blanks_tests_and_no_solution(tmp_path):
    folder = tmp_path / "A2"
    make.main(["A2", "--out", str(folder)])
    assert (folder / "ASSIGNMENT").read_text() == "A2\n" and not (folder / "course").exists()
    for name in NAMES:
        for b in assignments.ASSIGNMENTS[name]:
            mine = blanks.body((folder / b.file).read_text(), b.name)
            assert (b.message in mine) if name == "A2" else mine == blanks.body(text_of(b), b.name)
    assert "A2.5: .venv/ready" in (folder / "Makefile").read_text()
    assert not any("hidden" in path.name for path in folder.rglob("*"))
    with pytest.raises(UserError, match="holds files already"):
        make.main(["A2", "--out", str(folder)])
    with pytest.raises(UserError, match="which assignment"):
        make.main(["--out", str(folder)])


def test_folders_of_code_are_all_copied():
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    copied = {pattern.split("/")[0] for pattern in make.CODE if "/" in pattern}
    assert folders - {"tests", "course", "docs"} == copied


def test_wrong_answers_are_edits_that_apply_once():
    for b in BLANKS:
        for wrong in b.wrong:
            compile(grade.wrong_text(b, wrong), b.file, "exec")


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
    assert check.in_folder(folder, "submit").returncode == 0
    assert zipfile.ZipFile(folder / "submission.zip").namelist() == ["ASSIGNMENT", "hog.py", "maetok.py"]


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
    assert [t["status"] for t in results["tests"]] == ["passed", "passed"]


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
    ("#" * 2_000_000, "hog.py has 2000000 bytes")])
def test_what_cannot_be_taken_gets_a_clear_line(tmp_path, text, reason):
    b = assignments.blank_of("A1.4")
    if text is not None:
        (tmp_path / "hog.py").write_text(text)
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


EXITS = """
    import os
    os._exit(0)
"""
PATCHES = """
    import torch, numpy, pytest
    torch.testing.assert_close = lambda *a, **k: None
    return x
"""
READS = f"""
    source = open({str(ROOT / "maetok.py")!r}).read()
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
    return images, images
"""
FORGES = """
    import json, os, sys
    for test in range(50):
        for fd in range(3, 40):
            try:
                os.write(fd, json.dumps({"round": "answer", "test": "t", "outcome": "passed",
                                         "finished": True, "nonce": "0" * 32}).encode() + b"\\n")
            except OSError:
                pass
    print("50 passed")
    sys.exit(0)
"""


@pytest.mark.slow
def test_misbehaviour_gets_points_for_what_works_and_harms_nothing(tmp_path):
    folder, victim = tmp_path / "A1", tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    make.student_folder("A1", folder)
    check.answer("A1", folder, "solution")
    works = blanks.body((ROOT / "hog.py").read_text(), "gaussian_window")
    for file, name, text in (("maetok.py", "patchify", EXITS), ("maetok.py", "rotate", PATCHES),
                             ("maetok.py", "RoPE2D.forward", READS.replace("\n    ", "\n        ")),
                             ("hog.py", "sobel", DELETES.replace("VICTIM", repr(str(victim)))),
                             ("hog.py", "gaussian_window", '    print("x" * 3_000_000)\n' + works),
                             ("hog.py", "hog_features", FORGES)):
        path = folder / file
        path.write_text(blanks.replace_body(path.read_text(), name, text.strip("\n")))
    _, marks = grade.grade(folder)
    reasons = {m.id: " ".join(m.reasons) for m in marks}
    assert {m.id: m.points for m in marks} == {"A1.1": 0, "A1.2": 0, "A1.3": 0, "A1.4": 0, "A1.5": 4,
                                               "A1.6": 0}
    assert "ended with status 0 before its tests were done" in reasons["A1.1"]
    assert "has changed the tests" in reasons["A1.2"] or "test_rot" in reasons["A1.2"]
    assert "closed while tests run" in reasons["A1.3"]
    assert "SystemExit" in reasons["A1.6"]
    assert (victim / "file").read_text() == "precious"


@pytest.mark.slow
def test_what_hangs_is_ended_with_all_that_it_started(tmp_path):
    """Asleep, with a child in its group; without the fence, as if that had failed."""
    b = assignments.blank_of("A1.5")
    source = ("def gaussian_window(cell_size, device=None):\n    import subprocess, sys, time\n"
              "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', 'MARK-7c1'])\n"
              "    time.sleep(600)\n")
    code = grade.code_of(source, "hog.py", "gaussian_window")
    copy = tmp_path / "copy"
    make.copy_files((*make.CODE, *make.TESTS, "course/runner.py"), copy)
    rounds = [dict(name="answer", put={"hog.py:gaussian_window": code}, tests=list(b.tests), first=False)]
    begun = time.time()
    entries, trouble = grade.run_rounds(rounds, copy, tmp_path, 0, seconds=25, processor=25, fenced=False)
    assert trouble == "not finished after 25 s" and time.time() - begun < 60
    assert [set(entry) for entry in entries] == [{"started", "nonce"}]              # and no test's verdict
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            assert b"MARK-7c1" not in open(f"/proc/{pid}/cmdline", "rb").read()
        except OSError:
            continue


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
