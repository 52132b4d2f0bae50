"""Every link, file and symbol that README and docs name is there, at the line they say; every command is
understood; every equation that the code is tagged with is in docs/reading.md; the study's tables are what
its JSON says; CONTRIBUTING.md's examples work.

`python -m tests.test_docs` rewrites line numbers and tables.
"""
import ast
import json
import re
import shlex
import types
from pathlib import Path

import pytest

import checkpoints
import common
import evaluate
import losses
import sample
import train_diffusion
import train_tokenizer
from study import report

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "study/README.md",
         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "course").glob("*.md"))]
FOLDERS = ("after", "frozen", "measures", "pictures", "runtime", "study", "variants")
CODE = re.compile(r"^```bash\n(.*?)^```|`((?:python|torchrun) [^`]+)`", re.M | re.S)     # blocks; inline
SCRIPT = re.compile(r"\b(train_tokenizer|train_diffusion|sample|evaluate)\.py\b(.*)")
SYMBOL = re.compile(r"\[`?([A-Za-z_]\w*(?:\.\w+)+)`?\]\(((?:\.\./)?[\w/]+\.py)#L(\d+)\)")
TABLE = re.compile(r"^\| row .*\n(?:\|.*\n)+", re.M)
SCORE = re.compile(r"^(\| `([a-z_]+)` \| [^|]* \| ).*$", re.M)              # of latents, in docs/study.md
EQUAL_PSNR = re.compile(r"^\| measure ↓ (\|.*)\n(?:\|.*\n)+", re.M)           # in docs/study.md
LATER = re.compile(r"^\| after .*\n(?:\|.*\n)+", re.M)  # in docs/study.md, too
STUDY = {"README.md": ["sharp"]}                 # settings of the tables of these


def measured_rows(setting):
    """{row: {seed: numbers}} of a setting's committed JSON."""
    return json.loads((ROOT / f"study/results/study-{setting}.json").read_text())["rows"]


def with_measured_tables(text, settings):
    """The page with what the committed JSON says in its tables; table n shows settings[n]. Rows and columns
    (of report.SUMMARY) are the page's choice; both may name the paper's table in brackets."""
    tables = TABLE.findall(text)
    assert len(tables) == len(settings), f"{len(tables)} tables of the study where {len(settings)} belong"
    for table, setting in zip(tables, settings):
        rows = measured_rows(setting)
        head, rule, *lines = table.splitlines()
        plain = lambda cell: re.sub(r"\*\*| \[.*\]", "", cell).strip()
        columns = {title: report.SUMMARY[title] for title in map(plain, head.split("|")[2:-1])}
        assert rule == "|---" * (len(columns) + 1) + "|"
        fresh = [f"|{name}| {report.cells(rows[plain(name)], columns)} |"
                 for name in (line.split("|")[1] for line in lines)]
        text = text.replace(table, "\n".join([head, rule, *fresh, ""]))
    return text


def with_equal_psnr(text):
    """The page with what the committed JSON says of the rows it names beside the AE of their PSNR."""
    table, rows = EQUAL_PSNR.search(text), measured_rows("sharp")
    names = [name.strip() for name in table[1].strip("|").split("|")]
    fresh = report.at_equal_psnr({name: rows[name] for name in (*names, *report.AES)})
    return text.replace(table[0], "\n".join(fresh.splitlines()[:6]).replace(" -", " −") + "\n")


def with_later_table(text):
    """The page with what the committed JSON says of SiT's last checkpoint and, in brackets, its first."""
    table, rows = LATER.search(text)[0], measured_rows("long")
    head, rule, *lines = table.splitlines()
    names = [name.strip() for name in head.split("|")[3:-1]]
    for n, line in enumerate(lines):
        title, expected = line.split("|")[1:3]
        key, column, _, factor = report.CURVES[title.strip()]
        digits = 0 if "%" in title else 1
        ends = [[factor * rows[name]["0"][key][point][column] for point in (-1, 0)] for name in names]
        cells = [f"{last:.{digits}f} ({first:.{digits}f})" for last, first in ends]
        lines[n] = f"|{title}|{expected}| " + " | ".join(cells) + " |"
    return text.replace(table, "\n".join([head, rule, *lines, ""]))


def with_correlations(text):
    """The page with what the committed JSON says of latents' scores: | `score` | expected | outcomes |."""
    found = json.loads((ROOT / "study/results/diffusability.json").read_text())["correlations"]
    value = {(row["score"], row["outcome"]): f"{round(row['correlation'], 2) + 0:.2f}".replace("-", "−")
             for row in found}
    outcomes = list(dict.fromkeys(row["outcome"] for row in found))
    assert f" | {' | '.join(outcomes)} |\n" in text
    return SCORE.sub(lambda line: line[1] + " | ".join(value[line[2], key] for key in outcomes) + " |", text)


def definitions(path):
    """{"Class.method": line} of a Python file; top-level names that are assigned count too."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[prefix + node.targets[0].id] = node.lineno

    visit(ast.parse(path.read_text()).body, "")
    return found


def right_line(page, match):
    """Where the symbol of a link is defined. AssertionError if nowhere."""
    symbol, target, _ = match.groups()
    module, name = symbol.split(".", 1)
    path = (page.parent / target).resolve()
    assert path.exists() and path.stem == module, f"{page.name}: {symbol} in {target}"
    lines = definitions(path)
    assert name in lines, f"{page.name}: {target} defines no {name}"
    return lines[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for match in SYMBOL.finditer(text):
        assert int(match[3]) == right_line(page, match), f"{match[0]}: run python -m tests.test_docs"


def test_no_script_or_module_imports_a_script():
    """Except three of study/, which measure the training step, and course/hidden/, which is tests."""
    scripts = {"train_tokenizer", "train_diffusion", "sample", "evaluate"}
    for path in [*ROOT.glob("*.py"), *(file for folder in (*FOLDERS, "course")
                                       for file in (ROOT / folder).glob("*.py")
                                       if file.name not in ("speed.py", "rehearse.py", "memory.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = ([node.module] if isinstance(node, ast.ImportFrom) else
                        [name.name for name in node.names] if isinstance(node, ast.Import) else [])
            assert not scripts & set(imported), f"{path.name}, line {node.lineno}"


# A handout may name files that students write.
@pytest.mark.parametrize("page", [p for p in PAGES if p.parent != ROOT / "course"],
                         ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    known = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts} | {"NAME.py"}
    for name in re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", page.read_text()):
        assert name in known, name


def test_every_equation_of_the_code_is_in_the_table():
    there = set()
    for cell in re.findall(r"^\| Eq\. ([^|]+) \|", (ROOT / "docs/reading.md").read_text(), re.M):
        for low, high in re.findall(r"(\d+)(?:–(\d+))?", cell):
            there |= set(range(int(low), int(high or low) + 1))
    assert there == set(range(1, 24))
    for path in [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))]:
        for tag in re.findall(r"\[[^\]]*\bEq\. ?([\d, -]+)", path.read_text()):
            for number in re.findall(r"\d+", tag):
                assert int(number) in there, f"{path.name}: Eq. {number}"


def test_every_table_and_figure_of_the_paper_is_in_the_table():
    page = (ROOT / "docs/equations.md").read_text()
    for title, last in (("Tables", 13), ("Figures", 22)):
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        there = set()
        for row in re.findall(r"^\| ([\d][^|]*)\|", section, re.M):
            for low, high in re.findall(r"(\d+)[a-d]?(?:–(\d+))?", row):
                there |= set(range(int(low), int(high or low) + 1))
        assert there == set(range(1, last + 1)), title


@pytest.mark.parametrize("page", STUDY)
def test_the_studys_tables_are_what_was_measured(page):
    text = (ROOT / page).read_text()
    assert text == with_measured_tables(text, STUDY[page]), "run python -m tests.test_docs"


@pytest.mark.parametrize("table", (with_equal_psnr, with_later_table, with_correlations))
def test_the_tables_of_docs_study_are_what_was_measured(table):
    text = (ROOT / "docs/study.md").read_text()
    assert len(SCORE.findall(text)) == 8
    assert text == table(text), "run python -m tests.test_docs"


def test_the_studys_full_table_has_every_row():
    """README shows five rows; docs/study.md links to this page for the others."""
    assert "study/results/study-sharp.md" in (ROOT / "docs/study.md").read_text()
    table = TABLE.search((ROOT / "study/results/study-sharp.md").read_text())[0]
    names = {re.sub(r" \[.*", "", line.split("|")[1]).strip() for line in table.splitlines()[2:]}
    assert names == set(measured_rows("sharp"))


# ------------------------------------------------ commands ------------------------------------------------

def commands(page):
    """(script, its arguments) of every command on a page that is written out: in blocks and inline."""
    for block, inline in CODE.findall(page.read_text()):
        for line in re.split(r"\n|&&", re.sub(r"\s*\\\n\s*", " ", block or inline.replace("\n", " "))):
            if found := SCRIPT.search(line):
                argv = shlex.split(found[2].replace("$row", "ae"), comments=bool(block))
                yield found[1], [re.sub(r"\$\w+", "1", word) for word in argv if word != "..."]


def parse(script, argv):
    """Read a command line as the script does. UserError where it refuses."""
    if script in ("sample", "evaluate"):
        return {"sample": sample, "evaluate": evaluate}[script].parse(argv)
    module = {"train_tokenizer": train_tokenizer, "train_diffusion": train_diffusion}[script]
    method = common.attach_named(module.Method, argv)
    return common.parse_config(method.Config, method.PRESETS, list(getattr(module, "SCALES", method.PRESETS)),
                               "", argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_understood(page):
    for script, argv in commands(page):
        if "no_positions" in argv:                                       # an extra that a student writes
            continue
        try:
            parse(script, argv)
        except common.UserError as e:
            raise AssertionError(f"{page.name}: {script}.py {shlex.join(argv)}: {e}") from e


def test_commands_are_found_and_wrong_ones_refused():
    assert sum(len(list(commands(page))) for page in PAGES) > 80
    for script in ("train_tokenizer", "train_diffusion", "sample", "evaluate"):
        with pytest.raises(common.UserError):
            parse(script, ["--no-such-option"])


# --------------------------------------------- CONTRIBUTING.md ---------------------------------------------

TINY = """--stage 1 --steps 3 --batch-size 4 --log-every 1 --width 16 --heads 2 --encoder-depth 1
    --decoder-depth 1 --num-latents 4 --lr 1e-3""".split()


def contributed(number):
    """The Python block of that number in CONTRIBUTING.md."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    return blocks[number]


def test_the_target_in_contributing_works_as_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "TARGETS", dict(losses.TARGETS))                # both are undone afterwards
    monkeypatch.setattr(losses, "ColourTarget", None, raising=False)
    exec(contributed(0), vars(losses))
    train_tokenizer.main([*TINY, "--targets", "hog,colour", "--out", str(tmp_path)])
    *steps, end = checkpoints.read_metrics(tmp_path)
    assert len(steps) == 3 and all(0 < record["colour"] < 4 for record in steps)     # in [-1, 1]
    assert end["colour_loss"] > 0 and end["colour_constant"] > 0


def test_the_extra_in_contributing_works_as_printed(tmp_path, monkeypatch):
    module, find = types.ModuleType("constant_rate"), common.find_extra
    exec(contributed(1), vars(module))
    monkeypatch.setattr(common, "find_extra", lambda name: module if name == "constant_rate" else find(name))
    rates = {}
    for added in ("", "constant_rate"):
        train_tokenizer.main([*TINY, "--add", added, "--out", str(tmp_path / f"run{added}")])
        rates[added] = [r["lr"] for r in checkpoints.read_metrics(tmp_path / f"run{added}") if "lr" in r]
    assert rates["constant_rate"] == [1e-3] * 3 and rates[""] != rates["constant_rate"]


def test_the_readme_is_one_page_and_all_prose_shorter_than_the_paper():
    """Words of text and tables, without code, formulas and addresses. Handouts and generated results, which
    few read and nobody reads all of, do not count."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    left_out = (r"^```.*?^```", r"\$\$.*?\$\$", r"\$[^$\n]*\$", "<!--.*?-->", r"\]\([^)]*\)", r"^\|[-|:]+$",
                r"\|")
    pages = [page for page in PAGES if not re.fullmatch(r"A\d", page.stem)]
    text = "\n".join(page.read_text() for page in pages)
    words = re.sub("|".join(left_out), "", text, flags=re.M | re.S).split()
    assert 5000 < len(words) < 10_323                  # words of arXiv:2502.03444v2 as pdftotext gives them


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(SYMBOL.sub(
            lambda match: match[0].replace(f"#L{match[3]}", f"#L{right_line(page, match)}"),
            page.read_text()))
    for page, settings in STUDY.items():
        path = ROOT / page
        path.write_text(with_measured_tables(path.read_text(), settings))
    path = ROOT / "docs/study.md"
    for table in (with_equal_psnr, with_later_table, with_correlations):
        path.write_text(table(path.read_text()))
