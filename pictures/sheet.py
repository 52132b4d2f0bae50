"""The contact sheet of sample.py --report: the whole pipeline on one picture."""
import numpy as np
import torch

from runtime import files
from common import sample_rng
from data import build_dataset, some_images, to_float, to_uint8
from flow import sample_latents
from maetok import random_mask
from measures.image_sets import data_of
from pictures.draw import image_grid, mask_out


@torch.no_grad()
def save_sheet(path, model, tokenizer, config, args, columns=10):
    """Rows: test images, what the encoder sees of them in stage 1, their reconstructions; samples by class at
    several guidance scales from the same noise; and one trajectory, decoded at eight of its times.

    model, tokenizer, config: of image_sets.load_model. args: sample.py's. In the last row the decoder gets
    noisy latents, which it has not seen in training: it is an illustration, not a measurement.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size, P, device = tokenizer.config.image_size, tokenizer.config.patch_size, tokenizer.latent_mean.device
    dataset = build_dataset(data_of("", config), "test", size, config.get("data_root", "data"),
                            seed=config.get("seed", 0))
    images = to_float(next(some_images(dataset, columns))[0]).to(device)
    rngs = [sample_rng(args.seed, "report-mask", 0, i) for i in range(len(images))]
    mask = random_mask(rngs, (size // P) ** 2, 0.5, 0.5).to(device)
    rows = {"test images": images, "masked input\n(stage 1)": mask_out(images, mask, P),
            "reconstruction": tokenizer.reconstruct(images)}

    def draw(labels, scale, trajectory=None):
        return sample_latents(model, range(len(labels)), labels, args.seed, scale, args.cfg_interval,
                              args.sampler, args.steps, config["path"], trajectory)

    y = np.arange(columns) % max(1, model.config.num_classes)
    # Every row starts from the same noise: only guidance changes from row to row.
    for scale in (1.0, 2.0, 4.0) if model.config.num_classes else (1.0,):
        rows[f"samples by class\nguidance {scale:g}"] = tokenizer.decode(draw(y, scale), normalized=True)
    states = []                                                                        # of one trajectory
    draw(y[-1:], args.cfg, states)
    nearest = [min(states, key=lambda state: abs(state[0] - t))[1] for t in np.linspace(1, 0, 8)]
    rows["denoising,\nt from 1 to 0"] = torch.cat([tokenizer.decode(x, normalized=True) for x in nearest])
    files.write_png(path, image_grid([to_uint8(row) for row in rows.values()], list(rows)))
