"""Draw images from a trained diffusion model.                                   [Sec. 4.1, Table 8, App. C.2]

    python sample.py                                    # the small model in assets/: a grid, 8 of each class
    python sample.py --ckpt runs/diffusion-shapes --out samples.png                  # a grid, 8 of each class
    python sample.py --ckpt RUN --cfg 1.9 --cfg-interval 0 0.75 --out samples.npz    # the paper's, 256 px
    torchrun --nproc-per-node=8 sample.py --ckpt RUN --num-images 50000 --out fid.npz      # for FID

The checkpoint contains its tokenizer; nothing else is needed. Sample i depends on (seed, i) alone, not on the
batch size or the number of processes (to rounding). The same command resumes.
"""
import argparse
import json
import os
import shutil
from pathlib import Path

import common    # before torch, see runtime/processes.py

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
from runtime import files
from common import Count, Seed, Share, UserError, Weight, Whole, number
from data import to_uint8
from flow import SAMPLERS, check_guidance, choose_labels, sample_latents
from measures.image_sets import add_extras, load_model
from pictures.outputs import check_outputs, kind_of, write_outputs
from pictures.page import write_report
from pictures.sheet import save_sheet
from runtime.processes import autocast, autocast_dtype, barrier, cast_matrices, run, start_processes


def parse(argv):
    """The options."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", help="run folder or checkpoint of train_diffusion.py (default: the small model in assets/)")
    add("--out", nargs="+", default=["samples.png"], help="any of: FILE.png a grid (16 a class at most), "
        "FILE.npz in ADM's layout, FOLDER of PNG files (default samples.png)")
    add("--report", help="instead of --out, write a contact sheet of the whole pipeline to this PNG file, "
        "and report.html beside it")
    # Two names: torchrun takes a script's --num for an abbreviation of its own --numa-binding.
    add("--num", "--num-images", type=number(Whole), default=0,
        help="images in total (default: 8 of each class, 64 without classes)")
    add("--classes", type=lambda text: text if text == "null" else number(Whole)(text), nargs="+",
        metavar="CLASS", help="class numbers (default: all), or null: without a class [Table 5]")
    add("--labels", choices=("balanced", "random"), default="balanced",
        help="balanced lowers FID by about 0.1 against random")
    add("--cfg", type=number(Weight), help="guidance scale; paper: 1.9 at 256 px, 1.5 at 512 px [App. C.2] "
        "(default 1: off; for models in assets/ 2)")
    add("--cfg-interval", type=number(Share), nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 1.0),
        help="times at which it acts, noise at 1; paper: 0 0.75 at 256 px, 0 0.7 at 512 px (default 0 1)")
    add("--sampler", choices=SAMPLERS, help="(default euler-maruyama [Table 8]; models in assets/: heun)")
    add("--steps", type=number(Count), help="(default 250 [Table 8]; models in assets/: 8; heun calls "
        "the model twice per step)")
    add("--seed", type=number(Seed), default=0, help="of all noise and of random labels")
    add("--batch-size", type=number(Count), default=50, help="images at a time in each process (default 50)")
    add("--compile", action="store_true",
        help="torch.compile the diffusion model, which takes a minute at the start; for many images")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", help="autocast: auto (bfloat16 where fast), float32, bfloat16")
    add_extras(parser, argv)
    args = parser.parse_args(argv)
    if args.report and (args.num or args.classes):
        raise UserError("--report shows classes of its own choice: leave out --num and --classes")
    check_outputs(args.out, args.report)
    return args


def load(args, device):
    """(model, tokenizer, config) of --ckpt. Sets the options whose default depends on it."""
    null = args.classes == ["null"]
    args.ckpt = args.ckpt or str(checkpoints.DEFAULT_MODEL)
    small = Path(args.ckpt).resolve().parent == checkpoints.DEFAULT_MODEL.parent                # in assets/
    if args.cfg is None:
        args.cfg = 2.0 if small and not null else 1.0
    args.steps = args.steps or (8 if small else 250)
    args.sampler = args.sampler or ("heun" if small else "euler-maruyama")
    model, tokenizer, config = load_model(args.ckpt, args, device)
    check_guidance(model, args.cfg, args.cfg_interval)
    if null and args.cfg != 1 and not args.add:
        raise UserError("--classes null: guidance leads away from the null class itself; give --cfg 1")
    dtype = autocast_dtype(args.dtype, device, model.config.width)
    args.dtype = str(dtype).removeprefix("torch.")                               # what it is, for settings
    classes = model.config.num_classes
    args.num = args.num or (8 * len(args.classes or range(classes)) if classes and not null else 64)
    return model, tokenizer, config


# -------------------------------------------------- parts --------------------------------------------------
# Batches go to part files, so that an interrupted run can be resumed. Sample i has its own noise: it does not
# matter which process draws it, or when. settings.json, with a hash of the weights, says what the parts are.

def parts_folder(args, models, processes):
    """The folder of the part files, locked. Raises UserError if it, or a folder of --out, holds anything else
    than these samples, complete or begun."""
    outs = [Path(out) for out in args.out]
    folder = outs[0].with_name(outs[0].name + ".parts")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "report", "added_options")}
    settings = json.loads(json.dumps(settings | {"weights": common.fingerprint(models)}))    # tuples to lists
    if processes.rank == 0:
        for out in outs:
            notes = [n for n in (Path(f"{out}.settings.json"), folder / "settings.json") if n.exists()]
            if (not kind_of(out) and out.is_dir() and any(out.iterdir())
                    and settings not in [files.read_json(note) for note in notes]):
                raise UserError(f"{out} holds files already, and these samples would mix with them; "
                                "delete it or choose another --out")
        files.lock(folder)
        files.remove_debris(folder)
        if not (folder / "settings.json").exists():
            files.write_json(folder / "settings.json", settings)
    barrier()
    if files.read_json(folder / "settings.json") != settings:
        raise UserError(f"{folder} holds unfinished samples made with other settings; "
                        "delete it or choose another --out")
    return folder


@torch.no_grad()
def draw_parts(args, model, tokenizer, config, labels, folder, processes):
    """Draw what is not there yet of this process's parts. Returns the part files of all processes."""
    rank, world, device = processes
    starts = range(0, len(labels), args.batch_size)
    parts = [folder / f"{start:07d}.npy" for start in starts]
    mine = [(start, part) for start, part in list(zip(starts, parts))[rank::world]
            if files.load_npy(part) is None]                          # a damaged one is drawn again
    with tqdm(total=sum(min(args.batch_size, len(labels) - start) for start, _ in mine), unit="img",
              desc="sampling" if world == 1 else "sampling, rank 0", disable=rank > 0) as bar:
        for start, part in mine:
            indices = np.arange(start, min(start + args.batch_size, len(labels)))
            with autocast(args.dtype, device):
                # From noise to latents of unit variance. The decoder undoes the normalisation with the
                # tokenizer's own mean and deviation; its output is rounded to 256 levels.
                z = sample_latents(model, indices, labels[indices], args.seed, args.cfg, args.cfg_interval,
                                   args.sampler, args.steps, config["path"])
                images = to_uint8(tokenizer.decode(z, normalized=True)).permute(0, 2, 3, 1).cpu().numpy()
            files.atomic_write(part, lambda p: files.save_npy(p, images))
            bar.update(len(indices))
    barrier()
    return parts


def finish(outs, parts, folder):
    """Every output is on disk: delete the parts. settings.json stays beside the samples, for evaluate.py."""
    for part in parts:
        part.unlink()
    for out in outs[1:]:
        shutil.copyfile(folder / "settings.json", f"{out}.settings.json")
    os.replace(folder / "settings.json", f"{outs[0]}.settings.json")
    files.unlock(folder)
    folder.rmdir()


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    args = parse(argv)
    rank, world, device = processes = start_processes(args.device)
    model, tokenizer, config = load(args, device)
    if args.report:
        if rank == 0:
            save_sheet(Path(args.report), model, tokenizer, config, args)
            print(f"wrote {args.report} and {write_report(Path(args.report).parent, args.report)}")
        return
    num_classes = model.config.num_classes
    labels = choose_labels(args.num, args.classes, num_classes, args.labels, args.seed)
    folder = parts_folder(args, torch.nn.ModuleList((model, tokenizer)), processes)
    for part in (model, tokenizer):
        cast_matrices(part, autocast_dtype(args.dtype, device))
    if args.compile:
        model.compile()
    parts = draw_parts(args, model, tokenizer, config, labels, folder, processes)
    if rank == 0:
        outs = [Path(out) for out in args.out]
        write_outputs(outs, parts, np.where(labels < num_classes, labels, -1), config.get("classes", []))
        finish(outs, parts, folder)


if __name__ == "__main__":
    run(main)
