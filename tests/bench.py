"""Speeds on this machine (a script, not a test; run it where nothing else runs).

    python tests/bench.py                       the digits: a step and its parts; drift_field; Fréchet distance
    python tests/bench.py --size imagenet256 [--compile] [--grad-checkpoint]    what the paper's run costs here

Random weights of the true sizes have the true cost. For imagenet256 a CPU prints parameters and FLOPs alone; a GPU
also measures one class of a step, its parts, the peak memory and sampling, and adds up the hours of a run.
"""
import argparse
import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from eval_fid import frechet_distance  # noqa: E402
from toy.digits import DECODER, ENCODER, TEACHER  # noqa: E402

SIZES = {
    "digits": (TEACHER, ENCODER, DECODER, 28),
    "imagenet256": (
        dict(input_size=16, in_channels=768, hidden_size=(1152, 2048), depth=(28, 2), num_heads=(16, 16),
             num_classes=1000),
        dict(img_size=518, patch_size=14, embed_dim=768, depth=12, num_heads=12),
        dict(latent_dim=768, width=1152, depth=28, num_heads=16, mlp_dim=4096, patch_size=16, grid=16), 224)}


def medians(repeats, functions):
    """Median seconds of each function {name: f}; they take turns, so that a busy machine hits all alike."""
    seconds = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}


def build(size, device):
    """(generator, RAE, side of an image) with random weights; on "meta" they have shapes alone."""
    teacher, encoder, decoder, input_size = SIZES[size]
    stat = (teacher["in_channels"], teacher["input_size"], teacher["input_size"])
    with torch.device(device):
        model, vit, decode = dr.DiTDH(**teacher).eval(), dr.ViT(**encoder), dr.Decoder(**decoder)
        rae = dr.RAE(vit, decode, torch.zeros(stat), torch.ones(stat), input_size)
    return model, rae, decoder["grid"] * decoder["patch_size"]


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def class_flops(size, cfg):
    """{part of one class of a step: FLOPs}, counted on tensors without content."""
    model, rae, side = build(size, "meta")
    z = torch.empty(cfg.n_neg + cfg.n_extra_neg, *rae.mean.shape, device="meta")
    y = torch.zeros(len(z), dtype=torch.long, device="meta")
    forward = flops(lambda: dr.one_step(model, z[:1], y[:1]))
    images = torch.empty(1, 3, side, side, device="meta")
    again = cfg.n_neg if cfg.grad_checkpoint else 0
    print(f"generator {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, autoencoder "
          f"{sum(p.numel() for p in rae.parameters()) / 1e6:.1f} M")
    return {"generator": forward * (3 * cfg.n_neg + again + cfg.n_extra_neg),
            "encoder": cfg.n_pos * flops(lambda: rae.encode(images))}


def bench_class(size, cfg):
    """Print what one class of a step, its parts, the optimizer and sampling take -> seconds of a class."""
    model, rae, side = build(size, cfg.device)
    model.grad_checkpoint = cfg.grad_checkpoint
    net = torch.compile(model, dynamic=False) if cfg.compile else model
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, fused=True)
    images = torch.randint(256, (cfg.n_pos, side, side, 3), dtype=torch.uint8)
    shape = (model.in_channels, model.input_size, model.input_size)
    counts = (cfg.n_pos, cfg.n_neg, cfg.n_extra_neg)
    pos, gen, extra = (torch.randn(n, *shape, device=cfg.device) for n in counts)
    labels = torch.zeros(cfg.batch_size, dtype=torch.long)
    z = torch.randn(cfg.batch_size, *shape, device=cfg.device)

    def step(classes):
        dr.train_step(net, ema, optimizer, [(c, pos) for c in range(classes)], 0, cfg)

    @torch.no_grad()
    def one_step():
        with dr.autocast(cfg):
            dr.one_step(model, z, labels.to(cfg.device))

    s = medians(5, {"two": partial(step, 2), "one": partial(step, 1),
                    "encoder": lambda: dr.encode(rae, images, cfg),
                    "drift": lambda: dr.drift_loss(dr.tokens(gen), dr.tokens(pos), dr.tokens(extra)),
                    "one step": one_step, "decoder": torch.no_grad()(lambda: rae.decode(z)),
                    "images": lambda: dr.generate(partial(dr.one_step, model), rae, labels, cfg)})
    a_class = s["two"] - s["one"] + s["encoder"]
    optimize = max(0.0, 2 * s["one"] - s["two"])
    whole = cfg.n_class * a_class + optimize
    print(f"one class {1e3 * a_class:.1f} ms, of which encoder {s['encoder'] / a_class:.1%} and the drift "
          f"{s['drift'] / a_class:.1%}; optimizer {1e3 * optimize:.1f} ms a step of {cfg.n_class} classes")
    print(f"{cfg.steps} steps: {cfg.steps * whole / 3600:.3g} hours on one such device")
    speed = {name: cfg.batch_size / s[name] for name in ("one step", "decoder", "images")}
    print(f"sampling, images/s: generator {speed['one step']:.0f}, decoder {speed['decoder']:.0f}, with noise and "
          f"bytes {speed['images']:.0f}, {cfg.batch_size} a batch")
    return a_class


def bench_field(device, C=256, N=64, M=256, P=256, D=768):
    x, pos, extra = (torch.randn(C, n, D, device=device) for n in (N, P, M - N))
    neg, targets = torch.cat([x, extra], 1), torch.randn(C, M + P, D, device=device)
    weights = torch.rand(C, N, M + P, device=device)
    s = medians(7, {"products": lambda: (x @ targets.mT, weights @ targets),
                    "field": lambda: dr.drift_field(x, pos, neg, 0.05, 39.0)})
    print(f"drift_field: {C} tokens, {N} queries, {M} negatives, {P} positives, D = {D}: {s['field']:.4f} s, "
          f"{s['field'] / s['products']:.2f} times its two products alone")


def bench_frechet(dim=2048):
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal((2 * dim, dim)) * np.linspace(1, 0.1, dim) for _ in range(2)]
    stats = [part for x in samples for part in (x.mean(0), np.cov(x, rowvar=False))]

    def with_sqrtm(mu1, sigma1, mu2, sigma2):  # pytorch-fid's way
        covariance = np.trace(sigma1 + sigma2) - 2 * np.trace(sqrtm(sigma1 @ sigma2)).real
        return np.square(mu1 - mu2).sum() + covariance

    s = medians(3, {"ours": lambda: frechet_distance(*stats), "sqrtm": lambda: with_sqrtm(*stats)})
    difference = abs(frechet_distance(*stats) / with_sqrtm(*stats) - 1)
    print(f"Fréchet distance, D = {dim}: {s['ours']:.2f} s, with sqrtm {s['sqrtm'] / s['ours']:.1f} times that; "
          f"relative difference {difference:.0e}")


def product_rate(n=8192):
    """FLOP/s of a large bf16 matrix product."""
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    return 2 * n**3 / medians(10, {"product": lambda: a @ a})["product"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="digits")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--grad-checkpoint", action="store_true")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    cfg = dr.Config(preset=args.size, **dr.PRESETS[args.size] | dict(
        compile=args.compile, grad_checkpoint=args.grad_checkpoint, device="cuda" if gpu else "cpu"))
    parts = class_flops(args.size, cfg)
    total = sum(parts.values())
    print(f"one class {total / 1e12:.4g} TFLOP, the encoder's share {parts['encoder'] / total:.1%}; a step of "
          f"{cfg.n_class} classes {cfg.n_class * total / 1e12:.4g} TFLOP")
    if args.size == "imagenet256" and not gpu:
        return print("the rest needs a GPU: seconds, memory, hours")
    seconds = bench_class(args.size, cfg)
    print(f"{total / seconds / 1e12:.3g} TFLOP/s over a class")
    if gpu:
        rate = product_rate()
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(f"{torch.cuda.get_device_name()}: a bf16 product reaches {rate / 1e12:.0f} TFLOP/s, a class "
              f"{total / seconds / rate:.0%} of that; at most {memory:.1f} GB")
    bench_field(cfg.device)
    bench_frechet()


if __name__ == "__main__":
    main()
