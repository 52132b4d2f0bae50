"""Measured while a tokenizer trains, PSNR, Eq. 8 on test images, the latents' mean and deviation; drawn."""
import math

from common import step_rngs    # before torch, see runtime/processes.py

import torch

from data import some_images, to_float, to_uint8
from maetok import random_mask
from metrics import psnr
from pictures.draw import hog_picture, image_grid, mask_out
from runtime import files

EVAL_IMAGES, LATENT_IMAGES = 1000, 10_000       # test images for PSNR; training images for mean and deviation


def eval_batch(config):
    """Images per forward pass outside training: no more than a training step of one process can hold."""
    return max(1, min(64, config.batch_size // config.accumulate))


def few(config, count):
    """`count`, or what training has seen if that is less: a trial run of some steps then ends in seconds."""
    return min(count, config.steps * config.batch_size)


def half_hidden(config, num_patches, first, count):
    """Masks (count, N) of the test images from number `first` on: half of the patches hidden, always the
    same; nothing hidden for a plain AE."""
    ratio, rngs = 0.5 * (config.mask_high > 0), step_rngs(config, "eval-mask", 0, range(first, first + count))
    return random_mask(rngs, num_patches, ratio, ratio)


@torch.inference_mode()
def test_numbers(method, model, dataset):
    """Numbers on test images: {"psnr": dB, of unmasked images, "images": how many} and, while there are
    auxiliary decoders, for each target "NAME_loss", Eq. 8 with half of the patches hidden, and
    "NAME_constant", the same loss of the best constant prediction."""
    config, psnrs, found = method.config, [], {name: ([], [], []) for name in model.aux_decoders}
    for images, _, *more in some_images(dataset, few(config, EVAL_IMAGES), batch_size=eval_batch(config)):
        images = to_float(images).to(method.device)
        mask = half_hidden(config, math.prod(model.grid(images.shape[-2:])), len(psnrs), len(images))
        mask = mask.to(method.device)
        psnrs += psnr(to_uint8(images).cpu(), to_uint8(model.reconstruct(images)).cpu()).tolist()
        output, loss_mask = model(images, mask), mask if mask.any() else ~mask
        for name, (losses, targets, masks) in found.items():
            y = method.targets[name].features(images, *more)
            losses.append(method.targets[name].loss(output.aux[name], y, loss_mask).item() * len(images))
            targets.append(y)
            masks.append(loss_mask)
    result = {"psnr": sum(psnrs) / len(psnrs), "images": len(psnrs)}
    for name, (losses, targets, masks) in found.items():
        result[f"{name}_loss"] = sum(losses) / len(psnrs)
        result[f"{name}_constant"] = method.targets[name].constant_loss(targets, masks).item()
    return result


@torch.inference_mode()
def measure_latents(config, model, dataset, device):
    """Set the model's latent_mean and latent_std, one scalar each, over clean training images; of a KL-VAE,
    of samples of its posteriors, by whose variance their square is larger than the mean's."""
    n, total, squares = 0, 0.0, 0.0
    for images, *_ in some_images(dataset, few(config, LATENT_IMAGES), batch_size=eval_batch(config)):
        h, posterior = model.latents(to_float(images).to(device))
        h = h.cpu().double()
        n, total, squares = n + h.numel(), total + h.sum().item(), squares + h.square().sum().item()
        if posterior is not None:
            squares += posterior.chunk(2, dim=-1)[1].cpu().double().exp().sum().item()
    model.latent_mean.fill_(total / n)
    model.latent_std.fill_(math.sqrt(max(squares / n - (total / n) ** 2, 1e-12)))


@torch.inference_mode()
def training_grid(method, stage, model, dataset, path):
    """A PNG of what a tokenizer in training makes of eight images of `dataset`: the input, what the encoder
    sees of it with half of the patches hidden, reconstructions, and HOG features, true and predicted. Rows
    that the stage or the run does not have are left out. method, stage: train_tokenizer's."""
    images = to_float(next(some_images(dataset, 8))[0]).to(method.device)
    grid, P, mask, rows = model.grid(images.shape[-2:]), model.config.patch_size, None, {"input": images}
    if stage.number == 1 and method.config.mask_high > 0:
        mask = half_hidden(method.config, math.prod(grid), 0, len(images)).to(method.device)
    output = model(images, mask)
    if mask is not None:
        rows["masked input"] = mask_out(images, mask, P)
        rows["reconstruction\nof the masked input"] = output.reconstruction
    rows["reconstruction"] = model.reconstruct(images)
    rows = {title: to_uint8(row) for title, row in rows.items()}
    if "hog" in model.aux_decoders:
        target, cell = method.targets["hog"], max(8, 96 // (images.shape[-1] // method.config.hog_cell))
        both = {"HOG target": target.features(images), "HOG predicted": output.aux["hog"]}
        for title, features in both.items():
            rows[title] = [hog_picture(f, grid, P, target.cell_size, pixels_per_cell=cell) for f in features]
    files.write_png(path, image_grid(list(rows.values()), list(rows)))
