"""Autoguidance: guide away from a weaker model instead of from the null class.
                                              [rebuttal: a checkpoint of 1 M of 4 M steps; Karras et al. 2024]

    python sample.py --ckpt RUN --add autoguidance --guide-ckpt RUN/step_0000750.pt --cfg 1.5

    g + cfg_scale (c - g)        c, g: the velocities of model and guide, with the same labels

The guide errs where the model errs, but more. So the difference points from worse to better, and samples keep
their variety. The guide is a weaker model of the same latents, such as an earlier checkpoint. A model without
classes can be guided, too. --cfg-interval says at which times.
To remove it: delete this file.
"""
import functools

import common    # before torch, see runtime/processes.py

from common import UserError
from flow import SAMPLERS, call, inside
from sit import load_diffusion


def load_guide(path, model, tokenizer, config, device):
    """The guide, which must share latents, path and classes with `model`. Raises UserError."""
    guide, its_tokenizer, its_config = load_diffusion(path, device)
    if common.fingerprint(its_tokenizer.encoder) != common.fingerprint(tokenizer.encoder):
        raise UserError(f"--guide-ckpt {path} was trained on another tokenizer's latents")
    for what, its, ours in (("classes", guide.config.num_classes, model.config.num_classes),
                            ("path", its_config["path"], config["path"])):
        if its != ours:
            raise UserError(f"--guide-ckpt {path}: {what} {its}, the model's {ours}; they must agree")
    return guide


def autoguided_velocity(model, guide, y, cfg_scale=1.0, interval=(0.0, 1.0)):
    """A sampler's velocity, as flow.guided_velocity; y: labels (B,)."""
    def velocity(x, t):
        c = call(model, x, t, y)
        if cfg_scale == 1 or not inside(t, interval):
            return c
        g = call(guide, x, t, y)
        return g + cfg_scale * (c - g)

    return velocity


class AddToSampler:
    """See sample.py."""

    @staticmethod
    def add_arguments(add):
        add("--guide-ckpt", required=True, metavar="RUN",
            help="guide away from this weaker model of the same latents, such as an earlier checkpoint")

    @staticmethod
    def wrap(model, tokenizer, config, args):
        """`model` with another velocity. The guide becomes a part of it, for fingerprints and casts."""
        if hasattr(model, "beta_embedder"):
            raise UserError("--add autoguidance: a model of guidance-free training is guided without a guide")
        device = next(model.parameters()).device
        model.guide = load_guide(args.guide_ckpt, model, tokenizer, config, device)
        model.velocity = functools.partial(autoguided_velocity, model, model.guide)
        model.samplers = SAMPLERS                         # no average velocities: both models give those at t
        return model
