"""Speeds, as ratios of medians taken in one run: python tests/bench.py (a script, not a test; run it on an idle machine).

1. drift_field, with its softmax and norms, against its two batched matrix products alone, at the paper's size.
2. Where the time of one digits class-step goes.
3. Fréchet distance against scipy.linalg.sqrtm.
"""
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from eval_fid import frechet_distance  # noqa: E402
from toy.digits import TEACHER  # noqa: E402


def medians(repeats, **functions):
    """Median seconds of each function; they take turns, so that a busy machine hits all alike."""
    seconds = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}


def bench_field(C=256, N=64, M=256, P=256, D=768):
    x, pos, extra = (torch.randn(C, n, D) for n in (N, P, M - N))
    neg, targets, weights = torch.cat([x, extra], 1), torch.randn(C, M + P, D), torch.rand(C, N, M + P)
    s = medians(7, products=lambda: (x @ targets.mT, weights @ targets),
                field=lambda: dr.drift_field(x, pos, neg, 0.05, 39.0))
    print(f"field: {C} tokens, {N} queries, {M} negatives, {P} positives, D = {D}: {s['field']:.3f} s, "
          f"its two products alone {s['products']:.3f} s, ratio {s['field'] / s['products']:.2f}")


def bench_step():
    cfg = dr.Config()
    model = dr.DiTDH(**TEACHER).eval()
    opt = dr.optimizer(model, cfg)
    z, extra = torch.randn(cfg.n_neg, 48, 2, 2), torch.randn(cfg.n_extra_neg, 48, 2, 2)
    pos, y = torch.randn(cfg.n_pos, 48, 2, 2), torch.zeros(cfg.n_neg, dtype=torch.long)

    def no_grad_forward():
        with torch.no_grad():
            dr.one_step(model, extra, y[:1].expand(len(extra)))

    s = medians(20, **{
        "generator, forward and backward": lambda: dr.one_step(model, z, y).sum().backward(),
        **({"detached negatives": no_grad_forward} if cfg.n_extra_neg else {}),
        "drift": lambda: dr.drift_loss(dr.tokens(z), dr.tokens(pos), dr.tokens(extra)),
        f"optimizer (a {cfg.n_class}th of a step)": opt.step})
    s[f"optimizer (a {cfg.n_class}th of a step)"] /= cfg.n_class
    print("digits, one class of one step: " + ", ".join(f"{n} {v / sum(s.values()):.1%}" for n, v in s.items())
          + f" of {1e3 * sum(s.values()):.1f} ms")


def bench_frechet(dim=2048):
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal((2 * dim, dim)) * np.linspace(1, 0.1, dim) for _ in range(2)]
    stats = [part for x in samples for part in (x.mean(0), np.cov(x, rowvar=False))]

    def with_sqrtm(mu1, sigma1, mu2, sigma2):  # pytorch-fid's way
        return np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2) - 2 * np.trace(sqrtm(sigma1 @ sigma2)).real

    s = medians(3, ours=lambda: frechet_distance(*stats), sqrtm=lambda: with_sqrtm(*stats))
    print(f"Fréchet distance, D = {dim}: {s['ours']:.2f} s, with sqrtm {s['sqrtm']:.2f} s, ratio "
          f"{s['sqrtm'] / s['ours']:.1f}; relative difference {abs(frechet_distance(*stats) / with_sqrtm(*stats) - 1):.0e}")


if __name__ == "__main__":
    bench_field()
    bench_step()
    bench_frechet()
