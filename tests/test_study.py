"""The study: every command runs, what is done stays done, and its tables say what was measured."""
import json
import re
import time

import numpy as np
import forked
import pytest
import scipy.stats

from common import UserError
from study import report as study_report
from study import study


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty random 32-px images of two classes."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, arr_0=rng.integers(0, 256, (20, 32, 32, 3), np.uint8), arr_1=np.arange(20) % 2)
    return path


@pytest.mark.slow
def test_one_row_runs_to_its_table_and_is_not_run_again(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "subprocess", forked)
    command = ["--setting", "smoke", "--rows", "MAETok (HOG)", "--data", str(images), "--out",
               str(tmp_path), "--device", "cpu"]
    study.main([*command, "--minutes", "0.0001"])             # time is up before, or soon after, the first
    assert "time is up" in capsys.readouterr().out
    study.main(command)
    result = json.loads((tmp_path / "smoke.json").read_text())
    seed = result["rows"]["MAETok (HOG)"]["0"]
    assert [step for step, *_ in seed["curve cfg 1"]] == [1, 2, 3]
    assert result["reference_curves"]["stage1"][-1]["hog"] > 0
    assert "--cfg 2" in result["commands"]["MAETok (HOG)"]["guided curve"]
    folder = tmp_path / "maetok-hog_0"
    guided = json.loads((folder / "samples_stage1.json").read_text())["rows"][1]
    assert guided["scale"] == 2 and seed["gap stage1 cfg 2"] == guided["diffusion_gap"]
    # Both stages have one encoder: PCA and mixtures of its latents are the row's, its decoders differ.
    assert seed["psnr stage1"] != seed["psnr stage2"]
    assert f"| MAETok (HOG) [Table 1b] | {seed['psnr stage1']:.2f} |" in capsys.readouterr().out
    summary = (tmp_path / "smoke.md").read_text().split("\n## ")[0]
    assert f"| MAETok (HOG) [Table 1b] | {seed['psnr stage2']:.1f} | {100 * seed['probe']:.1f} |" in summary
    # the second network's distances: with its package, which the development requirements have
    features = json.loads((folder / "samples_imagenet.json").read_text())["rows"]
    assert seed["distance imagenet cfg 2"] == features[1]["frechet_in_efficientnet_features_not_fid"]
    assert seed["recon distance imagenet"] > 0
    # Ratios and curves reach the tables.
    tables = (tmp_path / "smoke.md").read_text()
    curve = json.loads((folder / "curve_imagenet.json").read_text())["rows"]
    for title, value in (("Gap, classifier", seed["curve cfg 1"][2][2]),
                         ("Distance, ImageNet features",
                          curve[2]["frechet_in_efficientnet_features_not_fid"]),
                         ("Gap, ImageNet features", curve[2]["diffusion_gap"])):
        assert re.search(rf"{title}\n\n\| row \| 1 steps \| 2 steps \| 3 steps \|\n.*\n.* "
                         rf"\| {value:.2f} \|\n", tables), title
    of_gaussian = [json.loads((folder / f"{name}.json").read_text())["diffusion_gap"]
                   for name in ("gaussian", "gaussian_imagenet")]
    null = [json.loads((folder / f"{name}.json").read_text())["rows"][-1]["diffusion_gap"]
            for name in ("null_class", "null_class_imagenet")]
    for a, b in zip(null, of_gaussian):
        assert f" | {b:.2f} | {a / b:.2f} |" in tables
    assert set(seed["seconds"]) == set(result["commands"]["MAETok (HOG)"])
    assert len(seed["loss curve"]) == 3 and seed["distance null class"] > 0
    for picture in ("curves", "mixtures", "samples", "losses", "psnr", "figures"):
        assert (tmp_path / f"smoke_{picture}.png").exists()
    log = (folder / "log.txt").read_text()
    study.main(command)
    assert (folder / "log.txt").read_text() == log                                # nothing was run twice
    with pytest.raises(UserError, match="other options"):
        study.main([*command[:-2], "--device", "auto"])


def test_a_failed_command_is_named_with_its_log(images, tmp_path):
    command = ["--setting", "smoke", "--rows", "AE", "--data", str(images), "--out", str(tmp_path)]
    folder = tmp_path / "ae_0" / "stage1"
    folder.mkdir(parents=True)
    (folder / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="stage1 ended with status 2.*delete them to start again.*log.txt"):
        study.main(command)


def test_a_command_that_no_row_has_is_refused(images, tmp_path):
    command = ["--setting", "smoke", "--rows", "AE", "--data", str(images), "--out", str(tmp_path)]
    with pytest.raises(UserError, match="--only stage3: the commands are .*stage1, stage2"):
        study.main([*command, "--only", "stage1", "stage3"])
    assert not (tmp_path / "ae_0").exists()


def fake_study(tmp_path, monkeypatch, scripts, jobs=2, minutes=0):
    """A Study whose rows run these one-line scripts. Each may write a file beside itself."""
    folder = tmp_path / "scripts"
    folder.mkdir(exist_ok=True)
    for name, lines in scripts.items():
        for number, line in enumerate(lines):
            (folder / f"{name}{number}.py").write_text(f"import time, pathlib, sys\n{line}\n")
    monkeypatch.setattr(study, "SCRIPTS", folder)
    monkeypatch.setattr(study, "commands", lambda args, name, seed: {
        str(number): [f"{name}{number}.py", str(tmp_path / f"{name}{number}")]
        for number in range(len(scripts.get(name, [])))})
    args = study.argparse.Namespace(plan={"rows": list(scripts), "seeds": 1}, out=tmp_path / "out",
                                    jobs=jobs, minutes=minutes, threads=1, machine="here")
    return study.Study(args)


TOUCH = "pathlib.Path(sys.argv[1]).open('a').write('x')"


def test_some_commands_alone_and_later_the_others(tmp_path, monkeypatch):
    some, whole = (fake_study(tmp_path, monkeypatch, {"a": [TOUCH] * 3}) for _ in range(2))
    some.only = ["0", "2"]
    assert some.run() == (True, [])
    assert [(tmp_path / f"a{i}").exists() for i in range(3)] == [True, False, True]
    assert whole.run() == (True, [])
    assert [(tmp_path / f"a{i}").read_text() for i in range(3)] == ["x"] * 3        # none ran twice


def test_one_failure_does_not_end_the_other_rows(tmp_path, monkeypatch):
    scripts = {"a": ["sys.exit('it broke')", TOUCH], "b": ["time.sleep(1)", TOUCH], "c": [TOUCH]}
    finished, errors = fake_study(tmp_path, monkeypatch, scripts).run()
    assert not finished and len(errors) == 1
    assert "a, seed 0: 0 ended with status 1: it broke" in str(errors[0])
    assert (tmp_path / "b1").exists() and (tmp_path / "c0").exists() and not (tmp_path / "a1").exists()
    scripts["a"][0] = TOUCH                                            # repaired: only what is left runs
    assert fake_study(tmp_path, monkeypatch, scripts).run() == (True, [])
    assert {name: (tmp_path / name).read_text() for name in ("a0", "a1", "b1", "c0")} == dict.fromkeys(
        ("a0", "a1", "b1", "c0"), "x")


def test_time_up_ends_commands_and_the_next_call_goes_on(tmp_path, monkeypatch):
    go = tmp_path / "go"
    scripts = {"a": [TOUCH, f"pathlib.Path({str(go)!r}).exists() or time.sleep(60); {TOUCH}"]}
    begun = time.time()
    assert fake_study(tmp_path, monkeypatch, scripts, minutes=0.05).run() == (False, [])
    assert time.time() - begun < 30 and not (tmp_path / "a1").exists()
    done = json.loads((tmp_path / "out" / "a_0" / "done.json").read_text())
    assert done["0"]["done"] and not done["1"]["done"] and done["1"]["seconds"] > 0
    go.touch()
    assert fake_study(tmp_path, monkeypatch, scripts).run() == (True, [])
    assert (tmp_path / "a0").read_text() == (tmp_path / "a1").read_text() == "x"


def test_tables_give_the_range_over_seeds():
    rows = {"AE": {0: {"psnr stage1": 20.0, "probe": 0.25}, 1: {"psnr stage1": 21.0, "probe": 0.35}}}
    columns = {"PSNR": ("psnr stage1", 2, 1), "probe, %": ("probe", 1, 100), "gone": ("nowhere", 1, 1)}
    assert study_report.markdown(rows, columns, {"AE": "Table 1a"}).splitlines() == [
        "| row | PSNR | probe, % |", "|---|---|---|", "| AE [Table 1a] | 20.00–21.00 | 25.0–35.0 |"]


def test_verdicts_need_every_seed_on_one_side():
    seeds = lambda *values: {i: {"gap stage2 cfg 1": v, "probe": v / 10} for i, v in enumerate(values)}
    of = lambda rows: [line.split(" | ") for line in study_report.verdicts(rows).splitlines()[2:]]
    line, = of({"AE": seeds(3.0, 3.2), "MAETok (HOG)": seeds(1.0, 2.9), "KL-VAE + mask": seeds(0.0)})
    assert line[:3] == ["| MAETok (HOG)", "AE", "13.54, 24.47 [Tables 1a, 1b]"]
    assert line[3:5] == ["–", "–"] and line[6] == "yes: 1.95, 3.10" and line[-1] == "no: 19.5, 31.0 |"
    line, = of({"AE": seeds(3.0, 3.2), "MAETok (HOG)": seeds(1.0, 3.1)})
    assert line[6] == "open: 2.05, 3.10"
    line, = of({"AE": seeds(3.0, 3.2), "MAETok (HOG)": seeds(1.0)})
    assert line[6] == "yes (1 seed): 1.00, 3.10"
    names = {*study.ROWS, study_report.EQUAL}
    assert all({better, worse} <= names for better, worse, *_ in study_report.PAPER)


def test_a_curve_leaves_out_where_a_piece_of_the_work_ended():
    rows = [{"step": step} for step in (300, 800, 1600, 1900, 2399)]
    assert [row["step"] for row in study_report.planned(rows, 800)] == [800, 1600, 2399]


def test_imagenet64_asks_for_a_folder_before_it_trains_anything(tmp_path):
    with pytest.raises(UserError, match="imagenet64 needs --data FOLDER"):
        study.main(["--setting", "imagenet64", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_rank_correlations_are_of_the_rows_means():
    seeds = lambda *pairs: {i: {"probe": p, "diffusion loss": p ** 2, "distance stage2 cfg 1": d}
                            for i, (p, d) in enumerate(pairs)}
    rows = {"AE": seeds((0.4, 9), (0.5, 7)), "KL-VAE": seeds((0.46, 7.5)), "MAETok (HOG)": seeds((0.6, 5)),
            "AE, 8 channels": seeds((0.9, 20.0)), "KL-VAE, weight / 10": seeds((0.9, 20.0))}
    assert study_report.rank_correlations(rows).splitlines() == [
        "- Linear probe against distance, classifier: -1.00, 3 rows.",
        "- Diffusion loss against distance, classifier: -1.00, 3 rows."]


def test_what_target_and_mask_bring_alone_is_a_share_of_the_gain():
    seeds = lambda *each: {i: {"gap stage2 cfg 1": g, "probe": p, "distance stage2 cfg 1": g}
                           for i, (g, p) in enumerate(each)}
    rows = {"AE": seeds((6.0, 0.3), (5.0, 0.3)), "AE + HOG, no mask": seeds((5.0, 0.5)),
            "AE + mask, pixels": seeds((3.0, 0.3), (2.0, 0.3)), "MAETok (HOG)": seeds((2.0, 0.4), (1.0, 0.4))}
    table = study_report.halves(rows).splitlines()
    assert table[0] == "| of MAETok (HOG)'s gain on the AE, % | AE + HOG, no mask | AE + mask, pixels |"
    assert table[2:] == ["| distance, classifier | 25 | 75 |",            # of seed 0 alone, and of both seeds
                         "| gap, classifier | 25 | 75 |", "| linear-probe accuracy, % | 200 | 0 |"]
    rows["MAETok (HOG)"][0]["probe"] = 0.1                                    # no gain, so no share of one
    assert study_report.halves(rows).endswith("| linear-probe accuracy, % | – | – |")
    assert study_report.halves({name: rows[name] for name in ("AE", "MAETok (HOG)")}) == ""


def test_the_ae_of_equal_reconstruction_lies_between_its_widths():
    seed = lambda psnr, gap: {0: {"psnr stage2": psnr, "gap stage2 cfg 1": gap}}
    rows = {"AE": seed(25.0, 3.0), "AE, 8 channels": seed(21.0, 1.0), "MAETok (HOG)": seed(22.0, 1.4)}
    assert study_report.ae_at_psnr(rows, "MAETok (HOG)") == {0: {"gap stage2 cfg 1": pytest.approx(1.5)}}
    assert study_report.ae_at_psnr(rows | {"KL-VAE": seed(20.9, 1.0)}, "KL-VAE") == {}       # no guessing
    second = {1: {"psnr stage2": 22.0, "gap stage2 cfg 1": 9.0}}
    more = rows | {"MAETok (HOG)": rows["MAETok (HOG)"] | second}
    assert "yes (1 seed): 1.40, 1.50" in study_report.verdicts(more)               # of seed 0 alone
    middle = study_report.ae_at_psnr(rows | {"AE, 16 channels": seed(23.0, 1.2)}, "MAETok (HOG)")
    assert middle[0]["gap stage2 cfg 1"] == pytest.approx(1.1)
    table = study_report.verdicts(rows).splitlines()[2:]
    assert len(table) == 2 and f"| MAETok (HOG) | {study_report.EQUAL} | – [its claim] |" in table[1]
    assert "yes (1 seed): 1.40, 1.50" in table[1]
    # Ranges: each seed beside its own AEs; least gain: seed 1 on seed 0's. No line for what was not measured.
    own = {"AE": {1: {"psnr stage2": 23.0, "gap stage2 cfg 1": 9.0}},
           "AE, 8 channels": {1: {"psnr stage2": 20.0, "gap stage2 cfg 1": 3.0}}}
    both = {name: seeds | own.get(name, {}) for name, seeds in more.items()}
    assert study_report.at_equal_psnr(both).splitlines() == [
        "| measure ↓ | MAETok (HOG) |", "|---|---|", "| gap, classifier | 1.4–9.0 (1.5–7.0): -7.5 |"]
    assert study_report.at_equal_psnr({"AE": rows["AE"], "MAETok (HOG)": rows["MAETok (HOG)"]}) == ""


def test_the_interval_of_the_lead_is_welchs():
    """Two pairs half a unit around 1 and one unit around 4: standard error^2 = 0.5 (0.5 + 2) = 1.25, with
    1.25^2 / (0.25^2 + 1) = 1.47 degrees of freedom."""
    seeds = lambda *gaps: {n: {"gap stage2 cfg 1": gap, "accuracy stage2 cfg 2": gap / 100}
                           for n, gap in enumerate(gaps)}
    rows = {"AE": seeds(3.0, 5.0), "MAETok (HOG)": seeds(0.5, 1.5)}
    half = scipy.stats.t.ppf(0.975, 1.25 ** 2 / (0.25 ** 2 + 1)) * 1.25 ** 0.5
    table = [f"| {title} | {-3:+.{n}f} | {-3 - half:+.{n}f} to {-3 + half:+.{n}f} |"
             for title, n in (("gap, classifier", 2), ("class accuracy at guidance 2, %", 1))]
    assert study_report.lead(rows).splitlines()[2:] == table
    assert study_report.lead(rows | {"AE": seeds(3.0)}) == ""


@pytest.mark.parametrize("setting", ["quick", "longer", "sharp", "sharp-adamw", "long", "imagenet64"])
def test_rows_differ_in_their_own_options_only(setting):
    plan = study.SETTINGS[setting]
    args = study.argparse.Namespace(plan=plan, out="x", data="shapes", device="cpu", imagenet=True,
                                    tokenizer_options="")
    found = {}
    for name, row in study.ROWS.items():
        for title, arguments in study.commands(args, name, 1).items():
            words = [str(a).replace(str(study.unit_folder(args, name, 1)), "FOLDER") for a in arguments]
            if words[0] == "train_tokenizer.py":
                own = words.index("--seed") + 2 + len(study.SCALES[plan["scale"]]["tokenizer"])
                end = words.index("--steps")
                weight = ["--kl-weight"] if "vae" in row.variants else []
                assert words[2] == ",".join(filter(None, (plan["scale"], row.variants)))
                options = " ".join(row.options).format(patch=study.SCALES[plan["scale"]]["patch"]).split()
                assert words[own:end - len(weight)] == options + weight
                del words[own:end], words[2]
            words = tuple(word for word in words if word != name)
            found.setdefault(title, {}).setdefault(words, []).append(name)
    for title, variants in found.items():
        assert len(variants) == 1, (title, variants)          # and only the teacher's row leaves measures out
        missing = set(study.ROWS) - set(next(iter(variants.values())))
        assert missing == ({"MAETok (HOG, EfficientNet)"} if "ImageNet" in title else set())


def test_a_table_never_mixes_other_options(tmp_path, monkeypatch):
    """A finished row of another --data, or setting, in the same folder: refused before anything runs."""
    scripts = {"AE": [TOUCH], "KL-VAE": [TOUCH]}
    assert fake_study(tmp_path, monkeypatch, scripts).run() == (True, [])
    path = tmp_path / "out" / "ae_0" / "done.json"
    path.write_text(path.read_text().replace("AE0.py", "other.py"))
    other = fake_study(tmp_path, monkeypatch, scripts)
    other.args.plan["rows"] = ["KL-VAE"]
    with pytest.raises(UserError, match="ae_0 was made with other options"):
        other.run()


@pytest.mark.parametrize("setting, expected", [("sharp", (512, 4000, 3, 96, 2.0)),
                                               ("sharp-adamw", (512, 12_000, 3, 96, 0.0)),
                                               ("long", (512, 4000, 3, 96, 2.0)),
                                               ("imagenet64", (2048, 80_000, 12, 384, 0.0))])
def test_every_setting_has_rows_of_equal_latents_and_steps(setting, expected):
    """What "at equal steps and latent size" needs, from the trainers' own configurations."""
    from train_tokenizer import Config, Method
    args = study.argparse.Namespace(plan=study.SETTINGS[setting], out="x", data="shapes", device="cpu",
                                    imagenet=True, tokenizer_options="")
    sizes = set()
    for name in [name for name in study.ROWS if "channels" not in name]:
        words = [str(a) for a in study.commands(args, name, 0)["stage1"]]
        values = {k: v for part in words[2].split(",") for k, v in Method.PRESETS[part].items()}
        given = lambda option: int(words[len(words) - 1 - words[::-1].index(option) + 1])
        values |= dict(steps=given("--steps"))
        if "--num-latents" in words:
            values["num_latents"] = given("--num-latents")
        if "--latent-dim" in words:
            values["latent_dim"] = given("--latent-dim")
        muon = words[words.index("--muon") + 1] if "--muon" in words else "0"
        config = Config(**values)
        patches = (config.image_size // config.patch_size) ** 2
        tokens = config.num_latents if config.learnable_latents else patches
        sizes.add((tokens * config.latent_dim, config.steps, config.encoder_depth, config.width, float(muon)))
    assert sizes == {expected}


def test_a_setting_may_give_each_row_its_seeds_and_first_seeds_come_first():
    plan = {"rows": ["AE", "KL-VAE", "AE, 8 channels"], "seeds": {"AE": 2, "KL-VAE": 1}}
    assert study.all_units(plan) == [("AE", 0), ("KL-VAE", 0), ("AE, 8 channels", 0), ("AE", 1)]
    assert study.all_units(plan | {"rows": ["AE", "KL-VAE"], "seeds": 1}) == [("AE", 0), ("KL-VAE", 0)]


def test_the_report_has_all_that_is_complete_whatever_rows_were_asked_for(tmp_path, monkeypatch):
    scripts = {"AE": [TOUCH], "KL-VAE": [TOUCH], "MAETok (HOG)": ["sys.exit('it broke')"]}
    a_study = fake_study(tmp_path, monkeypatch, scripts)
    a_study.args.plan["seeds"] = {"AE": 2}
    a_study.run()
    a_study.args.plan |= {"rows": ["KL-VAE"], "seeds": 1}
    units = study.complete_units(a_study.args)
    assert {name: [*seeds] for name, seeds in units.items()} == {"AE": [0, 1], "KL-VAE": [0]}


def test_a_kl_vaes_weight_follows_the_number_of_values():
    weights = {}
    for setting in ("sharp", "imagenet64"):
        args = study.argparse.Namespace(plan=study.SETTINGS[setting], out="x", data="d", device="cpu",
                                        imagenet=True, tokenizer_options="")
        for name in ("KL-VAE", "KL-VAE, weight / 10", "KL-VAE, weight x 10"):
            words = study.commands(args, name, 0)["stage1"]
            weights[setting, name] = float(words[words.index("--kl-weight") + 1])
    assert [*weights.values()] == [8e-6, 8e-7, 8e-5, 2e-6, 2e-7, 2e-5]
