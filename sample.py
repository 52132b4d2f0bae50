"""Draw images from a trained diffusion model.                                   [Sec. 4.1, Table 8, App. C.2]

    python sample.py                                    # the small model in assets/: a grid, 8 of each class
    python sample.py --ckpt runs/diffusion-shapes --out samples.png                  # a grid, 8 of each class
    python sample.py --ckpt RUN --cfg 1.9 --cfg-interval 0 0.75 --out samples.npz    # the paper's, 256 px
    python sample.py --ckpt RUN --guide-ckpt RUN/step_0000750.pt --cfg 1.5           # autoguidance
    python sample.py --released 256 --classes 207 360 --num 8                        # the authors' weights
    torchrun --nproc-per-node=8 sample.py --ckpt RUN --num-images 50000 --out fid.npz      # for FID

The checkpoint knows its tokenizer; nothing else is needed. Sample i depends on (seed, i) alone, not on the
batch size or the number of processes (to rounding). The same command resumes.
"""
import argparse
import contextlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import common    # before torch, see there

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import checkpoints
from after.time_shift import shift_of
from common import Count, Positive, Seed, Share, UserError, Weight, Whole, sample_rng
from data import build_dataset, some_images, to_float, to_uint8
from flow import SAMPLERS, check_guidance, choose_labels, sample_latents, sampling_times
from maetok import mask_out, random_mask
from pictures.draw import image_grid
from pictures.page import write_report
from variants.released import RELEASED, find_released, load_released_sit, load_released_tokenizer, noise_share
from sit import load_diffusion, load_guide


def class_number(text):
    """A class for --classes: "null" or a number."""
    return text if text == "null" else Whole(text)


def whole_part(path):
    """The images of a finished part, uint8 (n, H, W, 3). Raises UserError."""
    part = checkpoints.load_npy(path)
    if part is None:
        raise UserError(f"{path} is damaged; run the same command again")
    return part


def write_npz(path, parts, labels):
    """ADM's sample file: arr_0 uint8 (n, H, W, 3), arr_1 int64 labels, streamed from the part files,
    never all in memory."""
    def write(temporary):
        first = whole_part(parts[0])
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as entry:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape[1:])}
                np.lib.format.write_array_header_1_0(entry, header)
                for part in parts:
                    entry.write(whole_part(part).tobytes())
            with file.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, labels)
    checkpoints.atomic_write(path, write)


def check_outputs(outs, parts, settings):
    """Refuse a folder that holds anything but these very samples, whole or,
    while their `parts` are there, begun.
    Raises UserError."""
    for out in outs:
        if out.suffix in (".npz", ".png") or not out.is_dir() or not any(out.iterdir()):
            continue
        notes = [note for note in (Path(f"{out}.settings.json"), parts / "settings.json") if note.exists()]
        if settings not in [checkpoints.read_json(note) for note in notes]:
            raise UserError(f"{out} holds files already, and these samples would mix with them; delete it or "
                            "choose another --out")


def write_outputs(outs, parts, labels, size, names):
    """Turn the finished part files into what --out asks for, by its ending: .png a grid, .npz ADM's file,
    else a folder. names: of the classes, where they are known."""
    for out in outs:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".npz":
            write_npz(out, parts, labels)
        elif out.suffix == ".png":
            order = np.argsort(labels, kind="stable")
            rows = max(1, len(np.unique(labels)))
            columns = min(16, -(-len(labels) // rows))
            images = np.concatenate([whole_part(part) for part in parts])
            tiles = [[Image.fromarray(images[i]) for i in order if labels[i] == label][:columns]
                     for label in np.unique(labels)]
            titles = [names[label] if 0 <= label < len(names) else str(label) for label in np.unique(labels)]
            sheet = image_grid(tiles, titles, cell=min(96, 3 * size),
                               title_width=16 + 8 * max(map(len, titles)))
            checkpoints.write_png(out, sheet)
        else:
            out.mkdir(exist_ok=True)
            number = 0
            for part in parts:
                for image in whole_part(part):
                    Image.fromarray(image).save(out / f"{number:06d}_class{labels[number]}.png")
                    number += 1
        print(f"wrote {out}")


def save_report(path, model, tokenizer, config, args, device, columns=10):
    """A contact sheet of the whole pipeline: test images, what the encoder sees of them, their
    reconstructions; samples by class at several guidance scales from the same noise; and a strip of one
    trajectory, decoded at 8 of its times.

    At the noisy end the decoder is shown what it never met in training: a strip is a picture,
    not a measurement."""
    size, P = tokenizer.config.image_size, tokenizer.config.patch_size
    dataset = build_dataset(config["data"], "test", size, config["data_root"], seed=config["seed"])
    images = to_float(next(some_images(dataset, columns))[0]).to(device)
    rngs = [sample_rng(args.seed, "report-mask", 0, i) for i in range(len(images))]
    mask = random_mask(rngs, (size // P) ** 2, 0.5, 0.5).to(device)
    rows = {"test images": images, "masked input\n(stage 1)": mask_out(images, mask, P),
            "reconstruction": tokenizer.reconstruct(images)}
    y = np.arange(columns) % max(1, model.config.num_classes)
    draw = lambda labels, scale, **kw: sample_latents(model, range(len(labels)), labels, args.seed, scale,
                                                      args.cfg_interval, args.sampler, args.steps,
                                                      config["path"], shift=args.time_shift, **kw)
    # The same noise in every row: what changes from row to row is guidance alone.
    for scale in (1.0, 2.0, 4.0) if model.config.num_classes else (1.0,):
        rows[f"samples by class\nguidance {scale:g}"] = tokenizer.decode(draw(y, scale), normalized=True)
    # Every state of one trajectory, of which the eight nearest to evenly spaced times are decoded.
    states = []
    draw(y[-1:], args.cfg, trajectory=states)
    chosen = [min(states, key=lambda state: abs(state[0] - t)) for t in np.linspace(1, 0, 8)]
    rows["denoising, t =\n1, 6/7, ... 0"] = torch.cat([tokenizer.decode(x, normalized=True)
                                                       for _, x in chosen])
    sheet = image_grid([to_uint8(row) for row in rows.values()], list(rows))
    checkpoints.write_png(path, sheet)


def guidance_cost(args, guide):
    """A line that says how many of the steps need a second velocity: those whose time is in the interval."""
    times = sampling_times(args.sampler, args.steps, args.time_shift)
    inside = sum(args.cfg_interval[0] - 1e-6 <= t <= args.cfg_interval[1] + 1e-6 for t in times)
    return (f"guidance {args.cfg:g} in [{args.cfg_interval[0]:g}, {args.cfg_interval[1]:g}]: "
            f"{'the guide' if guide else 'the null class'} is computed in {inside} of {len(times)} calls, "
            f"which saves {(len(times) - inside) / (2 * len(times)):.0%} of the work of guiding them all")


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", help="run folder or checkpoint of train_diffusion.py (default: the small model in assets/)")
    add("--released", type=int, choices=tuple(RELEASED),
        help="instead of --ckpt: the authors' tokenizer and SiT-XL for this image size, with the paper's "
        "protocol where no option says otherwise")
    add("--weights-dir", default="",
        help="folder of the released files; else torch hub's cache, else download")
    add("--path", choices=("linear", "cosine"),
        help="with --released: the path that SiT was trained on, which is not published (default linear)")
    add("--guide-ckpt", help="autoguidance: guide away from this worse model of the same latents, an earlier "
        "checkpoint for instance, instead of from the null class")
    add("--out", nargs="+", default=["samples.png"],
        help="any of: FILE.png a grid (16 a class at most), FILE.npz in ADM's "
        "layout, FOLDER of PNG files (default samples.png)")
    add("--report", help="instead of --out, write a contact sheet of the whole pipeline to this PNG file, "
        "and report.html beside it")
    # Two names: torchrun takes a script's --num for an abbreviation of its own --numa-binding.
    add("--num", "--num-images", type=Whole, default=0,
        help="images in all (default: 8 of each class, 64 without classes)")
    add("--classes", type=class_number, nargs="+", metavar="CLASS",
        help="class numbers (default: all), or null: without a class [Table 5]")
    add("--labels", choices=("balanced", "random"), default="balanced",
        help="balanced lowers FID by about 0.1 against random")
    add("--cfg", type=Weight,
        help="guidance scale; paper: 1.9 at 256 px, 1.5 at 512 px [App. C.2] (default 1: off; for the model "
        "in assets/ 2; with --released the paper's)")
    add("--cfg-interval", type=Share, nargs=2, metavar=("LOW", "HIGH"),
        help="times, noise at 1, at which "
        "guidance acts; paper: 0 0.75 at 256 px, 0 0.7 at 512 px (default 0 1; with --released the paper's)")
    add("--sampler", choices=SAMPLERS, help="[Table 8] Euler-Maruyama, the default")
    add("--steps", type=Count, help="[Table 8] (default 250; for the model in assets/ 50; heun calls the "
        "model twice a step)")
    add("--time-shift", type=Positive, help="of the sampler's times, see after/time_shift.py; LightningDiT: "
        "3.33 (default: as the model was trained)")
    add("--seed", type=Seed, default=0, help="of all noise and of random labels")
    add("--batch-size", type=Count, default=50, help="images at a time in each process (default 50)")
    add("--compile", action="store_true",
        help="torch.compile the diffusion model, which takes a minute at the start; for many images")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", help="autocast: auto (bfloat16 on CUDA, else float32), float32, bfloat16")
    args = parser.parse_args(argv)
    rank, world, device = common.start_processes(args.device)
    dtype = common.autocast_dtype(args.dtype, device)
    if args.ckpt and args.released:
        raise UserError("which model? Give --ckpt RUN or --released 256 (or 512), not both")
    # An option that was not given is the paper's for the released weights, unguided for a run of one's own,
    # and what gives a good picture in a few seconds for the small model that comes with the code.
    null = args.classes == ["null"]
    protocol = RELEASED.get(args.released,
                            dict(cfg=1.0 if args.ckpt or null else 2.0, cfg_interval=(0.0, 1.0),
                                 sampler=SAMPLERS[0], steps=250 if args.ckpt else 50, path=None))
    if not args.released:
        args.ckpt = args.ckpt or str(checkpoints.BOX)
    for name in ("cfg", "cfg_interval", "sampler", "steps", "path"):
        if getattr(args, name) is None:
            setattr(args, name, protocol[name])
    if args.released:
        if args.report:
            raise UserError("--report shows a run's own data: it needs --ckpt")
        with common.rank_zero_first(rank, world):
            folders = [find_released(protocol[part], args.weights_dir) for part in ("sit", "tokenizer")]
        model, tokenizer = load_released_sit(folders[0], device), load_released_tokenizer(folders[1], device)
        config = {"path": args.path}
        if rank == 0:
            print(f"fraction of noise in the velocity at t = 1: {noise_share(model):.2f} (about 1 if SiT was "
                  "trained on the linear path, 0 if on the cosine path)", flush=True)
    else:
        if args.path:
            raise UserError("--path: a checkpoint of ours knows its path")
        model, tokenizer, config = load_diffusion(args.ckpt, device)
    guide = load_guide(args.guide_ckpt, model, tokenizer, config, device) if args.guide_ckpt else None
    check_guidance(model, args.cfg, guide)
    if null and args.cfg != 1 and guide is None:
        raise UserError("--classes null: guidance leads away from the null class itself; give --cfg 1")
    args.time_shift = args.time_shift or shift_of(model.config)
    num_classes = model.config.num_classes
    num = args.num or (8 * len(args.classes or range(num_classes)) if num_classes and not null else 64)
    if not args.cfg_interval[0] <= args.cfg_interval[1]:
        raise UserError("--cfg-interval LOW HIGH must satisfy LOW <= HIGH")
    if args.report:
        if rank == 0:
            Path(args.report).parent.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                save_report(Path(args.report), model, tokenizer, config, args, device)
            print(f"wrote {args.report} and {write_report(Path(args.report).parent, args.report)}")
        return
    labels = choose_labels(num, args.classes, num_classes, args.labels, args.seed)

    # ---- batches go to part files, which is what makes an interrupted run resumable ----
    # Sample i has its own noise, so it does not matter which process draws it, or when: a part that is there
    # stays, and settings.json, with a hash of the weights, says whose parts these are.
    outs = [Path(out) for out in args.out]
    if nameless := [out for out in args.out if not Path(out).name]:
        raise UserError(f"--out {nameless[0]!r} has no name: give FILE.png, FILE.npz or a folder")
    folder = outs[0].with_name(outs[0].name + ".parts")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device")} | {"num": num}
    settings["weights"] = common.fingerprint(model) + (common.fingerprint(guide) if guide else "")
    settings = json.loads(json.dumps(settings))                                             # tuples to lists
    if rank == 0:
        check_outputs(outs, folder, settings)
        checkpoints.lock(folder)
        checkpoints.remove_debris(folder)
        if not (folder / "settings.json").exists():
            checkpoints.write_json(folder / "settings.json", settings)
    if world > 1:
        dist.barrier()
    if checkpoints.read_json(folder / "settings.json") != settings:
        raise UserError(f"{folder} holds unfinished samples made with other settings; "
                        "delete it or choose another --out")
    for part in filter(None, (model, tokenizer, guide)):
        common.cast_matrices(part, dtype)
    if args.compile:
        model.compile()
    if rank == 0 and args.cfg != 1 and not model.config.guidance_free:
        print(guidance_cost(args, guide), flush=True)
    starts = range(0, num, args.batch_size)
    parts = [folder / f"{start:07d}.npy" for start in starts]
    mine = [(start, part) for start, part in list(zip(starts, parts))[rank::world]
            if checkpoints.load_npy(part) is None]                              # a damaged one is drawn again
    with tqdm(total=sum(min(args.batch_size, num - start) for start, _ in mine), unit="img",
              desc="sampling" if world == 1 else "sampling, rank 0", disable=rank > 0) as bar:
        for start, part in mine:
            indices = np.arange(start, min(start + args.batch_size, num))
            autocast = (torch.autocast(device.type, dtype) if dtype != torch.float32
                        else contextlib.nullcontext())
            with torch.no_grad(), autocast:
                # Noise to latents of unit variance; the decoder undoes the normalisation with the tokenizer's
                # own mean and deviation, and its output is rounded to 256 levels.
                z = sample_latents(model, indices, labels[indices], args.seed, args.cfg, args.cfg_interval,
                                   args.sampler, args.steps, config["path"], guide=guide,
                                   as_released=bool(args.released), shift=args.time_shift)
                images = to_uint8(tokenizer.decode(z, normalized=True)).permute(0, 2, 3, 1).cpu().numpy()
            checkpoints.atomic_write(part, lambda p: checkpoints.save_npy(p, images))
            bar.update(len(indices))
    if world > 1:
        dist.barrier()
    if rank == 0:
        write_outputs(outs, parts, np.where(labels < num_classes, labels, -1),
                      whole_part(parts[0]).shape[1], config.get("classes", []))
        # Only now, when every output is on disk, the parts may go.
        for part in parts:
            part.unlink()
        # How they were drawn stays beside the samples: evaluate.py prints it with what it measures.
        for out in outs[1:]:
            shutil.copyfile(folder / "settings.json", f"{out}.settings.json")
        os.replace(folder / "settings.json", f"{outs[0]}.settings.json")
        checkpoints.unlock(folder)
        folder.rmdir()


if __name__ == "__main__":
    common.run(main)
