"""docs/reading.md: its code is the source's, its links lead somewhere, every idea of the paper is there, and
the HTML page of it needs nothing from outside.

`python docs/reading.py` cuts the code again."""
import base64
import importlib.util
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT
from course import make
from test_page import CHROMIUM, Page

spec = importlib.util.spec_from_file_location("reading", ROOT / "docs/reading.py")
reading = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reading)

TEXT = reading.PAGE.read_text(encoding="utf-8")
# The ideas that have a section, in the paper's order.
IDEAS = ["Patches", "Mask", "Eq. 4: encoder", "2D RoPE", "Eq. 5: decoder", "Eq. 7: auxiliary decoders", "HOG",
         "Eq. 8: loss on hidden patches", "Eq. 6 and the adaptive weight", "Stage 2 and its mask ratio",
         "Latent normalisation", "State and velocity", "SiT block", "Euler–Maruyama",
         "Guidance and its interval", "Fréchet distance", "Mixture likelihood", "Precision and recall",
         "Linear probe", "Theorem 2.1"]
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))


def anchors(page):
    return {reading.slug(heading) for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.M)}


# ------------------------------------------------- the page -------------------------------------------------

def test_every_block_of_code_is_the_source_as_it_is():
    found = reading.with_excerpts(TEXT)
    assert len(reading.BLOCK.findall(TEXT)) == TEXT.count("```python") > 40
    assert found == TEXT, "run python docs/reading.py"


@pytest.mark.parametrize("idea", IDEAS)
def test_every_idea_has_its_equation_code_test_and_exercise(idea):
    section = SECTIONS[idea]
    assert section.count("$$") >= 2 and "<!-- code: " in section
    assert "**Test" in section and re.search(r"\*\*Exercises?\*\*.*\(\.\./course/A\d\.md#", section, re.S)
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert blocks and all(block.count("\n") <= 12 for block in blocks)
    assert sum(block.count("\n") for block in blocks) <= 16


def test_the_ideas_are_in_the_papers_order_after_the_symbols():
    assert list(SECTIONS) == ["Symbols", "Where to find what", *IDEAS]


def test_every_test_and_exercise_that_is_named_exists():
    tests = re.findall(r"\[(test_\w+)\.py::(test_\w+)\]\(\.\./tests/(\w+)\.py\)", TEXT)
    assert len(tests) > 30 and TEXT.count("../tests/") == len(tests)
    for file, name, target in tests:
        assert file == target and f"\ndef {name}(" in (ROOT / f"tests/{file}.py").read_text(), name
    for label, target in re.findall(r"\[(A\d\.\d+)\]\(\.\.(/course/A\d\.md)#", TEXT):
        assert f"\n### {label} " in Path(f"{ROOT}{target}").read_text(), label


def test_every_link_and_anchor_leads_somewhere():
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", TEXT):
        path = (reading.PAGE.parent / target) if target else reading.PAGE
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{target}#{anchor}"


def test_the_prose_is_short():
    """Without code, equations, tables and addresses."""
    parts = (r"^```.*?^```", r"\$\$.*?\$\$", r"\$[^$]*\$", "<!--.*?-->", r"^\|[^\n]*$", r"\]\([^)]*\)")
    prose = re.sub("|".join(parts), "", TEXT, flags=re.M | re.S)
    assert 1000 < len(prose.split()) <= 2300


def test_students_do_not_get_the_page_that_shows_their_blanks(tmp_path):
    make.student_folder("A2", tmp_path / "A2")
    assert (tmp_path / "A2/docs/equations.md").exists() and not list(tmp_path.rglob("reading.*"))


# ------------------------------------------------ excerpts ------------------------------------------------

def test_an_excerpt_that_is_gone_is_one_line():
    page = "<!-- code: maetok.py patchify: x = images ... return x -->\n"
    assert "x.permute(0, 2, 4, 3, 5, 1)" in reading.with_excerpts(page)
    for old, new, message in (("maetok.py", "no.py", "no such file"), ("patchify", "cut", "no such function"),
                              ("x = images", "y = images", "no line contains `y = images`"),
                              ("return x", "return y", "no line contains `return y` after those before it"),
                              ("patchify: x = images ... return x", "Encoder: def ... return self",
                               "more than")):
        with pytest.raises(reading.Gone, match=re.escape(message)) as gone:
            reading.with_excerpts(page.replace(old, new))
        assert "\n" not in str(gone.value)


def test_ranges_are_cut_by_content_and_joined(monkeypatch, tmp_path):
    (tmp_path / "m.py").write_text("class A:\n    def f(self):\n        a = 1\n        b = 2\n        if a:\n"
                                   "            c = 3\n        return b\n\n    def g(self):\n        a = 5\n")
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    assert reading.excerpt("m.py", "A.f", "a = 1") == (2, "a = 1")
    assert reading.excerpt("m.py", "A.f", "a = ... b = | c =") == (2, "a = 1\nb = 2\nc = 3")
    assert reading.excerpt("m.py", "A.g", "a =") == (9, "a = 5")


# ------------------------------------------------- figures -------------------------------------------------

def test_vector_figures_are_what_the_script_draws():
    for name, draw in reading.VECTORS.items():
        assert (reading.FIGURES / name).read_text() == draw(), "run python docs/reading.py --figures"


def test_figures_are_small_and_all_on_the_page():
    named = set(re.findall(r"\]\(figures/([\w.]+)\)", TEXT))
    assert named == {path.name for path in reading.FIGURES.iterdir()}
    assert all((reading.FIGURES / name).stat().st_size < 150_000 for name in named)


def test_the_mask_ratio_that_is_drawn_is_the_trainers():
    from train_tokenizer import SCALES, Config
    rows = reading.mask_ratios(Config(**SCALES["maetok-b-256"]))
    assert rows[0] == (0, 0.4, 0.6) and rows[-1] == (549_999, 0.0, 0.0)
    assert (500_000, 0.6, 0.6) in rows and all(low <= high for _, low, high in rows)


# -------------------------------------------------- HTML --------------------------------------------------

@pytest.fixture(scope="module")
def html(tmp_path_factory):
    out = tmp_path_factory.mktemp("html") / "runs/reading.html"
    reading.main(["--html", str(out)])
    return out


def test_the_html_page_holds_all_it_shows(html):
    text = html.read_text(encoding="utf-8")
    page = Page(re.sub(r"<(math|svg).*?</\1>", "", text, flags=re.S))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in re.sub(r'base64,[^"]*', "", text) and html.stat().st_size <= 3_000_000
    images = re.findall(r'src="data:image/([\w+]+);base64,([^"]+)"', text)
    assert len(images) == page.tags.count("img") == TEXT.count("![")
    for kind, data in images:
        data = base64.b64decode(data)
        assert data.startswith(b"<svg" if kind == "svg+xml" else b"\x89PNG")
    for address in page.addresses:                   # files of the repository, places on the page
        if not address.startswith("data:"):
            path, _, anchor = address.partition("#")
            assert f'id="{unquote(anchor)}"' in text if not path else (html.parent / path).exists(), address


def test_every_equation_became_mathml(html):
    text = html.read_text(encoding="utf-8")
    source = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
    display = re.findall(r"\$\$.*?\$\$", source, re.S)
    inline = re.findall(r"\$[^$\n]+\$", re.sub(r"\$\$.*?\$\$", "", source, flags=re.S))
    assert text.count('class="math block"') == len(display) >= len(IDEAS)
    assert text.count('<math display="block"') == sum(1 + e.count(r"\qquad") for e in display)
    assert text.count('<math display="inline"') == len(inline) > 20
    # In Markdown such a line would begin a list, a heading or a quotation.
    assert not re.search(r"^\s*[-+*#>=]", "".join(display), re.M)
    body = re.sub(r"<(math|pre|style).*?</\1>|<code>.*?</code>", "", text, flags=re.S)
    assert "$" not in body and "<!--" not in body
    assert "\\" not in "".join(re.findall(r"<math.*?</math>", text, re.S)), "a command that is unknown"


def test_code_is_coloured_in_light_and_dark(html):
    text = html.read_text(encoding="utf-8")
    assert text.count('<pre class="code">') == TEXT.count("```") // 2
    assert '<span class="k">return</span>' in text and text.count("prefers-color-scheme") >= 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_without_sideways_scrolling(html, tmp_path, width):
    # A script of the test's own, in a copy, in a frame of the width: a window has a smallest one.
    report = "<script>parent.postMessage([document.documentElement.scrollWidth, innerWidth], '*')</script>"
    (tmp_path / "page.html").write_text(html.read_text(encoding="utf-8") + report, encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        "<script>onmessage = e => document.title = 'widths ' + e.data.join(' ')</script>"
        f"<iframe width={width} height=800 style='border:0' src=page.html></iframe>")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900",
                           f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000", "--dump-dom",
                           (tmp_path / "frame.html").as_uri()],
                          check=True, timeout=100, capture_output=True, text=True)
    scroll, inner = map(int, re.search(r"<title>widths (\d+) (\d+)", done.stdout).groups())
    assert inner == width and scroll <= width
