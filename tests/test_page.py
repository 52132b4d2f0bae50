"""pictures/: one page without a server or a network, from what a folder holds; axes of charts."""
import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import evaluate
import sample
import train_tokenizer
from measures.features import Report, distance_name
from pictures import draw
from pictures.draw import line_chart
from pictures.page import MEANINGS, SECTIONS, write_report
from test_box import tiny_sit
from test_train_tokenizer import TINY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Tags, addresses and text of a page. AssertionError for tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open = [], [], []
        self.feed(text)
        assert self.open in ([], ["html"]), self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder as `make demo` leaves it, after ten steps of training."""
    folder = tmp_path_factory.mktemp("demo")
    train_tokenizer.main([*TINY, "--out", str(folder / "tokenizer")])
    tiny_sit(folder / "tokenizer", folder / "diffusion")
    evaluate.main(["latents", str(folder / "tokenizer"), "--names", "A <b> & c", "--train-images", "60",
                   "--test-images", "30", "--components", "1", "2", "--dims", "3", "--starts", "1",
                   "--no-full", "--pixels", "--out", str(folder / "latents"), "--device", "cpu"])
    evaluate.main(["recon", str(folder / "tokenizer"), "--num-images", "10", "--features", "none", "--out",
                   str(folder / "recon"), "--device", "cpu"])
    (folder / "other.json").write_text('{"psnr": 77.77}')                                     # of no command
    (folder / "list.json").write_text("[1, 2")
    sample.main(["--ckpt", str(folder / "diffusion"), "--steps", "3", "--cfg", "2", "--device", "cpu",
                 "--report", str(folder / "report.png")])
    return folder


@pytest.mark.slow
def test_the_page_holds_all_it_shows_and_asks_for_nothing(demo):
    text = (demo / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    # The sheet, two training runs, the reconstructions, classes and mixtures.
    assert len(page.addresses) == page.tags.count("img") == 6
    for address in page.addresses:
        kind, content = address.split(",", 1)
        assert kind == "data:image/png;base64" and base64.b64decode(content)[:8] == b"\x89PNG\r\n\x1a\n"
    assert text.count("What should I see?") == 5 and "http" not in text


@pytest.mark.slow
def test_each_number_of_a_result_has_its_meaning_beside_it(demo):
    text = (demo / "report.html").read_text()
    rows = dict(re.findall(r"<td class=n>([^<]+)</td><td class=n>([^<]+)</td>", text))
    recon = json.loads((demo / "recon.json").read_text())
    latents = json.loads((demo / "latents.json").read_text())["A <b> & c"]
    for result in (recon, latents):
        for key in result.keys() & MEANINGS.keys():
            assert rows[key.replace("_", " ")] == f"{result[key]:.4g}", key
    assert {"psnr", "ssim", "linear probe accuracy", "pixel probe accuracy", "dims"} <= set(rows)
    assert recon["protocol"] in text and "A &lt;b&gt; &amp; c" in text and "77.77" not in text
    assert recon["command"] == "recon" and all(len(entry) == 3 for entry in SECTIONS.values())


@pytest.mark.slow
def test_the_page_follows_what_is_there(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("recon*"):
        path.unlink()
    shutil.rmtree(tmp_path / "copy/diffusion")
    text = write_report(tmp_path / "copy").read_text()
    assert len(Page(text).addresses) == 4 and "Reconstruction (recon)" not in text
    (tmp_path / "empty").mkdir()
    assert not Page(write_report(tmp_path / "empty").read_text()).addresses


def test_other_json_files_are_no_results(tmp_path, capsys):
    for name, content in (("a", {"command": ["python", "train.py"]}), ("b", [1]), ("c", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write_report(tmp_path)
    assert not capsys.readouterr().err


def test_every_sample_of_a_class_is_drawn_up_to_16():
    labels = np.array([0] * 14 + [1] * 3 + [2] * 20)
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    images[..., 0], images[..., 1] = np.arange(len(labels))[:, None, None], 255

    def drawn(part):
        pixels = np.asarray(draw.sample_grid(images[part], labels[part], [])).reshape(-1, 3)
        return {*pixels[(pixels[:, 1:] == (255, 0)).all(1), 0].tolist()}
    assert drawn(labels < 2) == {*range(17)} and drawn(labels >= 0) == {*range(33)}


def test_a_distance_in_any_networks_features_has_its_meaning():
    for features in ("inception", "classifier", "efficientnet"):
        for kind in "rg":
            assert distance_name(Namespace(features=features), kind) in MEANINGS


def test_a_result_may_bring_its_own_section_and_meanings(tmp_path):
    """As those of study/ do. The core's own commands come first."""
    result = {"command": "toy", "rows": {"width": 2.5, "height": 3.5}, "psnr": 20.125, "protocol": "by hand",
              "page": ["Toy <title>", "nowhere", "See this."], "meanings": {"width": "In m."}}
    (tmp_path / "a.json").write_text(json.dumps(result))
    (tmp_path / "b.json").write_text('{"command": "recon", "psnr": 30.0}')
    (tmp_path / "c.json").write_text('{"command": "toy", "psnr": 40.0}')                    # no section
    text = write_report(tmp_path).read_text()
    Page(text)
    assert text.index("Reconstruction (b)") < text.index("Toy &lt;title&gt; (a)")
    assert "See this." in text and "In m." in text and "2.5" in text and "20.12" in text and "by hand" in text
    assert "3.5" not in text and "40" not in re.sub("<style>.*</style>", "", text, flags=re.S)


def test_odd_neighbours_cost_only_themselves(tmp_path, capsys):
    """The page is written last, after the work, and reads whatever is in the folder."""
    good = {"command": "recon", "psnr": 31.25, "protocol": "by hand"}
    (tmp_path / "good.json").write_text(json.dumps(good))
    contents = {"deep": "[" * 100_000,
                "nested": '{"command": "recon", "a": ' + '{"a": ' * 900 + "1" + "}" * 901,
                "typed": '{"command": ["recon"]}', "page": '{"page": 5}', "short": '{"page": ["one", "two"]}',
                "meanings": '{"command": "recon", "meanings": 3}', "long": '{"a": ' + "9" * 5000 + "}"}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")                                          # to read it would never end
    (tmp_path / "report.png").write_bytes(b"")
    log = {"step": 1, "recon": "0.5", "hog": 0.5}
    for run, text in (("run", json.dumps(log)), ("strange", json.dumps({"step": 1, "loss_t": 3})),
                      (os.fsdecode(b"b\xff"), json.dumps(log | {"recon": 0.5}))):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text(text)
        (tmp_path / run / "config.json").write_text("{}")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    Page(text)
    assert "31.25" in text and "by hand" in text and "(b\\udcff)" in text and text.count("<section>") >= 2
    warnings = capsys.readouterr().err.splitlines()
    for name in ("deep", "page", "short", "meanings", "long", "binary"):
        assert sum(f"{name}.json is left out" in line for line in warnings) == 1, name
    assert any("run is left out" in line for line in warnings)
    assert any("strange is left out" in line for line in warnings)


def test_a_folder_that_may_not_be_entered_is_passed_over(tmp_path, monkeypatch):
    """As lost+found at the top of a disk."""
    (tmp_path / "good.json").write_text('{"command": "recon", "psnr": 31.25}')
    (tmp_path / "lost+found").mkdir()
    real = os.stat

    def stat(path, *args, **options):
        if "lost+found/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert "31.25" in write_report(tmp_path).read_text()


def test_names_and_results_in_a_locale_without_their_letters(tmp_path):
    folder = tmp_path / "Größe"
    (folder / "läuft").mkdir(parents=True)
    (folder / "läuft/config.json").write_text("{}")
    (folder / "läuft/metrics.jsonl").write_text(json.dumps({"step": 1, "recon": 0.5}))
    (folder / "a.json").write_text('{"command": "recon", "protocol": "für alle"}', encoding="utf-8")
    ascii = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = "import sys; from pictures.page import write_report; write_report(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, env=ascii, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "für alle" in text and "Training the tokenizer" in text


def test_a_page_that_cannot_be_written_does_not_end_the_command(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    evaluate.write(Namespace(out=str(tmp_path / "r"), command="toy"), Report({"a": 1}))
    assert json.loads((tmp_path / "r.json").read_text()) == {"command": "toy", "a": 1}
    assert "no page: cannot write" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_page(demo, tmp_path):
    subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                    f"--user-data-dir={tmp_path}/profile", "--window-size=900,3000",
                    f"--screenshot={tmp_path}/page.png", (demo / "report.html").as_uri()],
                   check=True, timeout=100, capture_output=True)
    pixels = Image.open(tmp_path / "page.png").convert("RGB")
    assert pixels.size == (900, 3000)
    # The boxes that the style sheet makes blue-grey are there, and more colours than text has.
    assert pixels.getcolors(2 ** 24) and len(pixels.getcolors(2 ** 24)) > 500
    assert any(colour == (243, 246, 250) for _, colour in pixels.getcolors(2 ** 24))


# ------------------------------------------------- charts -------------------------------------------------

def test_charts_show_how_far_seeds_lie():
    series = {"a": [(0, 0.0), (1, 5.0, 2.0, 8.0), (2, 10.0)]}
    chart, plain = (np.array(line_chart({"": {"a": points}}, "x")) for points in
                    (series["a"], [point[:2] for point in series["a"]]))
    rows, columns = np.nonzero((chart != plain).any(-1))
    top, bottom = draw.TOP, draw.PANEL[1] - draw.BOTTOM
    assert (np.abs(columns - columns.mean()) < 3).all()                             # one vertical whisker
    # The axis goes 0.3 beyond the data on either side.
    assert rows.min() == pytest.approx(bottom - 8.3 / 10.6 * (bottom - top), abs=2)
    assert rows.max() == pytest.approx(bottom - 2.3 / 10.6 * (bottom - top), abs=2)


@pytest.mark.parametrize("low, high, log, numbers", [
    (2.338, 8.85, False, [4, 6, 8]), (-5.1, 5.1, False, [-5, 0, 5]), (0.59, 2.41, False, [1, 1.5, 2]),
    (0.262, 0.584, False, [0.3, 0.4, 0.5]), (-1e-9, 1.01e-6, False, [0, 5e-7, 1e-6]),
    (math.log10(3), math.log10(51), True, [5, 10, 20, 50]), (-2.1, 2.1, True, [0.01, 0.1, 1, 10, 100]),
    (math.log10(1.9), math.log10(4.1), True, [2, 3, 4])])
def test_ticks_are_round_numbers_within_the_axis(low, high, log, numbers):
    ticks = draw._ticks(low, high, log)
    assert [n for _, n in ticks] == pytest.approx(numbers, abs=1e-12)
    assert [p for p, _ in ticks] == pytest.approx([math.log10(n) for n in numbers] if log else numbers,
                                                abs=1e-12)
