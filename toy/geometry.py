"""Section 3.2 on our own latents: is the space concentrated, do its flows bend, does drifting work in it?

    python toy/geometry.py                       8½ minutes on 2 CPU cores: two pictures, geometry.json
    python toy/geometry.py --quick               the same with fewer widths, seeds and steps, 1 minute
    python toy/geometry.py --latents FILE.pt     Tables 1 and 2 of anybody's latents: {"latents", "labels"}

    Theorem 1     theorem1                        Figure 1    curvature
    Tables 1, 2   token_statistics, Eq. (47)-(53) Table 9     study: distil, and train from scratch

The digits' RAE (that of OUT/teacher.pt, made if it is not there: 3 minutes more) against VAEs trained on the same
pixels with the same grid of 2×2 tokens, at several widths; the VAEs, flows and students anew with each seed. All is
measured on normalised latents, the ones that a flow and the drifting loss see. A VAE's latent is a sample of its
posterior, as latent diffusion trains on; the posterior's mean is listed too.
"""
import argparse
import copy
import csv
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (RAE, Config, Decoder, DiTDH, ViT, distances, flow_matching_loss, generate,  # noqa: E402
                       load_rae, ode_sample, one_step, read_checkpoint, signed_weights, to_float, to_uint8, tokens,
                       train)
from eval_fid import Parser, UserError, exit_code, write_atomically  # noqa: E402
from toy.digits import DECODER, ENCODER, fit, make_teacher, pixel_metrics  # noqa: E402

DIT = dict(input_size=2, depth=(1, 1), num_heads=(4, 4), num_classes=10, class_dropout_prob=0.0)
DRIFT = dict(n_class=2, n_pos=64, n_neg=64, n_extra_neg=0, lr=3e-3, ema=0.98, save_every=10**9)
COLOURS = ("#c8102e", "#f2a900", "#2a9d3a", "#1f6fc0", "#7b3fa0", "#e377c2", "#17a2b8", "#8c564b")
METHODS = ("autoencoder", "untrained", "teacher", "distilled", "scratch")

# ----------------------------------------------------------------------------------------------------
# Theorem 1: scattered targets share the weight, and the field loses its direction.

# r, or None for √(3/d), which makes x as long as y; τ; whether it is in mean distances S, the unit of the paper's τ.
# (Pillow's own font has neither τ nor ‖.)
SETTINGS = {"r = 1, tau = 1": (1.0, 1.0, False), "r = 1, tau = 4": (1.0, 4.0, False),
            **{f"|x| = |y|, tau = {t} S": (None, t, True) for t in (0.2, 0.05, 0.02)}}


def theorem1(d, r, tau, in_mean_distances, queries=64, draws=1, seed=0):
    """The field at `queries` of the d generated x_j ~ U[−r,r]^d; d positives y_i uniform on the unit sphere.

    -> E‖V⁺‖² (Theorem 1: 1/d), E‖V⁻‖ (r/√3), and 1/Σw² over the number of targets, of positives and negatives:
    that is 1/(1 + c²), c the weights' standard deviation over their mean, so 1 where they are uniform.
    """
    g, r, rows = torch.Generator().manual_seed(seed), r or (3 / d)**0.5, []
    for _ in range(draws):
        y = F.normalize(torch.randn(1, d, d, generator=g), dim=-1)          # [1,d,d]
        x = (2 * torch.rand(1, d, d, generator=g) - 1) * r
        dist = distances(x[:, :queries], torch.cat([x, y], 1))              # [1,Q,2d]
        w = signed_weights(dist / -(tau * dist.mean() if in_mean_distances else tau), d)
        w_neg, w_pos = -w[..., :d], w[..., d:]
        rows.append(((w_pos @ y).square().sum(-1).mean(), (w_neg @ x).norm(dim=-1).mean(),
                     (1 / w_pos.square().sum(-1)).mean() / d, (1 / w_neg.square().sum(-1)).mean() / (d - 1)))
    v_pos2, v_neg, even_pos, even_neg = np.mean(rows, 0).tolist()
    return {"d": d, "r": r, "v_pos2": v_pos2, "v_pos2_times_d": v_pos2 * d, "v_neg": v_neg,
            "v_neg_over_limit": v_neg / (r / 3**0.5), "share_positives": even_pos, "share_negatives": even_neg}


# ----------------------------------------------------------------------------------------------------
# Tables 1 and 2, for x [C,n,d]: n samples of one class in each of C tokens -> [C].


def spectrum(x):
    """Eigenvalues of each token's covariance over their sum, [C,d]."""
    x = x - x.mean(1, keepdim=True)
    mu = torch.linalg.eigvalsh(x.mT @ x).clamp(min=0)
    return mu / mu.sum(1, keepdim=True).clamp(min=1e-300)


def participation_ratio(x):
    """Eq. (47): (Σμ)²/(d·Σμ²), in [1/d, 1]; 1 is isotropic."""
    return 1 / (x.shape[2] * spectrum(x).square().sum(1))


def spectral_entropy(x):
    """Eq. (48): exp(−Σ p log p)/d, in [1/d, 1]; 1 is isotropic."""
    return torch.special.entr(spectrum(x)).sum(1).exp() / x.shape[2]


def nearest_distance(x):
    """Eq. (49), NN-d: mean distance to the nearest other sample of the class, over √d."""
    dist = torch.cdist(x, x)
    dist.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return dist.amin(2).mean(1) / x.shape[2]**0.5


def pole_mmd(x):
    """Eq. (50)-(53), S-MMD: squared MMD between centred samples and the poles ±ρ·e_i, ρ the samples' mean norm.

    Kernel exp(−‖x − y‖/√d); the self-pairs count (the V-statistic), so it is never negative.
    """
    x, d = x - x.mean(1, keepdim=True), x.shape[2]
    eye = torch.eye(d, dtype=x.dtype)
    poles = torch.cat([eye, -eye]) * x.norm(dim=-1).mean(1).view(-1, 1, 1)  # [C,2d,d]

    def kernel(a, b):
        return (-torch.cdist(a, b) / d**0.5).exp().mean((1, 2))

    return kernel(x, x) + kernel(poles, poles) - 2 * kernel(x, poles)


STATISTICS = {"PR": participation_ratio, "SE": spectral_entropy, "NN-d": nearest_distance, "S-MMD": pole_mmd}


@torch.no_grad()
def token_statistics(latents, labels):
    """latents [n,D,h,w], labels [n] -> mean of each statistic over all classes and tokens (App. B.1), in float64."""
    values = {name: [] for name in STATISTICS}
    for c in tqdm(labels.unique(), desc="classes", leave=False, disable=None):
        for x in tokens(latents[labels == c]).split(8):                     # [8,n,D]: bounded memory
            for name, statistic in STATISTICS.items():
                values[name].append(statistic(x.double()))
    return {name: torch.cat(v).mean().item() for name, v in values.items()}


def read_latents(path):
    """(latents float [n,D,h,w], labels [n]) of --latents, or a UserError."""
    file = read_checkpoint(path)
    latents, labels = file.get("latents"), file.get("labels")
    if not (torch.is_tensor(latents) and torch.is_tensor(labels) and latents.ndim == 4 and latents.numel()
            and labels.shape == latents.shape[:1]):
        raise UserError(f"{path} must be a dict with tensors `latents` [n,D,h,w] and `labels` [n]")
    if not latents.is_floating_point() or not latents.isfinite().all():
        raise UserError(f"{path}: the latents must be finite floating-point numbers")
    if labels.unique(return_counts=True)[1].min() < 2:
        raise UserError(f"{path}: each class needs at least two samples")
    return latents, labels


# ----------------------------------------------------------------------------------------------------
# Spaces: a frozen autoencoder, and what drifting and the flow draw from it.


class Space:
    """Normalised latents of the real images, mean + σ·n: σ is 0 in the RAE, a VAE's posterior is sampled afresh."""

    def __init__(self, rae, mean, sigma, labels, seed):
        self.rae, self.mean, self.sigma, self.seed = rae, mean, sigma, seed         # [n,D,h,w]
        self.members = [np.flatnonzero(labels == c) for c in range(10)]

    def draw(self, index=slice(None)):
        return self.mean[index] + self.sigma[index] * torch.randn_like(self.mean[index])

    def stream(self, pairs):  # what train() asks of its positives
        for step, c in pairs:
            rng = np.random.default_rng([self.seed, step, c])
            index = rng.choice(self.members[c], DRIFT["n_pos"], replace=False)
            noise = rng.standard_normal((len(index), *self.mean.shape[1:]), dtype=np.float32)
            yield self.mean[index] + self.sigma[index] * torch.from_numpy(noise)


def make_vae(images, labels, width, kl, steps, seed):
    """A VAE on the RAE's token grid, of `width` channels, from images [n,3,8,8] -> Space.

    Bernoulli likelihood of the pixels plus kl times the divergence of the posterior from N(0, I), both summed over an
    image. Encoder and decoder are smaller than the RAE's, of one block; no labels.
    """
    body = ViT(**ENCODER | dict(depth=1, num_registers=0))
    mean, log_var = nn.Linear(48, width), nn.Linear(48, width)
    decoder = Decoder(**DECODER | dict(latent_dim=width, width=64, depth=1, mlp_dim=128))
    still = torch.zeros(width, 2, 2), torch.ones(width, 2, 2)
    to_mean, to_log_var = (RAE(nn.Sequential(body, head), decoder, *still, input_size=8) for head in (mean, log_var))
    parts = nn.ModuleList([body, mean, log_var, decoder]).requires_grad_(True)

    def loss(i):
        m, v = to_mean.encode(images[i]), to_log_var.encode(images[i])      # [B,D,2,2]
        logits = 4 * (to_mean.decode(m + (v / 2).exp() * torch.randn_like(m)) - 0.5)    # as in toy/digits.py
        nll = F.binary_cross_entropy_with_logits(logits, images[i], reduction="sum") / 3    # three equal channels
        return (nll + kl * 0.5 * (m.square() + v.exp() - 1 - v).sum()) / (64 * len(i))

    fit(parts.parameters(), loss, steps, 3e-3, seed, "VAE", n=len(images))
    parts.requires_grad_(False)
    m, sigma = to_mean.encode(images), (to_log_var.encode(images) / 2).exp()
    vae = RAE(to_mean.encoder, decoder, m.mean(0), m.var(0) + sigma.square().mean(0), input_size=8)
    return Space(vae, vae.encode(images), sigma / (vae.var + vae.eps).sqrt(), labels, seed)


def curvature(path):
    """path [K,n,…], n curves at equal steps of time -> κ = ‖x''⊥‖/‖x'‖² [K−2,n], and the angle each turns [n]."""
    x = path.flatten(2).double()
    v, a = (x[2:] - x[:-2]) / 2, x[2:] - 2 * x[1:-1] + x[:-2]               # the step of time cancels in κ
    a = a - (a * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v
    turn = a.norm(dim=-1) / v.norm(dim=-1)                                  # in a step
    return turn / v.norm(dim=-1), turn.sum(0)


def flow_curvature(teacher, shape, points=50, n=32):
    """κ [points−2,n] along the teacher's paths from noise to data, and the angle turned [n]."""
    path = []

    def record(x, t, y):
        path.append(x)
        return teacher(x, t, y)

    z = torch.randn(n, *shape)
    path.append(ode_sample(record, z, torch.arange(n) % 10, points))
    return curvature(torch.stack(path))


# ----------------------------------------------------------------------------------------------------
# Table 9's question, one space and seed at a time: does drifting work here?


def judge(sampler, space, images, labels, cfg):
    """Pixel metrics of a sample for each real image, and the spread of latents in a class, generated over real."""
    latents = []

    def kept(z, y):
        latents.append(sampler(z, y))
        return latents[-1]

    samples = torch.cat([images for _, images, _ in generate(kept, space.rae, labels, cfg)])
    generated, real = ([x[i].var(0).sum() for i in space.members] for x in (torch.cat(latents), space.draw()))
    return pixel_metrics(samples, labels, images, labels) | {"spread": (sum(generated) / sum(real)).sqrt().item()}


def drifted(student, space, cfg):
    """(moving average of the student after train(), means of what the last tenth of its log says)."""
    with tempfile.TemporaryDirectory() as cfg.out:
        ema, _ = train(student.eval(), space, cfg)
        rows = list(csv.DictReader(Path(cfg.out, "log.csv").read_text().splitlines()))
    keys, rows = ("v_pos", "v_neg", "effective_positives"), rows[-max(1, len(rows) // 10):]
    return ema, {k: float(np.mean([float(row[k]) for row in rows])) for k in keys}


def study(job):
    """Everything about one space and seed: (name, width of the VAE or None, seed, teacher.pt, KL weight, steps)."""
    name, width, seed, path, kl, (vae_steps, flow_steps, drift_steps) = job
    torch.set_num_threads(1)  # small tensors; and the same bits however many workers there are
    torch.manual_seed(seed)
    checkpoint = read_checkpoint(path)
    images, labels = checkpoint["images"], checkpoint["labels"]             # the digits travel in the teacher's file
    pixels, cfg = to_float(images), Config(device="cpu", seed=seed, steps=drift_steps, **DRIFT)
    if width:
        space = make_vae(pixels, labels, width, kl, vae_steps, seed)
    else:
        rae = load_rae(checkpoint, cfg)
        mean = rae.encode(pixels)
        space = Space(rae, mean, torch.zeros_like(mean), labels, seed)
    real, shape = space.draw(), space.mean.shape[1:]
    decoded = to_uint8(space.rae.decode(real))
    head = max(160, -(-shape[0] // 16) * 16)  # a head narrower than the token could not take its noise away
    fresh = DiTDH(in_channels=shape[0], hidden_size=(64, head), **DIT)
    nn.init.normal_(fresh.y_embedder["embedding_table"].weight)  # at DiT's 0.02 a class takes too long to learn
    teacher = copy.deepcopy(fresh)
    fit(teacher.parameters(), lambda i: flow_matching_loss(teacher, space.draw(i), labels[i]), flow_steps, 5e-3, seed,
        "flow", batch=64, n=len(images))
    teacher.eval()
    kappa, angle = flow_curvature(teacher, shape)
    distilled, distilled_log = drifted(copy.deepcopy(teacher), space, cfg)
    scratch, scratch_log = drifted(copy.deepcopy(fresh), space, cfg)
    results = {"autoencoder": pixel_metrics(decoded, labels, images, labels)}
    results["autoencoder"]["pixel_error"] = ((decoded > 127) != (images > 127)).double().mean().item()
    results["teacher"] = judge(lambda z, y: ode_sample(teacher, z, y, 20), space, images, labels, cfg)
    for method, model, log in (("untrained", fresh.eval(), {}), ("distilled", distilled, distilled_log),
                               ("scratch", scratch, scratch_log)):
        results[method] = judge(lambda z, y: one_step(model, z, y), space, images, labels, cfg) | log
    statistics = {name: token_statistics(real, labels)}
    if width:
        spread = space.mean.std(0) + 1e-9  # the means alone, normalised like everything else
        statistics[f"{name}, mean"] = token_statistics((space.mean - space.mean.mean(0)) / spread, labels)
    if seed == 0 and width != 48:                       # RAE-48 has it already
        statistics[f"N(0, I), {shape[0]} wide"] = token_statistics(torch.randn_like(real), labels)
    return {"space": name, "seed": seed, "sigma": space.sigma.mean().item(), "results": results,
            "statistics": statistics, "kappa": kappa.tolist(), "angle": angle.tolist()}


def silence():
    sys.stderr = open(os.devnull, "w")  # the bars of two workers would overwrite each other's


# ----------------------------------------------------------------------------------------------------
# Pictures.


def panel(title, x_label, lines, x_ticks, x_log, size):
    """One plot with a logarithmic y axis. lines: (colour, x [n], y [n], (low [n], high [n]) or None)."""
    k, left, right, top, bottom = 2, 66, 30, 40, 54  # drawn twice as large, for smooth lines
    values = np.log10(np.concatenate([np.concatenate([y, *(band or ())]) for _, _, y, band in lines]))
    pad = 0.05 * np.ptp(values) + 0.02
    low, high, sx = values.min() - pad, values.max() + pad, np.log if x_log else np.asarray
    first, last = sx(x_ticks[0]), sx(x_ticks[-1])

    def points(x, y):
        px = left + (size[0] - left - right) * (sx(x) - first) / (last - first)
        py = top + (size[1] - top - bottom) * (high - np.log10(y)) / (high - low)
        return [(k * float(i), k * float(j)) for i, j in np.broadcast(px, py)]

    image = Image.new("RGB", (k * size[0], k * size[1]), "white")
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(size=k * 14)
    for value in (m * 10.0**e for e in range(-9, 9) for m in ((1,) if high - low > 2.2 else (1, 2, 5))):
        if low <= np.log10(value) <= high:
            draw.line(points(x_ticks[[0, -1]], value), fill="#dddddd", width=k)
            draw.text((k * (left - 6), points(x_ticks[0], value)[0][1]), f"{value:g}", "black", font, anchor="rm")
    for x in x_ticks:
        px, py = points(x, 10**low)[0]
        draw.line([(px, py), (px, py + k * 5)], fill="black", width=k)
        draw.text((px, py + k * 8), f"{x:g}", "black", font, anchor="ma")
    for colour, x, _, band in lines:
        if band:
            draw.polygon(points(x, band[0]) + points(x, band[1])[::-1], fill=colour + "28")
    for colour, x, y, _ in lines:
        draw.line(points(x, y), fill=colour, width=k * 2)
    draw.rectangle([k * left, k * top, k * (size[0] - right), k * (size[1] - bottom)], outline="black", width=k)
    draw.text((k * left, k * 12), title, "black", ImageFont.load_default(size=k * 16))
    draw.text((k * (left + size[0] - right) / 2, k * (size[1] - 6)), x_label, "black", font, anchor="mb")
    return image.resize(size, Image.LANCZOS)


def figure(panels, legend, path):
    """Panels side by side, and under them the legend {label: colour}."""
    image = Image.new("RGB", (sum(p.width for p in panels), panels[0].height + 34), "white")
    for i, p in enumerate(panels):
        image.paste(p, (i * p.width, 0))
    draw, font, x, y = ImageDraw.Draw(image), ImageFont.load_default(size=15), 20, panels[0].height + 16
    for label, colour in legend.items():
        draw.line([(x, y), (x + 26, y)], fill=colour, width=3)
        draw.text((x + 32, y), label, "black", font, anchor="lm")
        x += 54 + draw.textlength(label, font)
    write_atomically(path, lambda f: image.save(f, format="png"))


def draw_theorem1(rows, path):
    dims, colours, panels = np.unique([float(r["d"]) for r in rows]), dict(zip(SETTINGS, COLOURS)), []
    for key, title, limit in (("v_pos2", "E |V+|^2", 1 / dims), ("v_neg_over_limit", "|V-| / (r / sqrt 3)", dims**0),
                              ("share_positives", "effective share of the positives", dims**0)):
        lines = [(c, dims, np.array([r[key] for r in rows if r["setting"] == s]), None) for s, c in colours.items()]
        panels.append(panel(title, "d", [("#000000", dims, limit, None), *lines], dims[::2], True, (420, 340)))
    figure(panels, {"Theorem 1": "#000000", **colours}, path)


def draw_curvature(runs, path):
    """κ over t: the mean over all seeds' trajectories, band from the 10th to the 90th percentile."""
    colours, lines = dict(zip(dict.fromkeys(r["space"] for r in runs), COLOURS)), []
    for name, colour in colours.items():
        kappa = np.concatenate([np.array(r["kappa"]) for r in runs if r["space"] == name], 1)   # [K−2,n]
        t = 1 - np.linspace(0, 0.999, len(kappa) + 2)[1:-1]                 # the grid of ode_sample
        lines.append((colour, t, kappa.mean(1), tuple(np.quantile(kappa, (0.1, 0.9), axis=1))))
    title = "curvature of the teacher's paths (t = 1: noise, t = 0: data)"
    figure([panel(title, "t", lines, np.linspace(0, 1, 6), False, (900, 420))], colours, path)


# ----------------------------------------------------------------------------------------------------
# Tables and command line.


def mean_sd(values, digits=3):
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if np.ptp(values) else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def print_theorem1(rows):
    print("\nTheorem 1: d·E‖V⁺‖², ‖V⁻‖/(r/√3), effective share of positives, of negatives. All are 1 in the limit.")
    for r in rows:
        print(f"{r['setting'] if r['d'] == 4 else '':26}{r['d']:6}" + "".join(f"{r[k]:9.3f}" for k in (
            "v_pos2_times_d", "v_neg_over_limit", "share_positives", "share_negatives")))


def print_tables(runs):
    """Mean ± standard deviation over the seeds."""
    names = list(dict.fromkeys(r["space"] for r in runs))
    print(f"\n{'Tables 1, 2':20}" + "".join(f"{s:>17}" for s in STATISTICS))
    for row in dict.fromkeys(k for r in runs for k in r["statistics"]):
        values = [r["statistics"][row] for r in runs if row in r["statistics"]]
        print(f"{row:20}" + "".join(f"{mean_sd([v[s] for v in values], 4):>17}" for s in STATISTICS))
    print(f"\n{'Figure 1':20}{'mean curvature':>17}{'angle turned':>17}")
    for name in names:
        kappa, angle = ([np.mean(r[key]) for r in runs if r["space"] == name] for key in ("kappa", "angle"))
        print(f"{name:20}{mean_sd(kappa, 4):>17}{mean_sd(angle):>17}")
    columns = ("fd", "precision", "recall", "label_accuracy", "spread", "effective_positives")
    print(f"\n{'Table 9':20}" + "".join(f"{c.replace('effective', 'eff.'):>17}" for c in columns))
    for name, method in ((name, method) for name in names for method in METHODS):
        results = [r["results"][method] for r in runs if r["space"] == name]
        cells = [mean_sd([m[c] for m in results]) if c in results[0] else "" for c in columns]
        print(f"{name + ' ' + method:20}" + "".join(f"{c:>17}" for c in cells))


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder for the pictures and geometry.json; the digits' "
                        "teacher.pt is there, or is put there (default: out)")
    parser.add_argument("--quick", action="store_true", help="1 minute: --seeds 1 --widths 4 128 --steps 100 150 60, "
                        "Theorem 1 up to d = 1024; too short to judge drifting by")
    parser.add_argument("--latents", help="print Tables 1 and 2 of this file, as it is, and do nothing else")
    parser.add_argument("--widths", type=int, nargs="+", metavar="D", help="VAEs' channels (default: 4 16 48 128)")
    parser.add_argument("--kl", type=float, default=1e-2, help="weight of the VAEs' KL term (default: 0.01)")
    parser.add_argument("--seeds", type=int, help="repetitions, of VAE, teacher and students alike (default: 3)")
    parser.add_argument("--steps", type=int, nargs=3, metavar="N", help="steps of VAE, flow teacher and each student "
                        "(default: 250 500 250)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of a thread each; the numbers do not "
                        "depend on it (default: 2)")
    args = parser.parse_args(argv)
    standard = ([4, 128], 1, [100, 150, 60]) if args.quick else ([4, 16, 48, 128], 3, [250, 500, 250])
    args.widths, args.seeds, args.steps = (value if given is None else given for given, value in
                                           zip((args.widths, args.seeds, args.steps), standard))
    if len(args.widths) >= len(COLOURS):
        parser.error(f"--widths takes at most {len(COLOURS) - 1}: a colour each in curvature.png")
    if min(*args.widths, args.seeds, args.workers) < 1 or min(args.steps) < 11 or not 0 <= args.kl < float("inf"):
        parser.error("--widths, --seeds and --workers must be at least 1, --steps at least 11, --kl at least 0")
    return args


def simulate(largest):
    """Theorem 1's table: a row for each setting and d = 4, 8, … largest; as many draws as make 1024 queries."""
    rows, dims = [], [2**k for k in range(2, 13) if 2**k <= largest]
    with tqdm(total=len(SETTINGS) * len(dims), desc="Theorem 1") as bar:
        for setting, values in SETTINGS.items():
            for d in dims:
                draws = 1024 // min(64, d) if d <= 256 else 2
                rows.append({"setting": setting, **theorem1(d, *values, draws=draws)})
                bar.update()
    return rows


def run(args):
    began, out = time.perf_counter(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    teacher = out / "teacher.pt"
    if not teacher.exists():
        make_teacher(teacher)
    if read_checkpoint(teacher).get("rae", {}).get("input_size") != 8:
        raise UserError(f"{teacher} brings no autoencoder of the digits: take another --out, or move that file away")
    theorem = simulate(1024 if args.quick else 4096)
    draw_theorem1(theorem, out / "theorem1.png")
    print_theorem1(theorem)
    spaces = {"RAE-48": None, **{f"VAE-{d}": d for d in args.widths}}
    jobs = [(*space, seed, teacher, args.kl, args.steps) for space in spaces.items() for seed in range(args.seeds)]
    with multiprocessing.get_context("spawn").Pool(min(args.workers, len(jobs)), silence) as pool:
        runs = list(tqdm(pool.imap(study, jobs), total=len(jobs), desc="spaces × seeds"))
    seconds = time.perf_counter() - began
    result = {"config": vars(args), "seconds": seconds, "theorem1": theorem, "runs": runs}
    write_atomically(out / "geometry.json", lambda f: f.write(json.dumps(result).encode()))
    draw_curvature(runs, out / "curvature.png")
    print_tables(runs)
    print(f"\n{seconds:.0f} s: see theorem1.png, curvature.png and geometry.json in {out}")


@exit_code
def main(argv):
    args = parse(argv)
    if not args.latents:
        return run(args)
    for name, value in token_statistics(*read_latents(args.latents)).items():
        print(f"{name:6} {value:.6f}")


if __name__ == "__main__":
    sys.exit(main())
