"""Run course/walkthrough.py cell by cell and write course/walkthrough.ipynb with what
the cells print and show.

    python course/notebook.py               # writes the notebook
    python course/notebook.py --out FILE

Cells begin with `# %%` (code) or `# %% [markdown]` (text, as comments). As in a notebook, a cell shows what
it prints and the value of its last line, here always a PIL image. The notebook is plain JSON (format 4.5), so
no package for notebooks is needed.
"""
import argparse
import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # called as a script, from anywhere

import common  # noqa: E402
from runtime import files, processes  # noqa: E402


def cells_of(script):
    """[(is it text, its source)] of a script's text."""
    parts = re.split(r"^# %%( \[markdown\])?\n", script, flags=re.M)
    cells = []
    for kind, source in zip(parts[1::2], parts[2::2]):
        source = source.strip("\n")
        cells.append((bool(kind), re.sub(r"^# ?", "", source, flags=re.M) if kind else source))
    return cells


def run_cell(source, names):
    """Run a cell in the namespace `names`. Returns its outputs as the format has them."""
    tree, printed = ast.parse(source), io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        png = io.BytesIO()
        value.save(png, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(png.getvalue()).decode() + "\n",
                "text/plain": [f"a picture of {value.width} x {value.height} px"]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    return outputs


def lines(text):
    """Text as a notebook stores it: a list of lines with their ends."""
    return text.splitlines(keepends=True)


def notebook(script):
    """The notebook of a script's text, executed, as a dict."""
    names, cells, count = {"__name__": "__main__"}, [], 0
    for number, (text, source) in enumerate(cells_of(script)):
        cell = {"cell_type": "markdown" if text else "code", "id": f"cell-{number:02}", "metadata": {},
                "source": lines(source)}
        if not text:
            count += 1
            cell |= {"execution_count": count, "outputs": run_cell(source, names)}
        cells.append(cell)
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 5,
            "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}}


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "course/walkthrough.ipynb")
    args = parser.parse_args(argv)
    content = notebook((ROOT / "course/walkthrough.py").read_text())
    files.atomic_write(args.out, lambda path: path.write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n"))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    processes.run(main)
