"""A model whose output is read as the data.                                [after the paper: JiT, 2511.13720]

    python train_diffusion.py --add x_prediction --tokenizer RUN            # or lightningdit,x_prediction ...

    x_t = (1 - t) x + t eps,  v = eps - x   =>   v = (x_t - x) / t        data at t = 0, noise at t = 1

Data lie near a surface of few dimensions, noise and velocity fill all of them: a network that is narrow
beside its tokens can output the data but not the others. The loss is still the squared error of v, so
everything else (samplers, guidance, the losses of other extras) sees a velocity.
To remove it: delete this file.
"""
from common import UserError

# t is at least this in the division [JiT: 0.05]. JiT clips in the target too, so that below it v comes
# out short by t / 0.05; here the target is exact, and below it the output is x_t - 0.05 v, a little
# off the data. [ours]
CLIP = 0.05


def velocity_of_data(x_hat, x_t, t):
    """v (B, L, C) float32 from the model's x_hat and its input x_t, (B, L, C), at times t (B,);
    linear path."""
    return (x_t.float() - x_hat.float()) / t.float().clamp(min=CLIP)[:, None, None]


class AddToDiffusion:
    """See common.attach. For any of the three models."""

    class Config:
        def __post_init__(self):
            super().__post_init__()
            if getattr(self, "path", "linear") != "linear":                   # only a trainer's config has it
                raise UserError("--add x_prediction divides by t: it knows the linear path, not "
                                f"--path {self.path}")

    class Model:
        def forward(self, x, t, y, **more):
            return velocity_of_data(super().forward(x, t, y, **more), x, t)
