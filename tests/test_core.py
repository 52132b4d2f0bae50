"""The core is the paper: it works when every extra is deleted, and it stays small."""
import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import train_diffusion
import train_tokenizer

EXTRAS = ("after", "variants", "study", "course")
CORE = sorted(ROOT.glob("*.py"))
SCRIPTS = {"train_tokenizer", "train_diffusion", "sample", "evaluate"}
CARD = "maetok sit hog train_tokenizer train_diffusion sample evaluate".split()


def imports(path):
    """The first names of all that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_a_core_file_imports_no_extra(path):
    assert not set(imports(path)) & set(EXTRAS)


@pytest.mark.parametrize("path", sorted(path for folder in ("frozen", "measures", "pictures", "runtime")
                                        for path in (ROOT / folder).glob("*.py")), ids=lambda path: path.name)
def test_what_the_core_imports_knows_neither_extras_nor_scripts(path):
    assert not set(imports(path)) & {*EXTRAS, *SCRIPTS}


@pytest.mark.parametrize("name", "maetok sit flow hog".split())
def test_the_models_import_neither_frozen_networks_nor_scripts(name):
    assert not set(imports(ROOT / f"{name}.py")) & {"frozen", "pictures", "losses", "measures", *SCRIPTS}


def test_no_script_imports_another():
    for path in CORE:
        assert not set(imports(path)) & SCRIPTS, path.name


# Import each module in a process of its own, which knows other people's modules already: their import takes
# seconds.
EACH_FIRST = """
import os, sys, numpy, PIL.Image, scipy.linalg, torch, torch.distributed.nn.functional, tqdm
failed = 0
for name in sys.argv[1:]:
    if os.fork() == 0:
        __import__(name)
        os._exit(0)
    failed |= os.wait()[1]
sys.exit(failed != 0)
"""


def test_imports_have_no_circle():
    """Every core module can be the first that is imported."""
    done = subprocess.run([sys.executable, "-c", EACH_FIRST, *(path.stem for path in CORE)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sizes():
    lines = {path.stem: len(path.read_text().splitlines()) for path in CORE}
    assert sum(lines[name] for name in CARD) <= 2400
    assert sum(lines.values()) <= 4500
    assert max(lines.values()) <= 470, max(lines, key=lines.get)


def test_no_function_is_longer_than_70_lines():
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 70, f"{path.name}: {node.name}"


@pytest.mark.parametrize("method, most", [(train_tokenizer.Method, 50), (train_diffusion.Method, 35)])
def test_few_options_and_help_shows_them_all(method, most, capsys):
    script = train_tokenizer if method is train_tokenizer.Method else train_diffusion
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    options = {word.strip(",") for line in text.splitlines() if line.startswith("  --")
               for word in line.split()[:1]}
    assert 20 < len(options) <= most
    assert "--help-all" not in text


IN_TURN = """
import importlib, json, sys
for script, *argv in map(json.loads, sys.argv[1:]):
    importlib.import_module(script).main([str(a) for a in argv])
"""


def copy_core(folder):
    """The repository without its extras, as someone has it who deleted them."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".git", ".venv", "runs", "data", "__pycache__", ".pytest_cache", ".ruff_cache"))
    for name in EXTRAS:
        shutil.rmtree(folder / name)


@pytest.mark.slow
def test_without_the_extras_everything_of_the_paper_runs(tmp_path):
    home = tmp_path / "core"
    copy_core(home)

    def run(*command, status=0):
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    run("-c", EACH_FIRST, *(path.stem for path in home.glob("*.py")))
    classifier = ["--features", "classifier", "--classifier-steps", 3, "--reference-images", 40]
    # In one interpreter: the import takes most of their time.
    run("-c", IN_TURN, *map(json.dumps, (
        ["train_tokenizer", "--steps", 3, "--stage2-steps", 3, "--batch-size", 8, "--disc", "patch",
         "--disc-start", 1, "--out", "runs/t"],
        ["train_diffusion", "--tokenizer", "runs/t", "--steps", 3, "--batch-size", 8, "--cache-images", 40,
         "--width", 32, "--depth", 2, "--heads", 2, "--out", "runs/d"],
        ["sample", "--ckpt", "runs/d", "--steps", 3, "--num", 20, "--cfg", 2,
         "--out", "runs/s.png", "runs/s.npz"],
        ["sample", "--out", "runs/default.png", "--steps", 2, "--num", 10],
        ["evaluate", "recon", "runs/t", "--features", "none", "--num-images", 20],
        ["evaluate", "generation", "runs/s.npz", "--data", "shapes", *classifier, "--test-images", 20],
        ["evaluate", "latents", "runs/t", "--train-images", 60, "--test-images", 20, "--components", 1, 2,
         "--no-umap", "--out", "runs/l"],
        ["evaluate", "curve", "runs/d", *classifier, "--num-images", 20, "--steps", 2])))
    # What is gone says so, in one line.
    assert "muon" in run("train_tokenizer.py", "--add", "muon", status=2)
    assert "speed" in run("evaluate.py", "speed", status=2)
    # The core's tests need none of the extras either.
    listed = run("-m", "pytest", "--collect-only", "-q", "tests")
    assert int(re.search(r"(\d+) tests collected", listed)[1]) > 300


def test_tests_of_the_core_import_no_extra_anywhere():
    """conftest.py leaves out the files that import extras at their top. The others import none further in."""
    kept = [path for path in (ROOT / "tests").glob("*.py") if not re.search(
        rf"^(from|import) ({'|'.join(EXTRAS)})\b", path.read_text(), re.M)]
    assert len(kept) > 20
    for path in kept:
        assert not set(imports(path)) & set(EXTRAS), path.name
