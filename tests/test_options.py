"""Every option of every command, given what a hurried person or a script with an empty variable gives it: a
clear refusal or a run, no traceback, and no number outside its range taken in silence."""
import argparse
import dataclasses
import re

import pytest
import torch
from PIL import Image
from test_train_tokenizer import TINY

import checkpoints
import common
import evaluate
import sample
import train_diffusion
import train_tokenizer

ODD_NUMBERS = ("-1", "0", "nan", "inf", "1e38", str(10 ** 20), "", "x" * 5000)
IMPOSSIBLE = ("nan", "inf", "1e38", str(10 ** 20), "", "x" * 5000)             # for any number
SIT = ("--width 32 --depth 2 --heads 2 --cache-images 16 --batch-size 8 --steps 1 --log-every 1 "
       "--save-every 5 --device cpu").split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train_tokenizer.main([*TINY, "--steps", "2", "--stage2-steps", "1", "--out", str(folder / "tokenizer")])
    train_diffusion.main([*SIT, "--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "sit")])
    return folder


def commands(runs, out):
    """name -> (main, arguments that work)."""
    tokenizer, sit = str(runs / "tokenizer"), str(runs / "sit")
    small = ["--device", "cpu", "--batch-size", "8"]
    features = ["--features", "classifier", "--classifier-steps", "2", "--cache", str(runs / "cache")]
    return {
        "train_tokenizer": (train_tokenizer.main, [*TINY, "--steps", "1", "--stage2-steps", "1", "--out",
                                                   out + "/t"]),
        "train_diffusion": (train_diffusion.main, [*SIT, "--tokenizer", tokenizer, "--out", out + "/d"]),
        "sample": (sample.main,
                   ["--ckpt", sit, "--num", "2", "--steps", "1", *small, "--out", out + "/s.npz"]),
        "recon": (evaluate.main,
                  ["recon", tokenizer, "--num-images", "4", *small, "--features", "none",
                   "--out", out + "/r"]),
        "generation": (evaluate.main,
                       ["generation", str(runs / "s.npz"), "--data", "shapes", *small, *features,
                        "--reference-images", "16", "--test-images", "8", "--out", out + "/g"]),
        "latents": (evaluate.main, ["latents", tokenizer, "--components", "1", "--train-images", "16",
                                    "--test-images", "8", "--iterations", "1", "--starts", "1", *small,
                                    "--out", out + "/l"]),
        "curve": (evaluate.main,
                  ["curve", sit, "--num-images", "8", "--reference-images", "16", "--steps", "1",
                   *small, *features, "--out", out + "/c"]),
        "cfg": (evaluate.main, ["cfg", sit, "--num-images", "8", "--reference-images", "16", "--steps", "1",
                                "--scales", "2", "--intervals", "0:1", *small, *features,
                                "--out", out + "/f"]),
    }


def options(name):
    """(flag, whether its values are numbers) of a command."""
    if name in ("train_tokenizer", "train_diffusion"):
        module = {"train_tokenizer": train_tokenizer, "train_diffusion": train_diffusion}[name]
        hidden = () if name == "train_tokenizer" else ("num_latents", "latent_dim", "num_classes")
        return [(f"--{field.name.replace('_', '-')}", common.number(field.type) is not None)
                for field in dataclasses.fields(module.Config) if field.name not in hidden
                and (common.number(field.type) or field.type is str)]
    parsers = []
    real = argparse.ArgumentParser.parse_args
    try:
        argparse.ArgumentParser.parse_args = lambda self, argv=None: (parsers.append(self), 1 / 0)
        with pytest.raises(ZeroDivisionError):
            (sample if name == "sample" else evaluate).main([])
    finally:
        argparse.ArgumentParser.parse_args = real
    parser = parsers[0]
    if name != "sample":
        parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[name]
    return [(action.option_strings[-1], isinstance(action.type, common.Range))
            for action in parser._actions if action.option_strings and action.nargs != 0
            and not isinstance(action, argparse.BooleanOptionalAction)]


NAMES = ("train_tokenizer", "train_diffusion", "sample", "recon", "generation", "latents", "curve", "cfg")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_option_with_odd_values(name, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, works = commands(runs, str(tmp_path))[name]
    if name == "generation":
        sample.main(["--ckpt", str(runs / "sit"), "--num", "16", "--steps", "1", "--device", "cpu", "--out",
                     str(runs / "s.npz")])
    # A run takes half a second. Here it only has to start.
    monkeypatch.setattr(train_tokenizer, "train_stage", lambda method, stage, state, *rest:
                        setattr(state, "step", stage.end))
    monkeypatch.setattr(train_tokenizer, "test_numbers", lambda *args: {})
    monkeypatch.setattr(train_diffusion, "train", lambda *args: None)
    monkeypatch.setattr(checkpoints, "plot_curves", lambda *curves: Image.new("RGB", (8, 8)))
    main(works)
    taken, wrong = 0, []
    tried = options(name)
    assert len(tried) > 8 and any(numeric for _, numeric in tried)
    for flag, numeric in tried:
        for value in ODD_NUMBERS if numeric else ("", "x" * 5000, "."):
            if value == "0" and flag.endswith("-images") and name not in ("sample", "train_diffusion"):
                continue                                       # all: that would be 10,000 drawn shapes
            count = 2 if flag == "--cfg-interval" else 1
            argv = [*works, flag, *[value] * count]
            if name.startswith("train") and flag != "--out":
                argv += ["--out", str(tmp_path / f"{taken}")]
            if name == "sample" and flag != "--out":
                argv += ["--out", str(tmp_path / f"{taken}.npz")]
            try:
                main(argv)
                taken += 1
                if numeric and value in IMPOSSIBLE:
                    wrong.append(f"{flag} {value[:20]!r} was taken")
            except (common.UserError, OSError) as e:
                if len(str(e)) > 12_000 or "\n" in str(e):
                    wrong.append(f"{flag} {value[:20]!r}: not one line")
            except BaseException as e:
                wrong.append(f"{flag} {value[:20]!r}: {type(e).__name__}: {str(e)[:100]}")
    assert not wrong, "\n".join(wrong)
    assert taken


@pytest.mark.parametrize("module, flag, value", [
    (train_tokenizer, "--lr", "0"), (train_tokenizer, "--ema", "1"), (train_tokenizer, "--kl-weight", "-1"),
    (train_tokenizer, "--stage2-ramp", "nan"), (train_tokenizer, "--workers", "-2"),
    (train_tokenizer, "--seed", "-1"), (train_tokenizer, "--steps", "1.5"),
    (train_diffusion, "--label-dropout", "7"), (train_diffusion, "--keep-every", "-1")])
def test_a_number_outside_its_range_is_named_with_the_range(module, flag, value):
    with pytest.raises(common.UserError,
                       match=f"argument {flag}: must be a (whole )?number (from|above) .*not '{value}'"):
        module.main([flag, value])


def test_every_number_of_a_config_has_a_range():
    for module in (train_tokenizer, train_diffusion):
        kinds = {field.name: field.type for field in dataclasses.fields(module.Config)}
        assert not [name for name, kind in kinds.items() if kind in (int, float)]
    with pytest.raises(common.UserError, match="--ema must be a number from 0 and below 1, not nan"):
        train_tokenizer.Config(ema=float("nan"))
    with pytest.raises(common.UserError, match="--width must be a whole number"):
        train_tokenizer.Config(width=96.0)
    share, count = common.number(common.Share), common.number(common.Count)
    assert share.allows(0.5) and not share.allows(torch.nan) and not count.allows(True)


@pytest.mark.parametrize("module", [train_tokenizer, train_diffusion])
def test_help_has_one_line_for_every_option(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    # A second line only below switches whose two names fill the first.
    lines = text[text.index("\noptions:\n"):].splitlines()
    assert all(re.fullmatch(r"  --\S+, --no-\S+", before) for before, line in zip(lines, lines[1:])
               if line.startswith(" " * 38) and line.strip())
    assert set(re.findall(r"^  (--[a-z0-9-]+)", text, re.M)) == {
        flag for flag, _ in options(module.__name__)} | {
        f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Config)
        if field.type is bool}
