"""Speeds on this machine (a script, not a test; run it where nothing else runs).

    python tests/bench.py                 the digits: a step, its parts, the field, Fréchet distance
    python tests/bench.py --size imagenet256 [--compile] [--grad-checkpoint]     the paper's run

Random weights of the true sizes have the true cost. For imagenet256 a CPU prints parameters and
FLOPs alone; a GPU also measures one class of a step, its parts, the peak memory and sampling, and
adds up the hours of a run.
"""
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from eval_fid import frechet_distance  # noqa: E402
from toy.digits import DECODER, ENCODER, TEACHER  # noqa: E402

SIZES = {
    "digits": (TEACHER, ENCODER, DECODER, 28),
    "imagenet256": (
        dict(input_size=16, in_channels=768, hidden_size=(1152, 2048), depth=(28, 2),
             num_heads=(16, 16), num_classes=1000),
        dict(img_size=518, patch_size=14, embed_dim=768, depth=12, num_heads=12),
        dict(latent_dim=768, width=1152, depth=28, num_heads=16, mlp_dim=4096, patch_size=16,
             grid=16),
        224)}


def seconds_of(function):
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(repeats, functions):
    """{name: f} -> {name: median seconds}. They take turns: a busy machine hits all alike."""
    for function in functions.values():
        function()                          # warms up
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function))
    return {name: median(values) for name, values in seconds.items()}


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


def build(size, device):
    """(generator, RAE) with random weights; on "meta" they have shapes alone."""
    teacher, encoder, decoder, input_size = SIZES[size]
    side = teacher["input_size"]
    shape = (teacher["in_channels"], side, side)
    with torch.device(device):
        model = dr.DiTDH(**teacher).eval()
        mean, var = torch.zeros(shape), torch.ones(shape)
        rae = dr.RAE(dr.ViT(**encoder), dr.Decoder(**decoder), mean, var, input_size)
    return model, rae


def class_flops(size, cfg):
    """{part of one class of a step: FLOPs}, counted on tensors without content."""
    model, rae = build(size, "meta")
    side = rae.decoder.image_size
    z = torch.empty(1, *rae.mean.shape, device="meta")
    y = torch.zeros(1, dtype=torch.long, device="meta")
    image = torch.empty(1, 3, side, side, device="meta")
    forward = flops(partial(dr.one_step, model, z, y))
    encoding = flops(partial(rae.encode, image))
    passes = 3 * cfg.n_neg + cfg.n_extra_neg        # backward: two
    if cfg.grad_checkpoint:
        passes += cfg.n_neg
    print(f"generator {millions(model):.1f} M parameters, autoencoder {millions(rae):.1f} M")
    return {"generator": passes * forward, "encoder": cfg.n_pos * encoding}


def training(model, pos, cfg):
    """step(classes): a training step of so many classes, whose positives are all pos."""
    ema = deepcopy(model).requires_grad_(False)
    if cfg.grad_checkpoint:                         # as in drift_rae.run
        for block in model.blocks:
            block.forward = partial(dr.recompute, block.forward, use_reentrant=False)
    if cfg.compile:
        model.compile(dynamic=False)
    optimizer = AdamW(model.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay,
                      fused=True)

    def step(classes):
        batch = [(c, pos) for c in range(classes)]
        dr.train_step(model, ema, optimizer, batch, 0, cfg)

    return step


def time_class(size, cfg):
    """Median seconds of steps of one class and of two, of their parts, and of sampling."""
    model, rae = build(size, cfg.device)
    generator = deepcopy(model)
    side = rae.decoder.image_size
    images = torch.randint(256, (cfg.n_pos, side, side, 3), dtype=torch.uint8)
    normal = partial(torch.randn, device=cfg.device)
    pos = normal(cfg.n_pos, *rae.mean.shape)
    gen = normal(cfg.n_neg, *rae.mean.shape)
    extra = normal(cfg.n_extra_neg, *rae.mean.shape)
    z = normal(cfg.batch_size, *rae.mean.shape)
    labels = torch.zeros(cfg.batch_size, dtype=torch.long)
    labels_there = labels.to(cfg.device)
    step = training(model, pos, cfg)

    def drift():
        dr.drift_loss(dr.tokens(gen), dr.tokens(pos), dr.tokens(extra))

    @torch.no_grad()
    def one_step():
        with dr.autocast(cfg):
            dr.one_step(generator, z, labels_there)

    sampler = partial(dr.one_step, generator)
    parts = {"one": partial(step, 1), "two": partial(step, 2), "drift": drift}
    parts["encoder"] = partial(dr.encode, rae, images, cfg)
    parts["one step"] = one_step
    parts["decoder"] = partial(rae.decode, z)
    parts["images"] = partial(dr.generate, sampler, rae, labels, cfg)
    return medians(5, parts)


def bench_class(size, cfg):
    """Print what a class, its parts, the optimizer and sampling take -> seconds of a class."""
    seconds = time_class(size, cfg)
    a_class = seconds["two"] - seconds["one"] + seconds["encoder"]
    optimizer = max(0.0, 2 * seconds["one"] - seconds["two"])
    hours = cfg.steps * (cfg.n_class * a_class + optimizer) / 3600
    encoder_share = seconds["encoder"] / a_class
    drift_share = seconds["drift"] / a_class
    print(f"one class {1e3 * a_class:.1f} ms, of which encoder {encoder_share:.1%} and the drift "
          f"{drift_share:.1%}")
    print(f"optimizer {1e3 * optimizer:.1f} ms a step of {cfg.n_class} classes")
    print(f"{cfg.steps} steps: {hours:.3g} hours on one such device")
    print(f"sampling, images/s, {cfg.batch_size} a batch:")
    for name in ("one step", "decoder", "images"):
        print(f"    {name:9} {cfg.batch_size / seconds[name]:.0f}")
    return a_class


def bench_field(device, tokens=256, queries=64, targets=256, dim=768):
    """drift_field at the paper's size, beside the matrix products that it cannot do without."""
    normal = partial(torch.randn, device=device)
    neg = normal(tokens, targets, dim)
    pos = normal(tokens, targets, dim)
    x = neg[:, :queries]
    both = torch.cat([neg, pos], 1)
    weights = normal(tokens, queries, 2 * targets)

    def products():
        return x @ both.mT, weights @ both

    field = partial(dr.drift_field, x, pos, neg, 0.05, 39.0)
    seconds = medians(7, {"products": products, "field": field})
    ratio = seconds["field"] / seconds["products"]
    print(f"drift_field: {tokens} tokens, {queries} queries, {targets} negatives, as many "
          f"positives, D = {dim}: {seconds['field']:.4f} s, {ratio:.2f} times its two products")


def sqrtm_distance(mu1, sigma1, mu2, sigma2):
    """The Fréchet distance, pytorch-fid's way."""
    root = sqrtm(sigma1 @ sigma2).real
    traces = np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)
    return np.square(mu1 - mu2).sum() + traces


def bench_frechet(dim=2048):
    rng = np.random.default_rng(0)
    statistics = []
    for _ in range(2):
        x = rng.standard_normal((2 * dim, dim)) * np.linspace(1, 0.1, dim)
        statistics += [x.mean(0), np.cov(x, rowvar=False)]
    ours, theirs = frechet_distance(*statistics), sqrtm_distance(*statistics)
    seconds = medians(3, {"ours": partial(frechet_distance, *statistics),
                          "sqrtm": partial(sqrtm_distance, *statistics)})
    ratio = seconds["sqrtm"] / seconds["ours"]
    print(f"Fréchet distance, D = {dim}: {seconds['ours']:.2f} s, with sqrtm {ratio:.1f} times "
          f"that; relative difference {abs(ours / theirs - 1):.0e}")


def product_rate(n=8192):
    """FLOP/s of a large bf16 matrix product."""
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    seconds = medians(10, {"product": partial(torch.mm, a, a)})
    return 2 * n**3 / seconds["product"]


def print_gpu(rate):
    """How near FLOP/s of a class are to those of a product; and the memory."""
    name = torch.cuda.get_device_name()
    memory = torch.cuda.max_memory_allocated() / 1e9
    product = product_rate()
    print(f"{name}: a bf16 product reaches {product / 1e12:.0f} TFLOP/s, a class "
          f"{rate / product:.0%} of that; at most {memory:.1f} GB")


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="digits")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--grad-checkpoint", action="store_true")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    settings = {"compile": args.compile, "grad_checkpoint": args.grad_checkpoint,
                "device": "cuda" if gpu else "cpu"}
    cfg = dr.Config(**dr.PRESETS[args.size] | settings)
    parts = class_flops(args.size, cfg)
    total = sum(parts.values())
    print(f"one class {total / 1e12:.4g} TFLOP, the encoder's share {parts['encoder'] / total:.1%}")
    print(f"a step of {cfg.n_class} classes {cfg.n_class * total / 1e12:.4g} TFLOP")
    if args.size == "imagenet256" and not gpu:
        return print("the rest needs a GPU: seconds, memory, hours")
    rate = total / bench_class(args.size, cfg)
    print(f"{rate / 1e12:.3g} TFLOP/s over a class")
    if gpu:
        print_gpu(rate)
    bench_field(cfg.device)
    bench_frechet()


if __name__ == "__main__":
    main()
