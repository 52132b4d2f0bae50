"""A model whose output is read as the data.                                [after the paper: JiT, 2511.13720]

    x_t = (1 - t) x + t eps,  v = eps - x   =>   v = (x_t - x) / t        data at t = 0, noise at t = 1

Data lie near a surface of few dimensions, noise and velocity fill all of them: a network that is narrow
beside its tokens can output the first and not the others. The loss stays the squared error of v, so
everything downstream (samplers, guidance, the losses of the variants) sees a velocity as ever.
To remove it: this file, the field `x_prediction`, and the lines with that name.
"""

# t is at least this in the division [JiT: 0.05]. JiT clips in the target too, so that below it v comes
# out short by t / 0.05; here the target is exact, and below it the output is x_t - 0.05 v, a little
# off the data. [ours]
CLIP = 0.05


def velocity_of_data(x_hat, x_t, t):
    """v (B, L, C) float32 from the model's x_hat and its input x_t, (B, L, C), at times t (B,);
    linear path."""
    return (x_t.float() - x_hat.float()) / t.float().clamp(min=CLIP)[:, None, None]
