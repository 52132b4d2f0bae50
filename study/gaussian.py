"""Loss and samples of a model that knows only mean and covariance of the latents.          [ours; Fig. 2b]

    python evaluate.py gaussian RUN      RUN of train_diffusion.py

Of all functions that are affine in the state x_t = (1 - t) x + t eps, one predicts the velocity eps - x best.
If the latents have one Gaussian distribution, no function does better. Its loss follows from the covariance
alone, so it says how much of a diffusion loss comes from the latents' spread over directions, which differs
between tokenizers. Samples are drawn with it as with a SiT, by the same sampler and with the same step errors
(25 Euler steps reach only part of the smallest variances), so only the model differs.
"""
import dataclasses
import math

from common import Count, UserError, number, split_names    # before torch, see runtime/processes.py

import numpy as np
import torch
from torch import nn

import checkpoints
from cache import posterior_rngs
from data import to_float
from flow import SAMPLERS, guided_velocity, time_grid
from measures.features import Report, open_run, score
from measures.image_sets import batches, data_of, gather, open_data, run_folder

USES = ("data", "features", "reference", "samples")
PAGE = {
    "page": ["What one Gaussian explains", "ours; Fig. 2b",
             "Distances of samples drawn with the velocity of a Gaussian of the latents. The diffusion "
             "model's null class (evaluate.py curve --null-class) is closer by what it learned beyond that."],
    "meanings": {
        "gaussian_loss":
            "Velocity loss of the best affine prediction: it knows only mean and covariance of the latents.",
        "diffusion_loss":
            "Velocity loss at the end of training. Where it is below the line above, the model knows more "
            "than mean and covariance (it is also told the class); alone it does not compare across "
            "tokenizers. [Fig. 2b]"}}


class GaussianVelocity(nn.Module):
    """The best affine prediction of the velocity on the linear path, called and sampled as a SiT is.

    Along an eigenvector of the covariance with eigenvalue l, x_t has the variance (1 - t)^2 l + t^2 and the
    covariance t - (1 - t) l with the velocity, whose variance is 1 + l. The best prediction leaves a variance
    of l / ((1 - t)^2 l + t^2); with u = t / (1 - t) its mean over uniform t is the integral of l / (l + u^2)
    over u > 0, which is pi/2 sqrt(l).

    latents: (n, L, C) float, those that the diffusion model is trained on; with n below about 20 L C the loss
    is biased downwards. config: that model's, a dataclass.
    loss: float, the mean squared error of a latent value's velocity over uniform times.
    """
    samplers = SAMPLERS

    def __init__(self, latents, config):
        super().__init__()
        self.config = dataclasses.replace(config, num_classes=0)
        x = latents.flatten(1).double()                                             # (n, d), d = L C
        values, axes = torch.linalg.eigh(torch.cov(x.T, correction=0))              # (d,), (d, d): columns
        values = values.clamp(min=0)
        self.loss = (math.pi / 2 * values.sqrt().mean()).item()
        # Parameters, because samplers take device and dtype from a model's parameters.
        for name, value in (("mean", x.mean(0)), ("values", values), ("axes", axes)):
            self.register_parameter(name, nn.Parameter(value.float(), requires_grad=False))

    def forward(self, x, t, y=None):
        """x_t (B, L, C), t (B,) -> velocity (B, L, C). y, labels, is ignored."""
        t = t[:, None]                                                              # (B, 1)
        with torch.autocast(x.device.type, enabled=False):
            z = (x.flatten(1) - (1 - t) * self.mean) @ self.axes                    # (B, d), along the axes
            z = z * (t - (1 - t) * self.values) / ((1 - t) ** 2 * self.values + t ** 2).clamp(min=1e-12)
            return (z @ self.axes.T - self.mean).reshape(x.shape)

    def velocity(self, y, cfg_scale=1.0, interval=(0.0, 1.0)):
        return guided_velocity(self, y, cfg_scale, interval)

    def times(self, steps, last=None):
        return time_grid(steps, last)


def add_arguments(add):
    """The options of this command. add: a parser's add_argument."""
    add("--latent-images", type=number(Count), default=20_000,
        help="training images whose latents the Gaussian is of (default 20000)")


def check_plain(state, path):
    """Refuse a run whose loss is not a mean over uniform times of a plain velocity. Raises UserError."""
    plain, config = dict(path="linear", times="uniform"), state["config"]
    other = [f"--{key} {config[key]}" for key, value in plain.items() if config.get(key, value) != value]
    other += [f"--add {name}" for name in split_names(config.get("add", ""))
              if name in ("guidance_free", "mean_flow", "time_shift")]
    if other and state.get("kind") == "diffusion":
        raise UserError(f"{path} was trained with {', '.join(other)}: a Gaussian's loss is known for plain "
                        "velocities at uniform times on the linear path")


@torch.no_grad()
def measure(args):
    """What one Gaussian of its latents explains of a diffusion run's loss and samples. [ours; Fig. 2b]

    The loss of the best affine velocity, and the distances of its samples. Losses are means over uniform
    times on the linear path. The run's is that of training, where the model is told the class; the Gaussian
    is not, and its samples have none: compare them with those of the null class (curve --null-class).
    """
    if args.add:
        raise UserError(f"--add {args.add} draws from the run's own model, a Gaussian's samples need none")
    state = checkpoints.load_checkpoint(args.run)
    check_plain(state, args.run)
    run = open_run(args, args.run, "no classes")
    images = open_data(args, data_of(args.data, run.config), "train", run.tokenizer.config.image_size,
                       args.latent_images)
    shape, encoded = (run.model.config.num_latents, run.model.config.latent_dim), []
    for indices, x in batches(images, args, "latents"):
        x = to_float(x.to(args.device))
        views = (x, x.flip(-1)) if run.config.get("flip", True) else (x,)         # what SiT was trained on
        encoded += [run.tokenizer.encode(view, normalize=True, rngs=posterior_rngs(
            run.tokenizer, indices, flipped)).cpu() for flipped, view in enumerate(views)]
    latents = gather(torch.cat(encoded) if encoded else torch.empty(0, *shape), args)
    if not latents.isfinite().all():
        raise UserError(f"the latents of {args.run} hold NaN or infinite values: its tokenizer has failed")
    affine = GaussianVelocity(latents, run.model.config).to(args.device)
    result = {"gaussian_loss": affine.loss}
    losses = [record["loss"] for record in checkpoints.read_metrics(run_folder(args.run))
              if "loss" in record and record["step"] <= state["step"]]
    if losses:
        result["diffusion_loss"] = float(np.mean(losses[-max(1, len(losses) // 10):]))
    result |= score(args, run._replace(model=affine), 1.0, (0.0, 1.0), "samples of the Gaussian")
    few = len(images.labels) < 20 * math.prod(shape)
    protocol = (f"a Gaussian of the latents of {len(images.labels)} training images of {images.name}; "
                + f"too few for {math.prod(shape)} values: its loss is biased downwards; " * few
                + f"diffusion_loss: mean over the last tenth of the run's records; {run.protocol}")
    return Report(result | {"protocol": protocol} | PAGE, [tuple(result), tuple(result.values())])
