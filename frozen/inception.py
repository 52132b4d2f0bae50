"""The Inception-v3 that FID, Inception Score and sFID are defined by, with its public weights.     [Sec. 4.1]

Its file is looked for in --weights-dir, then in torch hub's cache, else downloaded (weight_files.py); under
torchrun call load_inception inside processes.rank_zero_first. Modules are named after the keys of the file.
"""
import re
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from frozen.weight_files import WeightFile, load_frozen

INCEPTION_WEIGHTS = WeightFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth", "6726825d", also="weights-inception-2015-12-05-6726825d.pth")


class ConvNorm(nn.Module):
    """Convolution, batch norm in eval mode (eps 1e-3), ReLU. Padding keeps the size unless given."""

    def __init__(self, channels, width, kernel, stride=1, padding=None):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = tuple(k // 2 for k in kernel) if padding is None else padding
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        self.bn.num_batches_tracked = None               # training's counter; not in the public file

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    """3 x 3 means of stride 1; at the border, of the pixels that are there (PyTorch would count zeros)."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35 x 35 px (Mixed_5b, 5c, 5d): (B, c, ., .) -> (B, 224 + pool, ., .)."""

    def __init__(self, c, pool):
        super().__init__()
        self.branch1x1 = ConvNorm(c, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = ConvNorm(c, 48, 1), ConvNorm(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvNorm(c, 64, 1), ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3)
        self.branch_pool = ConvNorm(c, pool, 1)

    def forward(self, x):
        return torch.cat((self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(average_pool(x))), dim=1)


class InceptionB(nn.Module):
    """35 -> 17 px (Mixed_6a): (B, c, ., .) -> (B, 480 + c, ., .)."""

    def __init__(self, c):
        super().__init__()
        self.branch3x3 = ConvNorm(c, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvNorm(c, 64, 1), ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2, padding=0)

    def forward(self, x):
        return torch.cat((self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          F.max_pool2d(x, 3, stride=2)), dim=1)


class InceptionC(nn.Module):
    """17 x 17 px (Mixed_6b to 6e), 7 x 7 kernels as 1 x 7 and 7 x 1: (B, 768, ., .) -> (B, 768, ., .)."""

    def __init__(self, c):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvNorm(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = ConvNorm(768, c, 1), ConvNorm(c, c, row)
        self.branch7x7_3 = ConvNorm(c, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = ConvNorm(768, c, 1), ConvNorm(c, c, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = ConvNorm(c, c, row), ConvNorm(c, c, column)
        self.branch7x7dbl_5 = ConvNorm(c, 192, row)
        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat((self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
                          self.branch_pool(average_pool(x))), dim=1)


class InceptionD(nn.Module):
    """17 -> 8 px (Mixed_7a): (B, 768, ., .) -> (B, 1280, ., .)."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1, self.branch7x7x3_2 = ConvNorm(768, 192, 1), ConvNorm(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2, padding=0)

    def forward(self, x):
        long = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat((self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(long),
                          F.max_pool2d(x, 3, stride=2)), dim=1)


class InceptionE(nn.Module):
    """8 x 8 px (Mixed_7b, 7c): (B, c, ., .) -> (B, 2048, ., .). pool: average_pool, but a max pool in 7c."""

    def __init__(self, c, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvNorm(c, 320, 1)
        self.branch3x3_1 = ConvNorm(c, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = ConvNorm(384, 384, (1, 3)), ConvNorm(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvNorm(c, 448, 1), ConvNorm(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = ConvNorm(384, 384, (1, 3)), ConvNorm(384, 384, (3, 1))
        self.branch_pool = ConvNorm(c, 192, 1)

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat((self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pool(x))), dim=1)


class InceptionOutput(NamedTuple):
    """What the measures need of B images, float32."""
    pool: torch.Tensor         # (B, 2048) pool_3: FID, precision and recall
    logits: torch.Tensor       # (B, 1008), without the bias: IS takes the softmax of these
    spatial: torch.Tensor      # (B, 2023): sFID


def resize_tf1(images, size=299):
    """(B, c, H, W) float -> (B, c, size, size) as TensorFlow 1's resize_bilinear does it: output pixel i
    looks at source position i * H / size, with no half-pixel shift and no antialiasing; columns, then rows.
    """
    for dim in (3, 2):
        n = images.shape[dim]
        position = torch.arange(size, device=images.device, dtype=torch.float32) * (n / size)
        low = position.long()
        share = (position - low).view(-1, 1) if dim == 2 else position - low
        below = images.index_select(dim, low)
        above = images.index_select(dim, (low + 1).clamp(max=n - 1))
        images = below + (above - below) * share
    return images


class Inception(nn.Module):
    """The 2015 Inception-v3 that FID is defined by. It is not torchvision's: average pools do not count
    padding, Mixed_7c's pool branch takes a max, and there are 1008 logits. Named as in pytorch-fid."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = ConvNorm(32, 32, 3, padding=0), ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = ConvNorm(64, 80, 1), ConvNorm(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c = InceptionA(192, 32), InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(128), InceptionC(160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(160), InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, average_pool)
        self.Mixed_7c = InceptionE(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B, 3, H, W) of any size -> InceptionOutput.

        Resized as in the original graph, and so in ADM's suite and torch-fidelity; pytorch-fid resizes
        otherwise, and its numbers do not compare. Neither antialiases.
        spatial: the first 7 channels of Mixed_6d's 1x1 branch, 17 x 17, in (row, column, channel) order.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"Inception reads uint8 images, not {images.dtype}")
        x = (resize_tf1(images.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))            # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))       # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                                  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)       # the 1x1 branch is first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))                   # (B, 2048, 8, 8)
        pool = x.mean((2, 3))
        return InceptionOutput(pool, F.linear(pool, self.fc.weight), spatial)


def load_inception(weights_dir="", device="cpu"):
    """The frozen Inception of pytorch-fid's file, or of torch-fidelity's."""
    return load_frozen(Inception, INCEPTION_WEIGHTS, weights_dir, convert=dict,
                       skip=re.compile(r"num_batches_tracked$")).to(device)
