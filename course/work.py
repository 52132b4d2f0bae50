"""The commands of this folder, without make. Where there is make, `make TARGET` does the same.

    python work.py install    # the packages, into .venv or the folder that the variable VENV names
    python work.py test       # all tests that you may see
    python work.py A1.1       # one blank's, by its number
    python work.py submit     # writes submission.zip

Packages are looked for in the Python that runs this, then in VENV.
"""
import ast
import glob
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

VENV = Path(os.environ.get("VENV", ".venv"))
VERSIONS = "import platform, importlib.metadata as m; print(platform.python_version(), m.version('torch'))"
TAKEN = """Of each file the grader takes the bodies of the blanks, and what they use of what you added at its
top level: functions, classes, constants, imports. Not methods, changes of what was there, other files."""


def python():
    """A Python that has the packages. None: there is none yet."""
    if all(map(importlib.util.find_spec, ("torch", "pytest"))):
        return sys.executable
    return next((str(path) for path in (VENV / "bin/python", VENV / "Scripts/python.exe") if path.exists()),
                None)


def install():
    """Make the environment; again, when requirements change."""
    if sys.version_info < (3, 10):
        sys.exit(f"Python 3.10 or newer is needed, and this is {platform.python_version()}")
    subprocess.check_call([sys.executable, "-m", "venv", str(VENV)])
    own = next(path for path in (VENV / "bin/python", VENV / "Scripts/python.exe") if path.exists())
    pip = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if sys.platform == "linux" and not shutil.which("nvidia-smi"):
        # The package index's torch for Linux brings gigabytes of CUDA: first try the build for the CPU.
        torch = next(word for word in Path("requirements.txt").read_text().split()
                     if word.startswith("torch=="))
        subprocess.call([*pip, "--retries", "0", "--timeout", "15",
                         "--index-url", "https://download.pytorch.org/whl/cpu", torch])
    subprocess.check_call([*pip, "-r", "requirements-dev.txt"])
    (VENV / "ready").touch()


def test(ids, blanks):
    """Run the tests of these blanks; where an assignment has none, a look at the small parts."""
    if python() is None:
        sys.exit("the packages are not there yet: python work.py install")
    tests = dict.fromkeys(test for id in ids for test in blanks[id]["tests"])
    return subprocess.call([python(), "-m", "pytest", "-q", *(tests or ["tests/test_maetok.py"])])


def submit(blanks, patterns):
    """Write submission.zip, and say what is in it."""
    versions = f"{platform.python_version()} none"
    if python():
        versions = subprocess.check_output([python(), "-c", VERSIONS], text=True)
    with zipfile.ZipFile("submission.zip", "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as file:
        file.writestr("ENVIRONMENT", "Python {}, torch {}\n".format(*versions.split()))
        for pattern in patterns:
            found = sorted(glob.glob(pattern, recursive=True))
            for name in found:
                file.write(name)
            if not found:
                print(f"{pattern} is missing")
        print("wrote submission.zip:", *file.namelist())
    for id, blank in blanks.items():
        path = Path(blank["file"])
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else blank["message"]
        state = "still empty" if blank["message"] in text else "written"
        try:
            ast.parse(text.removeprefix("\ufeff"))
        except SyntaxError as e:
            state = f"{path} does not parse, line {e.lineno}: 0 points for its blanks"
        print(f"{id} {blank['name']}: {state}")
    if blanks:
        print(TAKEN)


def main(target):
    os.chdir(Path(__file__).resolve().parent)
    known = json.loads(Path("blanks.json").read_text())
    blanks = known["blanks"]
    if target == "install":
        return install()
    if target == "submit":
        return submit(blanks, known["submit"])
    if target == "test" or target in blanks:
        return test(blanks if target == "test" else [target], blanks)
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) == 2 else ""))
