"""train_diffusion.py and sample.py: the latent cache, exact resumption, process counts,
samples that are their own."""
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import SERVER, child, in_two_processes
from PIL import Image

import cache as latent_cache
import checkpoints
import flow
import maetok
import sample
import sit
import train_diffusion as trainer
import train_tokenizer
from cache import LatentCache
from common import UserError, sample_rng
from data import build_dataset, to_float
from runtime import files
from shapes import Shapes
from sit import SiTConfig
from train_diffusion import PRESETS, Config, Method

TOKENIZER = ("--image-size 16 --patch-size 4 --width 32 --heads 2 --encoder-depth 1 --decoder-depth 1 "
             "--aux-depth 1 --num-latents 4 --latent-dim 4 --hog-cell 4 --batch-size 8 --steps 4 "
             "--stage2-steps 2 --warmup 2 --stage2-warmup 1 --log-every 1 --save-every 5 "
             "--device cpu")
TINY = ("--width 32 --depth 2 --heads 2 --cache-images 40 --batch-size 8 --steps 10 --warmup 2 --log-every 1 "
        "--save-every 5 --device cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.main([*TOKENIZER.split(), "--out", str(folder)])
    return folder


def train(out, tokenizer, *options):
    trainer.main([*TINY.split(), "--tokenizer", str(tokenizer), "--out", str(out), *map(str, options)])
    return checkpoints.load_checkpoint(out)


def run(script, *options):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, options)], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def losses(out):
    return [r["loss"] for r in checkpoints.read_metrics(out)]


def test_a_cache_of_latents_pickles_without_its_data(tmp_path):
    cache = LatentCache(tmp_path, "key", 1000, True, 0)
    np.save(tmp_path / "latents_00000.npy", np.zeros((1000, 2, 16, 8), np.float16))
    np.save(tmp_path / "labels_00000.npy", np.arange(1000))
    assert cache[0, 5][1] == 5                                                  # opened when it is first read
    packed = pickle.dumps(cache)
    assert len(packed) < 2000 and pickle.loads(packed)[0, 7][1] == 7


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_enough_checkpoints_for_a_curve(name):
    """Fig. 5b needs points: eight at least; autoguidance's worse model is SiT-XL's at 1 M steps."""
    config = Config(**PRESETS[name])
    kept = range(config.save_every, config.steps + 1, config.save_every)
    kept = [step for step in kept if step % config.keep_every == 0]
    assert len(kept) >= 8
    assert name != "sit-xl" or 1_000_000 in kept


# ------------------------------------------------ presets ------------------------------------------------

def test_paper_preset_is_table_8():
    config = Config(**PRESETS["sit-xl"])
    assert (config.width, config.heads, config.depth, config.num_latents,
            config.latent_dim) == (1152, 16, 28, 128, 32)
    assert (config.lr, config.batch_size, config.steps, config.warmup, config.label_dropout, config.ema,
            config.path, config.times) == (1e-4, 256, 4_000_000, 0, 0.1, 0.9999, "linear", "uniform")
    optimizer = Method(config, None, torch.device("cpu")).optimizer(torch.nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.AdamW
    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (1e-4, (0.9, 0.999), 0.0)]
    for name in PRESETS:
        assert isinstance(Config(**PRESETS[name]), SiTConfig)


def test_the_rate_is_constant_but_for_a_warm_up_and_a_fall_at_the_end():
    rates = lambda **options: [trainer.learning_rate(Config(lr=2.0, steps=8, **options), step)
                               for step in range(8)]
    assert rates() == [2.0] * 8                                                          # Table 8
    assert rates(warmup=2, lr_decay=0.5) == [1.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(lr_decay=1.0) == [2.0 * (8 - step) / 8 for step in range(8)]


def test_imagenet64_is_sit_b_on_64_tokens():
    config = Config(**PRESETS["imagenet64"], num_latents=64)
    assert (config.width, config.depth, config.heads, config.batch_size, config.steps) == (768, 12, 12, 256,
                                                                                           80_000)


# ------------------------------------------------ the cache ------------------------------------------------

def test_cache_holds_the_normalised_latents_of_both_flips(tmp_path, tokenizer):
    train(tmp_path, tokenizer, "--flip", "--steps", 1)
    key = files.read_json(tmp_path / "latents/meta.json")["key"]
    cache = LatentCache(tmp_path / "latents", key, 40, True, 0)
    model, source = maetok.load_tokenizer(tokenizer), Shapes("train", 16, 0)
    seen = set()
    for index in range(12):
        image = to_float(torch.from_numpy(np.array(source[index][0])).permute(2, 0, 1)[None])
        plain, flipped = (model.encode(view, normalize=True)[0] for view in (image, image.flip(-1)))
        for epoch in range(4):
            z, label = cache[epoch, index]
            match = [torch.allclose(z, view, atol=5e-3) for view in (plain, flipped)]   # float16 in the cache
            assert any(match) and label == index % 10
            seen.add(tuple(match))
    assert {(True, False), (False, True)} <= seen


def test_a_kl_vaes_latents_are_samples_of_its_posteriors(tmp_path, monkeypatch):
    """In the cache the same for an image and flip, without it new ones in every step; of unit variance."""
    train_tokenizer.main([*TOKENIZER.split(), "--variational", "--out", str(tmp_path / "vae")])
    train(tmp_path / "sit", tmp_path / "vae", "--flip", "--steps", 1)
    key = files.read_json(tmp_path / "sit/latents/meta.json")["key"]
    cache = LatentCache(tmp_path / "sit/latents", key, 40, True, 0)
    model, source, found = maetok.load_tokenizer(tmp_path / "vae"), Shapes("train", 16, 0), []
    for index in range(12):
        image = to_float(torch.from_numpy(np.array(source[index][0])).permute(2, 0, 1)[None])
        views = [model.encode(x, normalize=True, rngs=[sample_rng(0, "posterior", view, index)])[0]
                 for view, x in enumerate((image, image.flip(-1)))]
        means = [model.encode(x, normalize=True)[0] for x in (image, image.flip(-1))]
        z, _ = cache[0, index]
        assert any(torch.allclose(z, view, atol=5e-3) for view in views)
        assert not any(torch.allclose(z, mean, atol=0.1) for mean in means)
        found += views
    assert torch.stack(found).std().item() == pytest.approx(1, abs=0.1)
    # A cache of means, of before they were sampled, is another one.
    monkeypatch.setattr(LatentCache, "build", lambda self, *args: None)
    dataset, keys = build_dataset("shapes", "train", 16, "data"), []
    for model.config.variational in (True, False):
        config = Config(out=str(tmp_path / "keys"), cache_images=40)
        keys.append(latent_cache.encode_once(config, model, dataset, None).key)
    assert keys[0] != keys[1]
    model.config.variational = True
    method = Method(Config(cache=False, num_classes=10), model, torch.device("cpu"))
    loaded = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    a, b, again = (method.batch(step, [3, 4], loaded).x for step in (5, 6, 5))
    assert torch.equal(a, again) and (a - b).abs().mean() > 0.1


def test_cache_is_resumed_shard_by_shard_and_refused_when_stale(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_IMAGES", 16)
    train(tmp_path / "a", tokenizer)
    shards = sorted((tmp_path / "a/latents").glob("*.npy"))
    assert len(shards) == 6 and [len(np.load(f)) for f in shards] == [16, 16, 8] * 2
    before = {f: f.read_bytes() for f in shards}
    written = (tmp_path / "a/latents/meta.json").stat().st_mtime_ns
    shards[1].unlink()                                                               # as if interrupted there
    keep = shards[0].stat().st_mtime_ns
    train(tmp_path / "a", tokenizer)
    assert {f: f.read_bytes() for f in shards} == before and shards[0].stat().st_mtime_ns == keep
    assert (tmp_path / "a/latents/meta.json").stat().st_mtime_ns == written
    train_tokenizer.main([*TOKENIZER.split(), "--out", str(tmp_path / "other"), "--seed", "1"])
    (tmp_path / "a/last.pt").unlink()
    for path in (tmp_path / "a").glob("step_*.pt"):
        path.unlink()
    with pytest.raises(UserError, match="latents of another tokenizer"):
        train(tmp_path / "a", tmp_path / "other")
    with pytest.raises(UserError, match="latents of another tokenizer"):
        train(tmp_path / "a", tokenizer, "--flip")


def small_shards():
    latent_cache.SHARD_IMAGES = 300


def test_kill_during_extraction_loses_one_shard_at_most(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_IMAGES", 300)
    options = [*TINY.split(), "--tokenizer", tokenizer, "--out", tmp_path / "run", "--cache-images", 1200]
    argv = [str(option) for option in options]
    process = SERVER.Process(target=child, args=("train_diffusion", argv, {}, tmp_path / "log", small_shards))
    process.start()
    deadline, latents = time.time() + 120, tmp_path / "run/latents"
    while not (latents / "labels_00000.npy").exists():
        assert process.is_alive() and time.time() < deadline
    process.kill()
    process.join()
    whole = [f for f in latents.glob("labels_*.npy")]                         # written after their latents
    whole += [f.with_name(f.name.replace("labels", "latents")) for f in whole]
    kept = {f: f.stat().st_mtime_ns for f in whole}
    train(tmp_path / "run", tokenizer, "--cache-images", 1200)
    assert kept and all(f.stat().st_mtime_ns == before for f, before in kept.items())
    assert len(list(latents.glob("latents_*.npy"))) == 4


def test_some_images_of_a_sorted_data_set_are_of_all_classes(tmp_path, tokenizer):
    images = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images, arr_1=np.arange(100) // 10)            # sorted by class
    data = ["--data", tmp_path / "x.npz", "--steps", 1]
    train(tmp_path / "some", tokenizer, *data)                                        # --cache-images 40
    labels = np.load(tmp_path / "some" / "latents" / "labels_00000.npy")
    assert len(labels) == 40 and len(set(labels)) == 10
    train(tmp_path / "all", tokenizer, *data, "--cache-images", 0)
    assert (np.load(tmp_path / "all" / "latents" / "labels_00000.npy") == np.arange(100) // 10).all()


def test_no_cache_trains_on_the_same_latents(tmp_path, tokenizer):
    np.savez(tmp_path / "x.npz", np.stack([np.array(Shapes("train", 16, 0)[i][0]) for i in range(40)]),
             np.arange(40) % 10)
    options = ["--data", tmp_path / "x.npz", "--cache-images", 0, "--no-flip"]
    train(tmp_path / "cached", tokenizer, *options)
    train(tmp_path / "live", tokenizer, *options, "--no-cache")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "live"), atol=1e-3)   # float16
    assert not (tmp_path / "live/latents").exists()


# ------------------------------------------------ training ------------------------------------------------

def test_training_learns_and_logs_the_loss_by_time(tmp_path, tokenizer):
    train(tmp_path, tokenizer, "--steps", 150, "--lr", "2e-3", "--save-every", 200)
    curve = losses(tmp_path)
    assert np.mean(curve[-20:]) < 0.9 * np.mean(curve[:10])
    assert 1.5 < curve[0] < 2.5                           # E|eps - x|^2 of unit-variance data, output still 0
    record = checkpoints.read_metrics(tmp_path)[0]
    assert len(record["loss_t"]) == 10
    assert min(Image.open(tmp_path / "grid_0000150.png").size) > 90 and (tmp_path / "loss.png").exists()


@pytest.mark.slow
def test_two_processes_equal_one_in_training_and_sampling(tmp_path, tokenizer):
    one = train(tmp_path / "one", tokenizer)
    in_two_processes("train_diffusion", [*TINY.split(), "--tokenizer", tokenizer, "--out", tmp_path / "two"],
                     tmp_path / "log")
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(train_accumulated(tmp_path, tokenizer)),
                               atol=1e-4)
    assert one["config"]["num_classes"] == 10
    options = ["--ckpt", tmp_path / "one", "--num-images", 12, "--steps", 5, "--cfg", 2, "--device", "cpu"]
    sample.main([*map(str, options), "--out", str(tmp_path / "a.npz"), "--batch-size", "5"])
    in_two_processes("sample", [*options, "--out", tmp_path / "b.npz", "--batch-size", 4], tmp_path / "log")
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a["arr_0"].shape == (12, 16, 16, 3) and np.array_equal(a["arr_1"], b["arr_1"])
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1                            # to rounding


def train_accumulated(tmp_path, tokenizer):
    train(tmp_path / "accumulated", tokenizer, "--accumulate", 2)
    return tmp_path / "accumulated"


@pytest.mark.parametrize("options", [["--unconditional"], ["--path", "cosine", "--times", "logit-normal"],
                                     ["--dtype", "bfloat16"]])
def test_variants_train_and_sample(tmp_path, tokenizer, options):
    state = train(tmp_path, tokenizer, *options)
    assert np.isfinite(losses(tmp_path)).all()
    assert state["config"]["num_classes"] == (0 if "--unconditional" in options else 10)
    sample.main(["--ckpt", str(tmp_path), "--num", "3", "--steps", "3", "--out", str(tmp_path / "s.npz"),
                 "--device", "cpu"])
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 16, 16, 3)


# ------------------------------------------------ sampling ------------------------------------------------

@pytest.fixture(scope="module")
def diffusion(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("diffusion")
    train(folder, tokenizer, "--steps", 60, "--lr", "2e-3", "--save-every", 100)
    return folder


def draw(diffusion, *options):
    sample.main(["--ckpt", str(diffusion), "--steps", "4", "--device", "cpu", *map(str, options)])


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_a_sample_does_not_depend_on_the_batch_around_it(tmp_path, diffusion, sampler):
    draw(diffusion, "--num", 7, "--batch-size", 7, "--sampler", sampler, "--out", tmp_path / "a.npz")
    draw(diffusion, "--num", 7, "--batch-size", 2, "--sampler", sampler, "--out", tmp_path / "b.npz")
    draw(diffusion, "--num", 7, "--seed", 1, "--sampler", sampler, "--out", tmp_path / "c.npz")
    a, b, c = (np.load(tmp_path / f"{n}.npz")["arr_0"].astype(int) for n in "abc")
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).max() > 1
    assert not (tmp_path / "a.npz.parts").exists()


def test_outputs_labels_and_classes(tmp_path, diffusion):
    outs = [tmp_path / "grid.png", tmp_path / "all.npz", tmp_path / "folder"]
    draw(diffusion, "--num", 6, "--classes", 3, 7, "--out", *outs)
    file = np.load(tmp_path / "all.npz")
    assert file["arr_1"].tolist() == [3, 7, 3, 7, 3, 7] and file["arr_0"].dtype == np.uint8
    names = sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert names[0] == "000000_class3.png" and len(names) == 6
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / names[1])), file["arr_0"][1])
    assert Image.open(tmp_path / "grid.png").width > 3 * 48
    assert build_dataset(str(tmp_path / "all.npz"), "test", 16).length == 6       # what it writes it can read
    random = flow.choose_labels(2000, None, 10, "random", 0)
    assert set(random) == set(range(10)) and np.bincount(random).min() > 150
    assert np.array_equal(random[:50], flow.choose_labels(50, None, 10, "random", 0))


def test_an_interrupted_run_goes_on(tmp_path, diffusion, monkeypatch):
    out = tmp_path / "x.npz"
    real, calls = flow.sample_latents, []

    def stops(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "sample_latents", stops)
    with pytest.raises(KeyboardInterrupt):
        draw(diffusion, "--num", 8, "--batch-size", 2, "--out", out)
    assert len(list((tmp_path / "x.npz.parts").glob("*.npy"))) == 2 and not out.exists()
    with pytest.raises(UserError, match="other settings"):
        draw(diffusion, "--num", 8, "--batch-size", 2, "--cfg", 3, "--out", out)
    draw(diffusion, "--num", 8, "--batch-size", 2, "--out", out)
    assert len(calls) == 5                                                          # two were not drawn again
    draw(diffusion, "--num", 8, "--batch-size", 2, "--out", tmp_path / "y.npz")
    assert np.array_equal(np.load(out)["arr_0"], np.load(tmp_path / "y.npz")["arr_0"])


def test_the_checkpoint_knows_its_tokenizer(tmp_path, diffusion, tokenizer):
    _, inside, _ = sit.load_diffusion(diffusion)
    outside = maetok.load_tokenizer(tokenizer)
    assert all(torch.equal(v, inside.state_dict()[k]) for k, v in outside.state_dict().items())


@pytest.mark.parametrize("options", [[], ["--accumulate", 2]])
def test_checkpointing_gives_the_same_weights_bit_for_bit(tmp_path, tokenizer, options):
    same_with_checkpointing(tmp_path, tokenizer, *options)


def same_with_checkpointing(tmp_path, tokenizer, *options):
    options = [*options, "--steps", 4, "--save-every", 4]
    plain, less = (train(tmp_path / name, tokenizer, *options, *more)
                   for name, more in (("plain", []), ("less", ["--checkpointing"])))
    assert losses(tmp_path / "plain") == losses(tmp_path / "less")
    for part in ("model", "ema"):
        assert all(torch.equal(plain[part][name], less[part][name]) for name in plain[part])
    # It may be switched on and off between the parts of a run.
    train(tmp_path / "less", tokenizer, *options)


def test_images_without_a_class_train_the_null_class(tmp_path, tokenizer):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "some.npz", arr_0=pictures, arr_1=np.arange(12) % 4 - 1)
    state = train(tmp_path / "run", tokenizer, "--data", tmp_path / "some.npz", "--cache-images", 0)
    assert state["config"]["num_classes"] == 3 and np.isfinite(losses(tmp_path / "run")).all()


# ------------------------------------------------ bad input ------------------------------------------------

@pytest.mark.slow
def test_bad_input_is_named(tmp_path, tokenizer, diffusion):
    (tmp_path / "broken.pt").write_bytes(b"junk")
    for message, options in [("which tokenizer", ["--tokenizer", ""]),
                             ("no checkpoint at", ["--tokenizer", tmp_path]),
                             ("damaged", ["--tokenizer", tmp_path / "broken.pt"]),
                             ("endless", ["--cache-images", 0]),
                             ("not divisible by 1 processes x 3", ["--accumulate", 3]),
                             ("unknown preset", ["--preset", "sit-xxl"]),
                             ("there is no dit.py", ["--add", "dit"]),
                             ("linear or cosine", ["--path", "straight"]),
                             ("cannot be divided", ["--heads", 3]),
                             ("of another run", ["--depth", 3, "--out", diffusion])]:
        with pytest.raises(UserError, match=message) as e:
            train(tmp_path / "run", tokenizer, *options)
        assert "\n" not in str(e.value)
    for message, options in [("not a diffusion model", ["--ckpt", tokenizer]),
                             ("must lie in 0..9", ["--classes", 10]),
                             ("LOW HIGH", ["--cfg-interval", "0.5", "0.2"]),
                             ("invalid choice", ["--sampler", "ddim"]),
                             ("--steps: must be a whole number from 1", ["--steps", 0])]:
        with pytest.raises(UserError, match=message):
            draw(diffusion, *options, "--out", tmp_path / "x.png")
    process = run("sample.py", "--ckpt", tmp_path / "nowhere")
    assert process.returncode == 2 and process.stderr.count("\n") == 1


def test_debris_of_killed_processes_goes_at_the_next_start(tmp_path, tokenizer):
    run_folder, samples = tmp_path / "run", tmp_path / "s.npz"
    debris = [run_folder / ".step_0000005.pt.9.tmp", run_folder / ".config.json.9.tmp",
              run_folder / "latents" / ".latents_00000.npy.9.tmp",
              tmp_path / "s.npz.parts" / ".0000000.npy.9.tmp"]
    for path in debris:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half of it")
    train(run_folder, tokenizer, "--steps", 2)
    sample.main(["--ckpt", str(run_folder), "--num", "4", "--steps", "2", "--out", str(samples), "--device",
                 "cpu"])
    assert not any(path.exists() for path in debris)
    assert samples.exists() and not (tmp_path / "s.npz.parts").exists()
