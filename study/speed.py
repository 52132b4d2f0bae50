"""How fast each part runs, and how close that is to what the machine can do.                       [Sec. 4.5]

    python evaluate.py speed                       # of every part of this code
    python evaluate.py speed --compare             # beside other libraries

All rows are timed in one run: warm-up, several repeats, the median. "of peak" divides the floating-point
operations per second of a row by those of a large matrix product in the same dtype, measured before, between
and after the rows, so that it means something on a noisy machine too. It can exceed 100: on AMD processors
large linear layers are computed as convolutions, by a faster library (processes.faster_products); "of conv."
divides by a large product of that kind. Operations are counted by PyTorch: matrix products, convolutions and
attention, forward and backward, two per multiply-accumulate (with --checkpointing the full objective's second
forward pass too). Everything else in a step (norms, GELU, optimizer, copies) takes time but is not counted.
"""
import argparse
import ctypes
import gc
import importlib.util
import itertools
import platform
import re
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import common    # before torch, see runtime/processes.py

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import losses
import metrics
import train_tokenizer
from runtime import processes
from common import Count, UserError, Whole, number
from data import build_dataset
from flow import drop_labels, flow_matching_loss, sample_times
from measures.features import Report
from hog import hog_features
from maetok import MAETok, random_mask
from runtime.processes import Processes, autocast, autocast_dtype, cast_matrices, faster_products
from sit import SIZES, SiT, SiTConfig
from train_tokenizer import Method, Stage, train_step

Config, PRESETS, USES = Method.Config, Method.PRESETS, ()


def add_arguments(add):
    """The options of this command. add: a parser's add_argument."""
    add("--only", nargs="+", help="rows whose name has one of these in it, e.g. 'SiT-B' HOG (default: all)")
    add("--dtype", default="auto", help="auto (bfloat16 where fast), float32, bfloat16")
    add("--compare", action="store_true", help="instead: the ratio to other libraries (scikit-image, "
        "scikit-learn, sqrtm, Pillow, where installed), and what the host draws for a step")
    add("--repeats", type=number(Count), default=7, help="timed calls per row at most (default 7)")
    add("--images", help="folder of photos, for the JPEG rows")
    add("--checkpointing", action="store_true", help="training steps with activation checkpointing")
    add("--plain-linear", action="store_true", help="no convolutions on AMD processors, to compare")
    for part, cpu, gpu in (("tokenizer", 2, 64), ("encode", 4, 64), ("sit", 2, 256), ("sample", 4, 64)):
        add(f"--{part}-batch", type=number(Whole), default=0,
            help=f"images at 128 tokens (default {cpu}, on GPUs {gpu}; as many tokens at other lengths)")


# ------------------------------------------------ measuring ------------------------------------------------

def synchronise(device):
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def once(function, device):
    """Wall time of one call, s."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def seconds(function, device, repeats, budget=20.0):
    """Median wall time of a call after warm-up; at least 3 repeats, more while they take under `budget` s."""
    for _ in range(3 if device.type == "cuda" else 1):
        function()
    synchronise(device)
    times = []
    while len(times) < 3 or len(times) < repeats and sum(times) < budget:
        times.append(once(function, device))
    return statistics.median(times)


def reset_peak_memory(device):
    """On Linux, writing 5 to clear_refs resets the process's peak. Freed memory that the C library keeps goes
    back to the system first, or it would count as the next row's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """GiB since reset_peak_memory: of the GPU's allocator, or resident in this process; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 2 ** 20 if found else None


def matmul_peak(dtype, device, repeats):
    """FLOP/s of a large square matrix product, and of the same product as a 1 x 1 convolution of n pixels."""
    n = 8192 if device.type == "cuda" else 3072
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    picture = a.view(16, 1, n // 16, n).permute(0, 3, 1, 2)              # (16, n, 1, n / 16), channels last
    return [2 * n ** 3 / seconds(call, device, repeats)
            for call in (lambda: a @ b, lambda: F.conv2d(picture, b[:, :, None, None]))]


def cpu_name():
    """The processor's name, or its kind where the system does not say more."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def count_flops(function):
    """Floating-point operations of function() on meta tensors, forward and backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# -------------------------------------------------- rows --------------------------------------------------
# Each function returns (call, images per call, FLOPs per call or None).

class NoLog:
    """In place of checkpoints.Log: every method does nothing."""

    def __getattr__(self, name):
        return lambda *values, **more: None


def tokenizer_step(args, full):
    """One step of stage 1 at maetok-b-256 by train_tokenizer.py: all terms with random frozen networks, or
    only pixels and HOG."""
    few = {} if full else dict(targets="hog", percep_weight=0.0, disc="none")
    config = Config(**PRESETS["maetok-b-256"] | few | dict(
        batch_size=args.tokenizer_batch, checkpointing=args.checkpointing, dtype=args.dtype, disc_start=0))
    from tests.random_frozen import use_random_networks
    use_random_networks()
    method = Method(config, args.device)
    model = faster_products(Method.Model(config, method.targets)).to(args.device)
    if args.checkpointing:
        common.recompute_blocks(model)
    state = common.TrainState(model, common.EMA(model, config.ema), method.optimizer(model))
    if full:
        method.adversary = method.build_adversary()
        state.others = {"adversary_optimizer": method.optimizer(method.adversary)}
    B, stage = config.batch_size, Stage(1, 0, config.steps)
    batches = method.batches(None, 0, stage.end, Processes(0, 1, args.device))
    images = torch.randint(0, 256, (B, 3, config.image_size, config.image_size), dtype=torch.uint8)
    loader = itertools.repeat((images.to(args.device), torch.zeros(B)))

    def call():
        train_step(method, stage, state, batches, loader, model, method.adversary, NoLog())

    def on_meta():
        tokenizer, N = Method.Model(config, method.targets), (config.image_size // config.patch_size) ** 2
        output = tokenizer(torch.empty(images.shape), torch.empty(B, N, dtype=torch.bool))
        (output.reconstruction.sum() + sum(a.sum() for a in output.aux.values())).backward()

    if not full:
        return call, B, count_flops(on_meta)
    # Frozen networks do not run on the meta device: a real step is counted.
    with FlopCounterMode(display=False) as counter:
        call()
    return call, B, counter.get_total_flops()


def tokenizer_pass(args, decode):
    """Encoding or decoding alone, without gradients."""
    config = Config(**PRESETS["maetok-b-256"] | dict(targets=""))
    B = args.encode_batch
    model = faster_products(MAETok(config)).to(args.device).eval()
    images = torch.rand(B, 3, 256, 256, device=args.device)
    latents = torch.randn(B, 128, 32, device=args.device)

    def call():
        with torch.no_grad(), autocast(args.dtype, args.device):
            model.decode(latents) if decode else model.encode(images)

    def on_meta():
        m = MAETok(config)
        m.decode(torch.empty(B, 128, 32)) if decode else m.encode(torch.empty(B, 3, 256, 256))

    return call, B, count_flops(on_meta)


def sit(args, size, tokens, train):
    """SiT: a training step with AdamW and EMA, or a sampler's call (with guidance the batch is doubled)."""
    config = SiTConfig(**SIZES[size], num_latents=tokens)
    B = max(1, (args.sit_batch if train else args.sample_batch) * 128 // tokens)
    model = faster_products(SiT(config)).to(args.device)
    if args.checkpointing:
        common.recompute_blocks(model)
    x, t = torch.randn(B, tokens, 32, device=args.device), torch.rand(B, device=args.device)
    y = torch.randint(1000, (B,), device=args.device)

    def on_meta():
        v = SiT(config)(torch.empty(B, tokens, 32), torch.empty(B), torch.empty(B, dtype=torch.int64))
        if train:
            v.sum().backward()

    if not train:
        def call():
            with torch.no_grad(), autocast(args.dtype, args.device):
                model(x, t, y)
        return call, B, count_flops(on_meta)
    ema = common.EMA(model, 0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def call():
        with autocast(args.dtype, args.device):
            v = model(x, t, y)
        flow_matching_loss(v, x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)

    return call, B, count_flops(on_meta)


def jpeg_loading(args, plain):
    """Images of a folder to (3, 256, 256) tensors on one core, as in a loader's worker: by data.py, or by
    Pillow's open, resize, crop."""
    if not args.images:
        raise UserError("the JPEG rows need --images FOLDER of photos")
    dataset = build_dataset(args.images, "test", 256)
    files = [*itertools.islice(dataset.source.files, 64)]
    number, threads = iter(range(10 ** 9)), torch.get_num_threads()

    def call():
        torch.set_num_threads(1)
        for index in range(16):
            index = (next(number) + index) % len(files)
            if not plain:
                dataset[0, index]
                continue
            with Image.open(files[index]) as image:
                image = image.convert("RGB")
                scale = 256 / min(image.size)
                image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
                left, top = ((side - 256) // 2 for side in image.size)
                torch.from_numpy(np.array(image.crop((left, top, left + 256, top + 256)))).permute(2, 0, 1)
        torch.set_num_threads(threads)

    return call, 16, None


def frechet(args):
    """The distance of two sets of statistics at Inception's 2048 features."""
    made = []
    for seed in range(2):
        x = torch.randn(4096, 2048, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        made.append((x.mean(0), torch.cov(x.T)))
    (m1, c1), (m2, c2) = made
    return lambda: metrics.frechet_distance(m1, c1, m2, c2), 1, None


def em(args):
    """One EM step of 50 full-covariance Gaussians on 20,000 points in 64 dimensions, float32 products."""
    generator = torch.Generator().manual_seed(0)
    centres = 0.7 * torch.randn(50, 64, generator=generator)
    x = centres.repeat(400, 1) + torch.randn(20_000, 64, generator=generator)
    mixture, _ = metrics.fit_mixture(x, 50, True, starts=1, iterations=1)
    mixture = type(mixture)(*(part.float() for part in mixture))
    return lambda: metrics.em_step(mixture, x), 1, None


def all_rows(args):
    """name -> function returning (call, images, FLOPs), in the table's order."""
    rows = {
        "HOG, 256 px": lambda: ((lambda x: lambda: hog_features(x, 16))(
            torch.rand(16, 3, 256, 256, device=args.device)), 16, None),
        "tokenizer step, no frozen networks": lambda: tokenizer_step(args, full=False),
        "tokenizer step, full objective": lambda: tokenizer_step(args, full=True),
        "encode": lambda: tokenizer_pass(args, decode=False),
        "decode": lambda: tokenizer_pass(args, decode=True),
    }
    if args.images:
        rows |= {"JPEG to tensor, one core": lambda: jpeg_loading(args, plain=False),
                 "JPEG by plain Pillow, one core": lambda: jpeg_loading(args, plain=True)}
    for size in ("B", "L", "XL"):
        for tokens in (128, 256, 1024):
            for train in (True, False):
                name = f"SiT-{size} {'training step' if train else 'sampling call'}, {tokens} tokens"
                rows[name] = lambda size=size, tokens=tokens, train=train: sit(args, size, tokens, train)
    return rows | {"Fréchet distance, d = 2048": lambda: frechet(args),
                   "EM step, 20000 x 64, K = 50": lambda: em(args)}


# ------------------------------------------------ host work ------------------------------------------------

def host_work(args):
    """What the host draws for one step of full size, in microseconds: name -> seconds."""
    config = Config(**PRESETS["maetok-b-256"])
    rngs = lambda name, count: [common.sample_rng(0, name, 7, i) for i in range(count)]

    def latents():
        streams = rngs("diffusion", 32)
        sample_times(streams)
        np.stack([rng.standard_normal((128, 32), np.float32) for rng in streams])
        drop_labels(streams, torch.zeros(32, dtype=torch.int64), 1000, 0.1)

    calls = {"masks, 64 images of 256 patches": lambda: random_mask(rngs("mask", 64), 256),
             "discriminator's windows": lambda: losses.draw_windows(config, 7, 0),
             "times, noise and labels, 32 latents of 128 x 32": latents}
    return {name: seconds(call, torch.device("cpu"), 101) for name, call in calls.items()}


# ------------------------------------------ beside other libraries ------------------------------------------
# Each function returns (ours, theirs): two calls that do the same work.

def hog_beside_scikit_image(args):
    """Nine unsigned orientations in 8-px cells of sixteen images of 256 px."""
    from skimage.feature import hog
    images = torch.rand(16, 3, 256, 256)
    arrays = images.permute(0, 2, 3, 1).numpy()
    return (lambda: hog_features(images, 16),
            lambda: [hog(a, 9, (8, 8), (1, 1), channel_axis=-1, feature_vector=False) for a in arrays])


def frechet_beside_sqrtm(args):
    """The distance at 2048 dimensions, and the formula of pytorch-fid: scipy's root of a product."""
    from scipy.linalg import sqrtm
    ours = frechet(args)[0]
    c1, c2 = (torch.cov(torch.randn(2048, 4096, dtype=torch.float64)).numpy() for _ in range(2))
    return ours, lambda: np.trace(sqrtm(c1 @ c2)).real


def mixture_beside_scikit_learn(args):
    """Five EM steps of 20 Gaussians with full covariances on 10,000 points in 32 dimensions,
    from one start."""
    from sklearn.mixture import GaussianMixture
    generator = torch.Generator().manual_seed(0)
    centres = 0.7 * torch.randn(20, 32, generator=generator).double()
    x = centres.repeat(500, 1) + torch.randn(10_000, 32, generator=generator)
    start = metrics.start_mixture(x, 20, True, np.random.default_rng(0))
    array, precisions = x.numpy(), torch.linalg.inv(start.covariances).numpy()

    def ours():
        mixture = start
        for _ in range(5):
            mixture, _ = metrics.em_step(mixture, x)

    def theirs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                     # five steps do not converge
            GaussianMixture(20, max_iter=5, tol=0, means_init=start.means.numpy(), precisions_init=precisions,
                            weights_init=start.weights.numpy()).fit(array)
    return ours, theirs


def probe_beside_scikit_learn(args):
    """A linear probe on 3,000 vectors of 256 values in ten classes, to the same size of the gradient."""
    from sklearn.linear_model import LogisticRegression
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 10
    x = torch.randn(10, 256, generator=generator)[y] * 0.3 + torch.randn(3000, 256, generator=generator)
    x = x.double()
    return (lambda: metrics.linear_probe(x, y, 10),
            lambda: LogisticRegression(tol=1e-6, max_iter=1000).fit(x.numpy(), y.numpy()))


def precision_recall_beside_cdist(args):
    """Precision and recall of 3,000 and 3,000 Inception features: torch.cdist and kthvalue, as torch-fidelity
    has it, whole matrices in memory."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(128, 2048, generator=generator)
    real, fake = (torch.randn(3000, 128, generator=generator) @ base + noise
                  for noise in torch.randn(2, 3000, 2048, generator=generator))

    def theirs():
        reach = [torch.cdist(x, x).kthvalue(4).values for x in (real, fake)]
        between = torch.cdist(fake, real)
        return ((between <= reach[0]).any(1).double().mean().item(),
                (between.T <= reach[1]).any(1).double().mean().item())

    return lambda: metrics.precision_recall(real, fake), theirs


def objective_beside_two_passes(args):
    """A training step with LPIPS, GAN and teachers: losses.differentiated, and without it."""
    step, once = tokenizer_step(args, full=True)[0], train_tokenizer.differentiated

    def theirs():
        train_tokenizer.differentiated = lambda loss, x: loss(x)
        try:
            step()
        finally:
            train_tokenizer.differentiated = once

    return step, theirs


def jpeg_beside_pillow(args):
    """Sixteen photos to 256-px tensors, on one core."""
    return jpeg_loading(args, plain=False)[0], jpeg_loading(args, plain=True)[0]


def convolution_beside_linear(args):
    """SiT-B's velocity with faster_products, and without, in float32."""
    args = argparse.Namespace(**vars(args) | {"dtype": "float32"})
    ours = sit(args, "B", 128, False)[0]
    here, processes.AMD_PROCESSOR = processes.AMD_PROCESSOR, False
    theirs = sit(args, "B", 128, False)[0]
    processes.AMD_PROCESSOR = here
    return ours, theirs


def weights_cast_once(args):
    """SiT-B's velocity under bfloat16 autocast: matrices cast once, and cast in every call."""
    from copy import deepcopy
    model = SiT(SiTConfig(**SIZES["B"], num_latents=128)).to(args.device).eval().requires_grad_(False)
    once = cast_matrices(deepcopy(model), torch.bfloat16)
    x, t = torch.randn(4, 128, 32, device=args.device), torch.rand(4, device=args.device)
    y = torch.zeros(4, dtype=torch.int64, device=args.device)

    def call(network):
        with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16):
            network(x, t, y)
    return lambda: call(once), lambda: call(model)


def bfloat16_beside_float32(args, width):
    """A training step of a narrow SiT of four blocks, 64 latents of 64 tokens: --dtype bfloat16, and
    float32."""
    config = SiTConfig(width=width, depth=4, heads=width // 64, num_latents=64, latent_dim=16)
    model = SiT(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, t = torch.randn(64, 64, 16, device=args.device), torch.rand(64, device=args.device)
    y = torch.randint(1000, (64,), device=args.device)

    def call(dtype):
        with autocast(dtype, args.device):
            v = model(x, t, y)
        flow_matching_loss(v, x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return lambda: call("bfloat16"), lambda: call("float32")


COMPARISONS = {"HOG / scikit-image": (hog_beside_scikit_image, "skimage"),
               "Fréchet distance / sqrtm, as pytorch-fid": (frechet_beside_sqrtm, "scipy"),
               "EM, 5 steps / scikit-learn": (mixture_beside_scikit_learn, "sklearn"),
               "linear probe / scikit-learn": (probe_beside_scikit_learn, "sklearn"),
               "precision and recall / cdist, as torch-fidelity": (precision_recall_beside_cdist, "torch"),
               "JPEG to tensor / plain Pillow": (jpeg_beside_pillow, "PIL"),
               "full objective / two passes": (objective_beside_two_passes, "torch"),
               "SiT-B call, faster_products / nn.Linear": (convolution_beside_linear, "torch"),
               "SiT-B call in bfloat16, cast once / autocast": (weights_cast_once, "torch"),
               **{f"SiT step of width {width}, bfloat16 / float32":
                  (partial(bfloat16_beside_float32, width=width), "torch") for width in (64, 128, 192, 256)}}


def chosen(rows, only):
    """The rows in whose names one of `only` occurs; all, if that is None. Raises UserError if none is."""
    rows = {name: row for name, row in rows.items() if not only or any(part in name for part in only)}
    if not rows:
        raise UserError(f"--only {' '.join(only)}: no row has that in its name")
    return rows


def compare(args):
    """{name: {ours, theirs: seconds, times: theirs / ours, median of the repeats, lowest, highest}}. The two
    take turns, so that other work on the machine slows both. Packages that are not installed are left out."""
    result = {}
    for name, (build, package) in chosen(COMPARISONS, args.only).items():
        if importlib.util.find_spec(package) is None or package == "PIL" and not args.images:
            print(f"{name}: left out ({'--images FOLDER' if package == 'PIL' else package} is needed)")
            continue
        torch.manual_seed(args.seed)
        ours, theirs = build(args)
        # The first turn warms up.
        pairs = [(once(ours, args.device), once(theirs, args.device)) for _ in range(args.repeats + 1)][1:]
        ratios = sorted(b / a for a, b in pairs)
        mine, other = (statistics.median(column) for column in zip(*pairs))
        result[name] = {"ours": mine, "theirs": other, "times": statistics.median(ratios),
                        "lowest": ratios[0], "highest": ratios[-1]}
        del ours, theirs                                          # a training step's model, maybe
        print(f"{name}: {mine:.4g} s against {other:.4g} s, {statistics.median(ratios):.2f} times as fast "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
    return result


# -------------------------------------------------- table --------------------------------------------------

def measure(args):
    """Images per second, percent of the matrix-product peak and peak memory of every part; --compare: ratios
    to other libraries. [Sec. 4.5]"""
    args.dtype = str(autocast_dtype(args.dtype, args.device, width=768)).removeprefix("torch.")       # ViT-B
    cuda = args.device.type == "cuda"
    processes.AMD_PROCESSOR = processes.AMD_PROCESSOR and not args.plain_linear
    args.tokenizer_batch = args.tokenizer_batch or (64 if cuda else 2)
    args.encode_batch = args.encode_batch or (64 if cuda else 4)
    args.sit_batch = args.sit_batch or (256 if cuda else 2)
    args.sample_batch = args.sample_batch or (64 if cuda else 4)
    if not args.compare:
        return measure_rows(args)
    found = compare(args)
    table = [("ours / instead of", "ours, s", "theirs, s", "times as fast", "lowest", "highest")]
    table += [(name, *(f"{value:.4g}" for value in row.values())) for name, row in found.items()]
    protocol = (f"{torch.cuda.get_device_name() if cuda else cpu_name()}, {torch.get_num_threads()} threads; "
                f"torch {torch.__version__}; {args.dtype} where a row says nothing else; the two take turns, "
                f"{args.repeats} times; ratio of the times, median, lowest, highest")
    return Report({"ratios": found, "host_work_seconds": host_work(args), "protocol": protocol}, table)


def measure_rows(args):
    """The Report of all rows."""
    dtype, cuda = getattr(torch, args.dtype), args.device.type == "cuda"
    rows = chosen(all_rows(args), args.only)
    peaks, result = [matmul_peak(dtype, args.device, args.repeats)], {}
    for name, build in rows.items():
        torch.manual_seed(args.seed)
        reset_peak_memory(args.device)
        call, images, flops = build()
        median = seconds(call, args.device, args.repeats)
        result[name] = {"batch": images, "seconds": median, "images_per_second": images / median,
                        "flops": flops, "flops_per_second": flops / median if flops else None,
                        "peak_memory_gib": peak_memory(args.device)}
        print(f"{name}: {median:.4g} s", flush=True)
        del call
        peaks.append(matmul_peak(dtype, args.device, args.repeats))
    peak, convolution_peak = map(statistics.median, zip(*peaks))
    for row in result.values():
        for part, highest in (("share_of_peak", peak), ("share_of_convolution_peak", convolution_peak)):
            row[part] = row["flops_per_second"] / highest if row["flops"] else None
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    summary = {"device": name, "peak_gflops": peak / 1e9, "convolution_peak_gflops": convolution_peak / 1e9,
               "peak_gflops_lowest_highest": [min(peaks)[0] / 1e9, max(peaks)[0] / 1e9]}
    # [Sec. 4.5]: SiT-XL at 1024 and 128 tokens: 373.3 and 48.5 GFLOPs (7.7x), 0.1 and 3.12 images/s (31x).
    for size in ("B", "L", "XL"):
        few, many = (result.get(f"SiT-{size} sampling call, {tokens} tokens") for tokens in (128, 1024))
        if few and many:
            summary[f"SiT-{size}_throughput_128_over_1024_tokens"] = (few["images_per_second"]
                                                                      / many["images_per_second"])
    summary["protocol"] = (f"{name}; torch {torch.__version__}; {dtype}; median of up to "
                           f"{args.repeats} repeats after warm-up; peak is the median of matrix products "
                           "before, between and after the rows; random weights"
                           + ("; activation checkpointing in training" if args.checkpointing else "")
                           + ("; large linear layers as convolutions" if processes.AMD_PROCESSOR and not cuda
                              else ""))
    return Report({"rows": result, **summary}, table_of(result))


def table_of(result):
    """The rows to print."""
    show = lambda value, form, scale=1.0: "-" if value is None else format(value * scale, form)
    table = [("", "batch", "s per call", "images/s", "GFLOP", "GFLOP/s", "of peak", "of conv.", "GiB")]
    for name, row in result.items():
        table.append((name, row["batch"], show(row["seconds"], ".4g"), show(row["images_per_second"], ".4g"),
                      show(row["flops"], ".4g", 1e-9), show(row["flops_per_second"], ".4g", 1e-9),
                      show(row["share_of_peak"], ".0f", 100),
                      show(row["share_of_convolution_peak"], ".0f", 100),
                      show(row["peak_memory_gib"], ".2f")))
    return table
