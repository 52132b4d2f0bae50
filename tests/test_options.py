"""Every option of every command, given what a hurried person or a script with an empty variable gives it: a
clear refusal or a run, no traceback, and no number outside its range taken in silence."""
import argparse
import re

import pytest
import torch
from PIL import Image
from test_train_tokenizer import TINY

import common
import evaluate
import sample
from study import study
import train_diffusion
import train_tokenizer

ODD_NUMBERS = ("-1", "0", "nan", "inf", "1e38", str(10 ** 20), "", "x" * 5000)
IMPOSSIBLE = ("nan", "inf", "1e38", str(10 ** 20), "", "x" * 5000)             # for any number
SIT = ("--width 32 --depth 2 --heads 2 --cache-images 16 --batch-size 8 --steps 1 --log-every 1 "
       "--save-every 5 --grid-every 0 --device cpu").split()


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
                        "--reference-images", "16", "--test-images", "8", "--json", out + "/g"]),
        "latents": (evaluate.main, ["latents", tokenizer, "--components", "1", "--train-images", "16",
                                    "--test-images", "8", "--iterations", "1", "--starts", "1", *small,
                                    "--out", out + "/l"]),
        "curve": (evaluate.main,
                  ["curve", sit, "--num-images", "8", "--reference-images", "16", "--steps", "1",
                   *small, *features, "--out", out + "/c"]),
        "cfg": (evaluate.main, ["cfg", sit, "--num-images", "8", "--reference-images", "16", "--steps", "1",
                                "--scales", "2", "--intervals", "0:1", *small, *features,
                                "--out", out + "/f"]),
        "gaussian": (evaluate.main, ["gaussian", sit, "--num-images", "8", "--reference-images", "16",
                                     "--steps", "1", "--latent-images", "16", *small, *features,
                                     "--out", out + "/u"]),
        "theory": (evaluate.main,
                   ["theory", "--components", "2", "8", "--dims", "8", "--samples", "64", "512", "4096",
                    "--steps", "150", "--repeats", "1", "--device", "cpu", "--out", out + "/y"]),
    }


def options(name):
    """(flag, whether its values are numbers) of a command."""
    if name in ("train_tokenizer", "train_diffusion"):
        module = {"train_tokenizer": train_tokenizer, "train_diffusion": train_diffusion}[name]
        hidden = () if name == "train_tokenizer" else ("num_latents", "latent_dim", "num_classes")
        return [(f"--{f.replace('_', '-')}", isinstance(kind, common.Number)) for f, kind in
                ((field.name, field.type) for field in module.dataclasses.fields(module.Config))
                if f not in hidden and (isinstance(kind, common.Number) or kind is str)]
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
    return [(action.option_strings[-1], isinstance(action.type, common.Number) or action.type is int)
            for action in parser._actions if action.option_strings and action.nargs != 0
            and not isinstance(action, argparse.BooleanOptionalAction)]


NAMES = ("train_tokenizer", "train_diffusion", "sample", "recon", "generation", "latents", "curve", "cfg",
         "gaussian", "theory")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_option_with_odd_values(name, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, works = commands(runs, str(tmp_path))[name]
    if name == "generation":
        sample.main(["--ckpt", str(runs / "sit"), "--num", "16", "--steps", "1", "--device", "cpu", "--out",
                     str(runs / "s.npz")])
    # A run costs half a second; all that is asked of it is that it starts.
    monkeypatch.setattr(train_tokenizer, "train_stage", lambda config, stage, state, *rest:
                        setattr(state, "step", stage.last))
    monkeypatch.setattr(train_tokenizer, "evaluate", lambda *args: {})
    monkeypatch.setattr(train_diffusion, "train", lambda *args: None)
    for module in (train_tokenizer, train_diffusion):
        monkeypatch.setattr(module, "plot_curves", lambda curves: Image.new("RGB", (8, 8)))
    taken, wrong = 0, []
    tried = options(name)
    assert len(tried) > 8 and any(numeric for _, numeric in tried)
    for flag, numeric in tried:
        for value in ODD_NUMBERS if numeric else ("", "x" * 5000, "."):
            count = 2 if flag == "--cfg-interval" and name == "sample" else 1
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
    (train_tokenizer, "--clip", "-1"), (train_tokenizer, "--ema", "2"), (train_tokenizer, "--lr-end", "-1"),
    (train_tokenizer, "--stage2-ramp", "nan"), (train_diffusion, "--label-dropout", "7"),
    (train_tokenizer, "--beta1", "1"), (train_tokenizer, "--mlp-ratio", "nan"),
    (train_tokenizer, "--keep", "1")])
def test_a_number_outside_its_range_is_named_with_the_range(module, flag, value):
    with pytest.raises(common.UserError, match=f"argument {flag}: must be a (whole )?number .*not '{value}'"):
        module.main([flag, value])


def test_every_number_of_a_config_has_a_range():
    for module in (train_tokenizer, train_diffusion):
        kinds = {field.name: field.type for field in module.dataclasses.fields(module.Config)}
        assert not [name for name, kind in kinds.items() if kind in (int, float)]
    with pytest.raises(common.UserError, match="--beta1 must be a number from 0 and below 1, not nan"):
        train_tokenizer.Config(beta1=float("nan"))
    with pytest.raises(common.UserError, match="--width must be a whole number"):
        train_tokenizer.Config(width=96.0)
    assert common.Share.allows(0.5) and not common.Share.allows(torch.nan) and not common.Count.allows(True)


def test_the_studys_options():
    for flag in ("--seeds", "--jobs", "--minutes"):
        for value in ("-1", "nan", str(10 ** 20), "x"):
            with pytest.raises(common.UserError, match=flag):
                study.main([flag, value])


@pytest.mark.parametrize("module, most", [(train_tokenizer, 38), (train_diffusion, 30)])
def test_help_is_short_and_help_all_is_whole(module, most, capsys):
    listed = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            module.main([flag])
        text = capsys.readouterr().out
        # One line per option: a second one only under switches whose two names fill the first.
        lines = text.splitlines()
        assert all(re.fullmatch(r"  --\S+, --no-\S+", before) for before, line in zip(lines, lines[1:])
                   if line.startswith(" " * 38) and line.strip())
        listed[flag] = set(re.findall(r"^  (--[a-z0-9-]+)", text, re.M)) - {"--help-all"}
    assert len(listed["--help"]) == len(module.SHOWN) <= most
    assert listed["--help-all"] == {flag for flag, _ in options(module.__name__)} | {
        f"--{f.name.replace('_', '-')}" for f in module.dataclasses.fields(module.Config) if f.type is bool}
