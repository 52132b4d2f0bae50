"""Measure what was trained. Each subcommand prints a small table with its protocol, and writes it as JSON.

    python sample.py --ckpt RUN --cfg 2 --num 1000 --out samples.npz
    python evaluate.py generation samples.npz --data shapes       # are the samples of the class asked for?

So far: generation, by a small classifier trained on the labelled real images, for data sets on which the FID
network has nothing to say. FID and the other measures of the paper are not in yet.
"""
import argparse
import hashlib
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import UserError
from data import GlobalBatches, build_dataset, collate, some_images, read_npz, to_float, to_uint8
from train_tokenizer import load_tokenizer


def small_classifier(num_classes):
    """A plain convolutional network for images of 16 px or more: (B, 3, H, W) float in [-1,
    1] -> (B, num_classes) logits.

    The last but one output, 128 values a image after global average pooling, can serve as a feature. [ours]
    """
    layers, channels = [], 3
    for width, stride in ((32, 1), (64, 2), (128, 2), (128, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def train_classifier(train_set, device, steps=800, batch_size=64, seed=0):
    """Train small_classifier on a labelled ImageDataset: AdamW, 1e-3 falling linearly to 0, cross-entropy.
    In eval mode."""
    torch.manual_seed(seed)
    model = small_classifier(len(train_set.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    batches = GlobalBatches(train_set.length, batch_size, 0, steps, seed)
    bar = tqdm(torch.utils.data.DataLoader(train_set, batch_sampler=batches, collate_fn=collate),
               desc="classifier")
    for step, batch in enumerate(bar):
        if isinstance(batch, UserError):
            raise batch
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        loss = F.cross_entropy(model(to_float(batch[0].to(device))), batch[1].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, batches, device):
    """Share of images that the classifier assigns to their label; batches of (uint8 (B, 3, H, W), (B,))."""
    right = [(model(to_float(images.to(device))).argmax(1).cpu() == labels) for images, labels in batches]
    return torch.cat(right).float().mean().item()


def generation(args, device):
    """The share of samples that a classifier trained on real images assigns to the class asked for."""
    samples = read_npz(args.samples)
    if samples.classes is None:
        raise UserError(f"{args.samples} has no labels (arr_1): "
                        "nothing says which class a sample should be of")
    size = samples.images.shape[1]
    if samples.images.shape[2] != size:
        raise UserError(f"{args.samples} holds images of {size} x {samples.images.shape[2]} px; "
                        "they should be square")
    train_set, test_set = (build_dataset(args.data, split, size, args.data_root, flip=True)
                           for split in ("train", "test"))
    if not train_set.classes:
        raise UserError(f"--data {args.data} has no classes to train a classifier on")
    if samples.labels.max() >= len(train_set.classes):
        raise UserError(f"{args.samples} has class {samples.labels.max()}, "
                        f"--data {args.data} only 0..{len(train_set.classes) - 1}")
    # The classifier depends on data and steps alone: it is trained once and kept.
    key = hashlib.sha256(json.dumps(
        [train_set.source.fingerprint(), size, args.classifier_steps]).encode()).hexdigest()
    cached = Path(args.cache) / f"classifier_{key[:16]}.pt"
    if cached.exists():
        model = small_classifier(len(train_set.classes))
        common.load_weights(model, common.load_checkpoint(cached)["model"], cached)
        model = model.to(device).eval()
    else:
        model = train_classifier(train_set, device, args.classifier_steps)
        cached.parent.mkdir(parents=True, exist_ok=True)
        state = {"config": {"data": args.data, "size": size}, "model": model.state_dict()}
        common.atomic_write(cached, lambda path: torch.save(state, path))
    pictures = torch.from_numpy(samples.images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(samples.labels)
    result = {"samples": len(labels), "assigned_to_requested_class": accuracy(
                  model, zip(pictures.split(250), labels.split(250)), device),
              "classifier_test_accuracy": accuracy(model, some_images(test_set, args.test_images), device),
              "protocol": f"{len(labels)} samples of {args.samples} at {size} px; "
                          f"small convolutional classifier trained for {args.classifier_steps} steps of 64 "
                          f"on {args.data}, tested on up to {args.test_images} of its test images; float32"}
    if args.tokenizer:
        # Samples are drawn by the tokenizer's decoder: this tells its share of the blame.
        tokenizer = load_tokenizer(args.tokenizer, device)
        decode = lambda images: tokenizer.decode(tokenizer.encode(to_float(images.to(device))), (size, size))
        redrawn = ((to_uint8(decode(x)).cpu(), y) for x, y in some_images(test_set, args.test_images))
        result["reconstructions_assigned_to_their_class"] = accuracy(model, redrawn, device)
    for name, value in result.items():
        print(f"{name:40} {value if not isinstance(value, float) else round(value, 4)}")
    out = Path(args.json or f"{args.samples}.json")
    common.atomic_write(out, lambda path: path.write_text(json.dumps(result, indent=1)))


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("generation", help=generation.__doc__).add_argument
    add("samples", help=".npz of sample.py: arr_0 images, arr_1 labels")
    add("--data", required=True, help="the labelled real images: shapes, cifar10, a folder or an .npz file")
    add("--data-root", default="data", help="where cifar10 is looked for and downloaded to")
    add("--tokenizer", help="run of train_tokenizer.py, whose reconstructions are classified too")
    add("--classifier-steps", type=int, default=800,
        help="of the classifier's training, 64 images each (default 800)")
    add("--test-images", type=int, default=2000,
        help="real test images for the classifier's own accuracy (default 2000)")
    add("--cache", default="runs/cache",
        help="folder where the trained classifier is kept (default runs/cache)")
    add("--json", help="where to write the result (default: SAMPLES.json)")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    generation(args, common.start_processes(args.device)[2])


if __name__ == "__main__":
    common.run(main)
