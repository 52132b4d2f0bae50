"""One line where a package is missing, with the command that installs it. Imports only Python's own."""
import importlib.util
import sys
from pathlib import Path

PACKAGES = ("torch", "numpy", "PIL", "tqdm", "scipy")          # requirements.txt, by the names in imports
HOME = Path(__file__).resolve().parents[1]


def missing():
    """The names of packages that this Python lacks."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def end_script():
    """End a script of this repository with one line. Elsewhere, in a notebook say, imports fail as ever."""
    started = Path(getattr(sys.modules["__main__"], "__file__", None) or "none").resolve()
    if HOME in started.parents:
        print(f"error: this Python lacks {', '.join(missing())}: run `{sys.executable} -m pip install -r "
              f"{HOME / 'requirements.txt'}` first", file=sys.stderr)
        sys.exit(2)
