"""Histograms of oriented gradients (HOG), target of the hidden patches.        [Sec. 3.2, Eq. 8, Table 1b]

The recipe is MaskFeat's (Wei et al. 2022), which the paper takes over:

    image --Sobel--> (gx, gy) --> magnitude, unsigned orientation --> 9 hard bins, Gaussian-weighted
          --sum over 8x8-px cells--> L2-normalise each cell's 9 bins --> gather the cells of each patch

It differs from scikit-image's `hog` in keeping the colour channels apart, smoothing the gradient with Sobel,
and normalising cell by cell instead of over overlapping blocks of cells.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_PIXELS = 4 * 256 * 256      # image pixels that hog_features takes at a time on a CPU


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by the kernel [[1,0,-1],[2,0,-2],[1,0,-1]] (gx) and its transpose (gy),
    reflect padding of 1 px.

    images: (B, C, H, W) float. Returns gx, gy, the same shape: gx is left minus right,
    gy is above minus below.
    """
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")                 # (B, 3, H+2, W+2)
    # Summed in the order of a convolution, row by row from the left. In another order a gradient that is
    # exactly zero becomes +-1e-8, whose sign decides the bin (0.3-0.6 % of cells). Slices are several times
    # faster here than a convolution of 3 channels.
    H, W = images.shape[-2:]
    s = lambda row, col: x[..., row:row + H, col:col + W]       # (B, 3, H, W): the pixel under a kernel entry
    gx = (s(0, 0) - s(0, 2)).add_(s(1, 0), alpha=2).sub_(s(1, 2), alpha=2).add_(s(2, 0)).sub_(s(2, 2))
    gy = (s(0, 0) + 2 * s(0, 1)).add_(s(0, 2)).sub_(s(2, 0)).sub_(s(2, 1), alpha=2).sub_(s(2, 2))
    return gx, gy


def gaussian_window(cell_size: int, device=None) -> Tensor:
    """(2*cell, 2*cell) float32 window of sigma = cell_size, sum 1: 16 x 16 with sigma 8 for the usual cell.
    [MaskFeat]"""
    size = 2 * cell_size
    i = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    w = torch.exp(-0.5 * (i / cell_size) ** 2)
    return torch.outer(w, w) / w.sum() ** 2


def hog_dim(patch_size: int, cell_size: int = 8, bins: int = 9) -> int:
    """Values per patch: 3 colours x bins x cells, 108 for a 16-px patch.
    Raises ValueError if cells do not fill the patch."""
    if cell_size < 1 or patch_size % cell_size:
        raise ValueError(f"HOG cells of {cell_size} px do not fill a patch of {patch_size} px")
    return 3 * bins * (patch_size // cell_size) ** 2


@torch.no_grad()
def hog_features(images: Tensor, patch_size: int, cell_size: int = 8, bins: int = 9) -> Tensor:
    """HOG of every patch, MaskFeat's recipe.

    images: (B, 3, H, W) float in [-1, 1], the model's own input. Each cell is normalised, so contrast and
    range cancel except for rounding: a gradient on the border of two bins may fall into the other one when
    the same image is given as 0..1 or 0..255, which changes a cell by up to 0.4 (48 ImageNet photos). Compare
    features only between images of one range. Computed in float32, also under autocast: bfloat16 puts
    gradients into wrong bins (rms error 0.019 of 0.333). Returns (B, N, D_hog) float32 in [0, 1]; a patch
    holds (colour, bin, cell row, cell column) in that order, and every cell has unit norm (0 where the image
    is flat). D_hog = hog_dim(...). Raises ValueError when patches do not tile the image or cells do not tile
    the patch.
    """
    B, _, H, W = images.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"an image of {H} x {W} px cannot be cut into {patch_size}-px patches")
    dim, c = hog_dim(patch_size, cell_size, bins), cell_size
    group = max(1, CPU_PIXELS // (H * W))
    if images.device.type == "cpu" and B > group:
        # Groups of images that fit the cache: one pass over 64 images of 256 px is 9 times slower than 16
        # passes over 4.
        return torch.cat([hog_features(part, patch_size, cell_size, bins) for part in images.split(group)])
    gx, gy = sobel(images.float())                                            # (B, 3, H, W)
    # In a flat area the six terms add up to as much as 1e-6, which normalising would enlarge to a full cell
    # (and does in the released code). The smallest step between two grey levels gives 0.008. [ours]
    magnitude = F.threshold_(torch.hypot(gx, gy), 1e-5, 0.0)
    # Orientation modulo 180 degrees; atan2(gx, gy) in this order: the angle from the vertical axis.
    orientation_bin = gx.atan2_(gy).div_(math.pi).mul_(bins).floor_()         # whole numbers in [-bins, bins]
    orientation_bin = orientation_bin.remainder_(bins)
    # MaskFeat tiles the image with 16-px windows, instead of centring one on each cell.
    window = gaussian_window(c, images.device).repeat(H // (2 * c) + 1, W // (2 * c) + 1)
    magnitude *= window[:H, :W]

    def cells(x):                                                                   # -> (B, 3, H/c, W/c, c*c)
        return x.reshape(B, 3, H // c, c, W // c, c).transpose(3, 4).reshape(B, 3, H // c, W // c, c * c)

    histogram = magnitude.new_zeros(B, 3, H // c, W // c, bins)
    histogram.scatter_add_(-1, cells(orientation_bin).long(), cells(magnitude))
    histogram = F.normalize(histogram, dim=-1)
    g, n = patch_size // c, (H // patch_size, W // patch_size)                # cells a patch side; patch grid
    histogram = histogram.reshape(B, 3, n[0], g, n[1], g, bins)
    return histogram.permute(0, 2, 4, 1, 6, 3, 5).reshape(B, n[0] * n[1], dim)
