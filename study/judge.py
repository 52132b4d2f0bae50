"""Does a sample show what was asked for? A better classifier than evaluate.py's says so.               [ours]

    python evaluate.py judge samples.npz --data cifar10

--features classifier has a network of seconds, right on seven of ten photographs of CIFAR-10: what it makes
of a sample says little about the sample. This one is a residual network of 1.6 million weights. Its accuracy
on test images stands beside the share of samples that it names as requested, which can be higher: with
guidance, samples are more typical of a class than photographs are.
"""
from pathlib import Path

from common import Count, UserError, Whole, batch_loader, number    # before torch, see runtime/processes.py

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import GlobalBatches, collate, to_float
from measures.features import Report, load_classifier
from measures.image_sets import batches, gather, open_data, open_samples, without_classes
from runtime.processes import BFLOAT16_WIDTH, autocast

USES = ("data",)
BATCH, SHIFT, LR = 256, 4, 0.2                     # images per step; pixels of random shifts; learning rate
SMALLEST = 8                                       # px, for its three poolings


def add_arguments(add):
    """The options of this command. add: a parser's add_argument."""
    add("samples", help=".npz or folder of sample.py, with classes")
    add("--classifier-steps", type=number(Count), default=4000, help="of 256 images (default 4000)")
    add("--test-images", type=number(Whole), default=0, help="to measure it on; 0: all (default)")
    add("--cache", default="runs/cache", help="where it is kept (default runs/cache)")


# ------------------------------------------------- network -------------------------------------------------

class Residual(nn.Module):
    """x + layers(x)."""
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def convolution(inputs, outputs, pool=False):
    """3 x 3 convolution, batch norm, ReLU, and perhaps the maximum of 2 x 2."""
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, *[nn.MaxPool2d(2)] * pool)


def residual_network(num_classes):
    """Images (B, 3, H, W) float in [-1, 1], of at least 8 px -> (B, num_classes) logits."""
    layers = [convolution(3, 32), convolution(32, 64, pool=True),
              Residual(convolution(64, 64), convolution(64, 64)),
              convolution(64, 128, pool=True), convolution(128, 256, pool=True),
              Residual(convolution(256, 256), convolution(256, 256)),
              nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, num_classes)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def shifted(x, generator):
    """Images (B, 3, H, W), each moved by up to SHIFT pixels down or up and right or left; edges mirrored."""
    B, _, height, width = x.shape
    down, right = torch.randint(2 * SHIFT + 1, (2, B, 1), generator=generator).to(x.device)
    rows, columns = torch.arange(height).to(x.device) + down, torch.arange(width).to(x.device) + right
    x = F.pad(x, [SHIFT] * 4, mode="reflect").permute(0, 2, 3, 1)
    image = torch.arange(B).to(x.device)[:, None, None]
    return x[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)                 # channels last


@torch.enable_grad()
def train(train_set, device, steps, seed=0):
    """residual_network in eval mode, trained on a labelled ImageDataset: momentum, a learning rate that rises
    for a fifth of the steps and falls to 0, smoothed labels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = residual_network(len(train_set.classes)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.2, cycle_momentum=False,
                                                   anneal_strategy="linear")
    indices = GlobalBatches(train_set.length, BATCH, 0, steps, seed)
    for images, labels in tqdm(batch_loader(train_set, indices, -1, device, collate), "judge", steps):
        if (labels < 0).any():
            raise UserError("an image of --data has no class: the judge needs all labelled")
        x = shifted(to_float(images.to(device)), generator)
        with autocast("auto", device, BFLOAT16_WIDTH):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# -------------------------------------------------- command -------------------------------------------------

def right_answers(args, model, images):
    """(n,) bool: is the class that the judge gives Images and their mirror images theirs?"""
    answers = [torch.empty(0, dtype=torch.int64)]
    for _, x in batches(images, args, images.name):
        x = to_float(x.to(args.device))
        answers.append((model(x) + model(x.flip(-1))).argmax(1).cpu())
    return gather(torch.cat(answers), args) == torch.from_numpy(images.labels)


@torch.no_grad()
def measure(args):
    """The share of samples that a classifier, which most test images convince, names as requested. [ours]"""
    samples, args.out = open_samples(args.samples), args.out or f"{Path(args.samples)}.judge"
    test = open_data(args, args.data, "test", samples.size, args.test_images)
    for images in (samples, test):
        if without_classes(images, ""):
            raise UserError(f"{images.name}: the judge needs the class of every image")
    if samples.labels.max() >= len(test.classes or ()):
        raise UserError(f"{args.samples} has a class {samples.labels.max()}, --data {args.data} "
                        f"{len(test.classes or ())} classes: give the data set that the samples are of")
    if samples.size < SMALLEST:
        raise UserError(f"{args.samples} has images of {samples.size} px; the judge needs {SMALLEST}")
    model, name = load_classifier(args, args.data, samples.size, residual_network, train)
    known, named = (right_answers(args, model, images) for images in (test, samples))
    share = lambda hits: hits.double().mean().item()
    by_class = {int(c): share(named[samples.labels == c]) for c in set(samples.labels)}
    protocol = (f"{len(named)} samples, {len(known)} test images of {test.name}; {name}, trained for "
                f"{args.classifier_steps} steps; mirror images averaged")
    return Report({"test_accuracy": share(known), "named_as_requested": share(named), "by_class": by_class,
                   "protocol": protocol}, [("class", "named as requested"), *sorted(by_class.items())])
