# %% [markdown]
# # From an image to a sample
#
# One pass through everything this repository does, on pictures of shapes, in a minute or two on a CPU. Read
# it beside the paper ([arXiv:2502.03444](https://arxiv.org/abs/2502.03444)); every function that is called
# here is short, and the assignments ask you to write many of them yourself.
#
# **image → patches → mask → HOG → latents → reconstruction → noise → velocity → sampling → guidance**
#
# The notebook is made from `course/walkthrough.py` by `python course/notebook.py`. Change it there.

# %%
# Where the code is: beside this notebook's folder. Where notebooks are hosted it is fetched; REPOSITORY is
# then the address of the repository that the notebook came from.
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""
HERE = next((folder for folder in (Path.cwd(), Path.cwd().parent, Path("maetok").resolve())
             if (folder / "maetok.py").exists()), None)
if HERE is None:
    assert REPOSITORY, "set REPOSITORY to the repository's address, https://..."
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "maetok"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "torch", "numpy", "pillow", "scipy",
                    "tqdm"],
                   check=True)                                   # what is installed already stays as it is
    HERE = Path("maetok").resolve()
sys.path.insert(0, str(HERE))

# %%
import numpy as np
import torch
from PIL import Image

import checkpoints
from data import build_dataset, some_images, to_float, to_uint8
from flow import LAST, euler_maruyama, guided_velocity, interpolate, sample_latents, time_grid
from hog import hog_features
from maetok import patchify, random_mask, unpatchify
from metrics import psnr
from pictures.draw import hog_picture, image_grid, mask_out
from sit import load_diffusion

torch.manual_seed(0)
torch.set_grad_enabled(False)                                    # nothing is trained here
model, tokenizer, config = load_diffusion(checkpoints.DEFAULT_MODEL)    # a small MAETok and a small SiT
c = tokenizer.config
print(f"{c.image_size} px, {c.patch_size}-px patches, {c.num_latents} latent tokens of "
      f"{c.latent_dim} channels")
print(f"tokenizer: {sum(p.numel() for p in tokenizer.parameters()) / 1e6:.1f} M parameters, "
      f"SiT: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M")


def show(rows, cell=64):
    """Rows of images in [-1, 1], {title: (n, 3, H, W)}, as one picture."""
    return image_grid([to_uint8(row) for row in rows.values()], list(rows), cell=cell)

# %% [markdown]
# ## Images and patches [Sec. 3.1]
#
# Ten classes of shapes. The tokenizer sees an image as patches: each becomes one token.

# %%
pixels, labels = next(some_images(build_dataset("shapes", "test", c.image_size), 8))
images = to_float(pixels)                                        # (8, 3, H, W) in [-1, 1]
P, rows = c.patch_size, c.image_size // c.patch_size
patches = patchify(images, P)                                    # (8, N, P*P*3)
print("images", tuple(images.shape), "-> patches", tuple(patches.shape))
apart = patches.reshape(8, rows, rows, P, P, 3)
apart = torch.nn.functional.pad(apart, (0, 0, 1, 1, 1, 1), value=1.0)       # a white line around every patch
apart = unpatchify(apart.reshape(8, rows * rows, -1), P + 2, (rows, rows))
show({"images": images, "patches": apart})

# %% [markdown]
# ## The mask [Sec. 3.2]
#
# While the encoder trains, 40 to 60 % of the patches are hidden from it: a learned token replaces them. Each
# image has its own mask, from its own random numbers.

# %%
rngs = [np.random.default_rng([0, i]) for i in range(8)]
mask = random_mask(rngs, rows * rows, 0.4, 0.6)                  # (8, N), True = hidden
print("hidden patches of", rows * rows, "in each image:", mask.sum(1).tolist())
show({"images": images, "what the\nencoder sees": mask_out(images, mask, P)})

# %% [markdown]
# ## The target: histograms of oriented gradients
#
# From the latents alone, small auxiliary decoders must predict features of the *hidden* patches [Eq. 7, 8].
# HOG is the target that needs no other network: for each cell of 8 x 8 pixels, how strongly edges run in each
# of 9 directions.

# %%
cell = min(8, P)
features = hog_features(images, P, cell)                         # (8, N, D)
print("HOG", tuple(features.shape), f"values from {features.min():.2f} to {features.max():.2f}")
strokes = [hog_picture(f, (rows, rows), P, cell, pixels_per_cell=24) for f in features]
image_grid([to_uint8(images), [picture.resize((96, 96)) for picture in strokes]], ["images", "HOG"], cell=96)

# %% [markdown]
# ## Latents and reconstruction [Eq. 4, 5]
#
# The encoder reads patches and a few learnable tokens; its outputs at the learnable tokens' positions are the
# latents. A diffusion model needs latents of variance 1, hence `normalize=True`: one mean and one standard
# deviation for all of them.

# %%
z = tokenizer.encode(images, normalize=True)                     # (8, L, C)
print("latents", tuple(z.shape), f"mean {z.mean():.2f}, deviation {z.std():.2f};",
      f"{images[0].numel()} numbers become {z[0].numel()}")
reconstruction = tokenizer.decode(z, normalized=True)
from_masked = tokenizer.decode(tokenizer.encode(images, mask))
as_grey = ((z.clamp(-3, 3) + 3) * 42.5).to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(4, 2)
print("PSNR in dB:", [round(v, 1) for v in psnr(to_uint8(images), to_uint8(reconstruction)).tolist()])
as_pictures = [Image.fromarray(grey.numpy()).convert("RGB") for grey in as_grey]
titles = ["images", "reconstructions", "of masked images", "latents: rows are\ntokens, columns\nare channels"]
image_grid([*map(to_uint8, (images, reconstruction, from_masked)), as_pictures], titles, cell=96)

# %% [markdown]
# ## Noise [Sec. 4.1]
#
# Diffusion works on latents. A path leads from data at t = 0 to noise at t = 1: x_t = (1 - t) x + t eps. Its
# states are shown decoded. The decoder was not trained on noisy latents: look at the pictures, do not measure
# them.

# %%
noise, times = torch.randn_like(z[:1]), [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0]
path = [interpolate(z[:1], noise, torch.tensor([t]), config["path"]) for t in times]          # (x_t, v) each
show({"t = 0, 0.15 ... 1": torch.cat([tokenizer.decode(x, normalized=True) for x, _ in path])})

# %% [markdown]
# ## The velocity
#
# SiT is trained to predict v = dx_t/dt from x_t, t and the class. It cannot know which image and which noise
# made x_t, so its best prediction is the mean, E[v | x_t]. The table shows how far the prediction is from the
# velocity of this pair. The pictures show the image that the model expects, x_t - t v (on the linear path).

# %%
names = config["classes"] or [str(k) for k in range(model.config.num_classes)]
print("class of the first image:", names[labels[0]])
print("   t   mean square of v   of the error")
expected = []
for t, (x, v) in zip(times, path):
    found = model(x, torch.tensor([t]), labels[:1])
    expected.append(tokenizer.decode(x - t * found, normalized=True))
    print(f"{t:4.2f}   {v.square().mean():16.2f}   {(found - v).square().mean():12.2f}")
show({"x_t": torch.cat([tokenizer.decode(x, normalized=True) for x, _ in path]),
      "the image\nexpected at t": torch.cat(expected)})

# %% [markdown]
# ## Sampling [Table 8]
#
# Start from noise and follow the velocity down to t = 0. Euler-Maruyama adds a little new noise in every step
# except the last. From the same start each class gives another image.

# %%
start = torch.randn(1, *z.shape[1:]).expand(model.config.num_classes, -1, -1)
y, states = torch.arange(len(start)), []
velocity = guided_velocity(model, y, cfg_scale=2.0)
samples = euler_maruyama(lambda x, t: states.append(x.float()) or velocity(x, t), start,
                         time_grid(50, LAST), path=config["path"])
steps = [states[i] for i in (0, 10, 20, 30, 35, 40, 45)] + [samples]
show({f"class {names[k]}": torch.cat([tokenizer.decode(x[k:k + 1], normalized=True) for x in steps])
      for k in (0, 3, 6)})

# %% [markdown]
# ## A grid by class
#
# Ten samples per row, one class per column; each starts from different noise.

# %%
def draw(labels, scale, seed=0, interval=(0.0, 1.0), steps=50):
    """One image for each label, (n, 3, H, W) in [-1, 1], guided by `scale` at the times of `interval`."""
    latents = sample_latents(model, range(len(labels)), labels, seed, scale, interval, steps=steps,
                             path=config["path"])
    return tokenizer.decode(latents, normalized=True)


classes = np.arange(model.config.num_classes)
print("columns:", ", ".join(names))
show({f"seed {seed}": draw(classes, 2.0, seed) for seed in range(4)})

# %% [markdown]
# ## Guidance [App. C.2]
#
# u + s (c - u): from the velocity without a class, u, past the one with it, c. Scale 1 is the model without
# guidance. A larger scale makes classes clearer and samples more similar; guidance only below some t keeps
# more variety.

# %%
show({f"scale {scale:g}": draw(classes, scale) for scale in (1.0, 2.0, 4.0, 8.0)}
     | {"scale 4, t < 0.5": draw(classes, 4.0, interval=(0.0, 0.5))})

# %% [markdown]
# How good are these? `python evaluate.py generation` measures Fréchet distance, precision and recall;
# assignment A4 asks what such numbers say, and what they do not.
