"""Why drifting works and where it fails: two moons hidden in R^D.

    python toy/two_moons.py [--out out] [--quick]      table, two_moons.json, two_moons.png, two_moons.gif

The moons lie in a random plane of R^D. The other D − 2 directions hold Gaussian noise: σ = 0.1 in the
concentrated regime; σ = 1, the moons' own scale, in the scattered one. A small MLP makes points of R^D from
8 noise dimensions. It starts at the scale of the scattered data and is trained with drift_loss.

Look at the spread in the plane, generated over real: 1 is right, 0 a collapse. Means of 3 seeds at
D = 8, 32, 128, 512: concentrated 1.00, 0.99, 0.94, 0.83; scattered 1.04, 1.05, 0.36, 0.09.

Theorem 1 (§3.2) says why. Scattered points are all about equally far apart. So the softmax over the positives
is nearly uniform, and the attraction's centre Σ w·y averages many directions: it is short (column |Σwy|).
The samples have near neighbours among themselves, being made from 8 dimensions. So Σ w·x stays near x_j, and
the target x_j + Σ w·y − Σ w·x lies near Σ w·y, at the origin. This half is our reading.

A cure, "features": the loss on φ(G(z)) and φ(y), as Deng et al. do with an MAE. A control, "identity path":
G(z) = z + MLP(z), z in R^D, is as scattered as the data. It does not collapse, and hardly learns.
"""
import json
import math
import multiprocessing
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (command, drift_field, drift_loss, laplace_noise, write_atomically,  # noqa: E402
                       y_softmax_field)
from toy.plot import COLOURS, Axes, sheet  # noqa: E402

SIGMA = {"concentrated": 0.1, "scattered": 1.0}   # of the noise outside the plane; in it the data's is 1
N, WIDTH, NOISE, LR = 128, 256, 8, 8e-3           # samples and positives a step; the MLP's layers and input
TAU = torch.tensor([0.02, 0.05, 0.2])[:, None, None]      # Table 8, as drift_loss has them: [T,1,1]
METHODS = {"drift-rae": {}, "baseline": {"y_softmax": True, "perturb": False},
           "perturb only": {"y_softmax": True}, "single softmax only": {"perturb": False},
           "features": {}, "identity path": {}}
FRAMES, VIEWS, EVALUATE = 32, 4096, 2000          # of the GIF; pairs for CCA; samples of an energy distance
LEGEND = "grey: data\ncolour: samples\narrows: push of the loss\naxes: standard deviations"
COLUMNS = {"energy_distance": "energy distance", "spread_ratio": "spread", "energy_floor": "floor",
           "attraction": "|Σwy|", "v_pos": "‖V⁺‖", "v_neg": "‖V⁻‖", "effective_positives": "eff. pos."}


def moons(n, generator):
    """Two interleaved half circles with noise 0.05, standardised by their exact moments: [n,2]."""
    angle = math.pi * torch.rand(n, generator=generator)
    sign = 1 - 2 * torch.randint(2, (n,), generator=generator)
    xy = torch.stack([sign * angle.cos() + (1 - sign) / 2, sign * angle.sin() + (1 - sign) / 4], 1)
    xy += 0.05 * torch.randn(n, 2, generator=generator)
    return (xy - torch.tensor([0.5, 0.25])) / torch.tensor([0.8675, 0.4967])


def embed(xy, frame, sigma, generator):
    """Points of the plane [n,2] -> R^D: frame [D,D] orthonormal, its first two columns span the plane."""
    rest = sigma * torch.randn(len(xy), len(frame) - 2, generator=generator)
    return torch.cat([xy, rest], 1) @ frame.T                               # [n,D]


def concentrating_map(frame, sigma, generator):
    """φ, R^D -> R^k: it keeps, whitened, what two noisy views of a moon point share (CCA). No labels."""
    xy = moons(VIEWS, generator)
    a, b = (embed(xy, frame, sigma, generator) for _ in range(2))           # [n,D]
    within = (a.T @ a + b.T @ b) / (2 * VIEWS)
    between = (a.T @ b + b.T @ a) / (2 * VIEWS)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))                # [D,D]
    correlation, directions = torch.linalg.eigh(whiten @ between @ whiten.T)
    projection = whiten.T @ directions[:, correlation > 0.9]                # [D,k]
    return lambda x: x @ projection


def mlp(noise, dim, std):
    """The generator: noise -> R^D, of standard deviation std at the start."""
    net = nn.Sequential(nn.Linear(noise, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(),
                        nn.Linear(WIDTH, dim))
    with torch.no_grad():
        net[-1].weight.mul_(std / net(torch.randn(EVALUATE, noise)).std(0).mean())
        net[-1].bias.zero_()
    return net


def energy_distance(a, b):
    """2·E‖a−b‖ − E‖a−a'‖ − E‖b−b'‖ over all pairs of [n,2] and [m,2]; about 0.002 between equals."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def forces(x, y, noise, y_softmax=False):
    """Of samples x [N,D], queried at x + τ·noise, and positives y [P,D], in units of S; means over τ and N.

    v_pos, v_neg: ‖V⁺‖ and ‖V⁻‖ of Eq. (5), measured from the query. effective_positives: 1/Σw².
    """
    query = x + TAU * noise                                                 # [T,N,D]
    logits = -torch.cdist(query, torch.cat([x, y])) / TAU                   # [T,N,N+P]
    logits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)                       # k ≠ j
    w_neg, w_pos = (part.softmax(-1) for part in logits.split([len(x), len(y)], -1))
    if y_softmax:                                                           # the weights of y_softmax_field
        affinity = (logits.softmax(-1) * logits.softmax(-2)).clamp(min=1e-6).sqrt()
        neg, pos = affinity.split([len(x), len(y)], -1)
        w_neg, w_pos = neg * pos.sum(-1, keepdim=True), pos * neg.sum(-1, keepdim=True)
    mass = w_pos.sum(-1, keepdim=True)                                      # that of w_neg too
    v_pos, v_neg = w_pos @ y - mass * query, w_neg @ x - mass * query       # [T,N,D]
    found = {"v_pos": v_pos.norm(dim=-1), "v_neg": v_neg.norm(dim=-1),
             "effective_positives": 1 / (w_pos / mass).square().sum(-1)}
    return {name: value.mean().item() for name, value in found.items()}


@torch.no_grad()
def measure(generate, draw, phi, plane, g, perturb=True, y_softmax=False):
    """The numbers of a row of two_moons.json; attraction: Theorem 1's ‖V⁺‖ = ‖Σ w·y‖, in units of ‖y‖."""
    x, y = phi(generate(N, g)), phi(draw(N, g))
    scale = torch.cdist(x, torch.cat([x, y])).mean()                        # S
    found = forces(x / scale, y / scale, laplace_noise(x, g) if perturb else 0, y_softmax)
    x, y, again = generate(EVALUATE, g), draw(EVALUATE, g), draw(EVALUATE, g)
    targets = phi(y[:N])
    centre = (-torch.cdist(phi(x[:N]), targets) / (scale * TAU)).softmax(-1) @ targets      # [T,N,D]
    found["attraction"] = (centre.norm(dim=-1).mean() / targets.square().sum(-1).mean().sqrt()).item()
    x, y, again = x @ plane, y @ plane, again @ plane
    return {"energy_distance": energy_distance(x, y), "energy_floor": energy_distance(again, y),
            "spread_ratio": (x.std(0).mean() / y.std(0).mean()).item(), **found}


def run_cell(cell):
    """cell -> a row of two_moons.json; shots: step, samples [3N,2], the loss's push on the first N [N,2]."""
    regime, dim, seed, method, steps, n_shots = cell
    torch.set_num_threads(1)     # cells side by side are faster than threads on one, and repeat bit for bit
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q
    plane = frame[:, :2]
    identity = method == "identity path"
    noise = dim if identity else NOISE
    net = mlp(noise, dim, 0 if identity else 1)
    field = y_softmax_field if "y_softmax" in METHODS[method] else drift_field
    perturb = METHODS[method].get("perturb", True)
    phi = concentrating_map(frame, SIGMA[regime], g) if method == "features" else nn.Identity()

    def draw(n, g):
        return embed(moons(n, g), frame, SIGMA[regime], g)

    def generate(n, g):
        z = torch.randn(n, noise, generator=g)
        return net(z) + z if identity else net(z)

    def loss(x, g):
        return drift_loss(phi(x)[None], phi(draw(N, g))[None], generator=g, field=field, perturb=perturb)[0].sum()

    when = {round(steps * (1 - i / max(n_shots - 1, 1))**1.5) for i in range(n_shots)}
    opt = torch.optim.AdamW(net.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - 0.99 * t / steps)
    shots = []
    for step in range(steps + 1):
        if step in when:
            same = torch.Generator().manual_seed(seed + 10**6)              # in all shots; g is left alone
            x = generate(3 * N, same).detach().requires_grad_()
            push = -torch.autograd.grad(loss(x[:N], same), x)[0][:N]
            shots.append((step, x.detach() @ plane, push @ plane))
        if step < steps:
            loss(generate(N, g), g).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            schedule.step()
    row = {"regime": regime, "dim": dim, "seed": seed, "method": method}
    return row | measure(generate, draw, phi, plane, g, **METHODS[method]), shots


def panel(key, shot, reach=2.7):
    """The plane; the push on 24 of the samples as arrows, of one root mean square length in all panels."""
    regime, dim, method = key
    step, samples, push = shot
    name = f"D = {dim} through a map" if method == "features" else f"{regime}, D = {dim}"
    title = f"{name}\nstep {step}, spread {samples.std(0).mean():.2f}"
    axes = Axes(title, "", "", (-reach, reach), (-reach, reach), size=(180, 214), font=12, right=8)
    data = moons(500, torch.Generator().manual_seed(0))
    for points, colour in ((data, "#c8c8c8"), (samples, COLOURS[regime == "scattered"])):
        axes.points(*points[points.abs().amax(1) < reach].T, colour, radius=1.4)
    arrows = 0.45 * push / push.square().sum(1).mean().sqrt().clamp(min=1e-12)
    for start, (x, y) in zip(samples[:24].numpy(), arrows.numpy()):
        ends = np.array([start, start + (x, y)])
        if abs(ends).max() < reach:
            tail, tip = axes.pixels(*ends.T)
            axes.draw.line((tail, tip), "black", 2)
            axes.draw.regular_polygon((tip, 6), 3, math.degrees(math.atan2(y, x)) - 90, "black")
    return axes.image()


def pictures(out, shots, dims):
    """two_moons.png: the end, for every D. two_moons.gif: the way there, for the two largest."""
    keys = [(r, d, "drift-rae") for r in SIGMA for d in dims] + [("scattered", dims[-1], "features")]
    images = [panel(key, shots[key][-1]) for key in keys]
    text = Image.new("RGB", images[0].size, "white")
    ImageDraw.Draw(text).text((10, 60), LEGEND, "black", font_size=13)
    image = sheet([*images[:len(dims)], text, *images[len(dims):]], len(dims) + 1).quantize(64)
    with write_atomically(out / "two_moons.png") as file:
        image.save(file, "PNG", optimize=True)
    keys = [keys[max(len(dims) - 2, 0)], *keys[-3:]]
    frames = [sheet([*map(panel, keys, at_step)], 4) for at_step in zip(*(shots[key] for key in keys))]
    frames = [frame.quantize(palette=image, dither=Image.Dither.NONE) for frame in frames]
    durations = [120] * (len(frames) - 1) + [2500]                          # milliseconds
    with write_atomically(out / "two_moons.gif") as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def print_table(rows):
    """Means over the seeds, standard deviations of the first two columns."""
    names = "".join(f"{name:>{10 + 8 * (i < 2)}}" for i, name in enumerate(COLUMNS.values()))
    print(f"\n{'method':<20}{'regime':<13}{'D':>4}{names}")
    for key in dict.fromkeys((r["method"], r["regime"], r["dim"]) for r in rows):
        group = [r for r in rows if (r["method"], r["regime"], r["dim"]) == key]
        line = "{:<20}{:<13}{:>4}".format(*key)
        for i, column in enumerate(COLUMNS):
            values = np.array([r[column] for r in group])
            line += f"{values.mean():>10.3f}" + f" ± {values.std():.3f}" * (i < 2)
        print(line)


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="out", help="folder of table and pictures (default: out)")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, … (default: 3; quick: 1)")
    parser.add_argument("--dims", type=int, nargs="+", metavar="D", default=[2, 8, 32, 128, 512],
                        help="widths of the space (default: 2 8 32 128 512; quick: 2 32 128)")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: 400; quick: 200)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a coarse look: fewer seeds, widths and steps")
    if parser.parse_args(argv).quick:
        parser.set_defaults(seeds=1, dims=[2, 32, 128], steps=200)
    args = parser.parse_args(argv)
    if min(args.dims) < 2 or min(args.seeds, args.steps, args.workers) < 1:
        parser.error("--dims must be at least 2, the plane itself; --seeds, --steps and --workers at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    dims = sorted(set(args.dims))
    table = [("drift-rae", regime, d) for regime in SIGMA for d in dims]
    table += [(m, regime, 32) for m in list(METHODS)[1:4] for regime in SIGMA if 32 in dims]        # Table 5
    table += [(m, "scattered", dims[-1]) for m in ("features", "identity path")]
    cells = [(regime, d, seed, method, args.steps, (seed == 0) * (FRAMES if d in dims[-2:] else 1))
             for method, regime, d in table for seed in range(args.seeds)]
    deaf = (signal.SIGINT, signal.SIG_IGN)                                  # Ctrl-C is the parent's to handle
    with multiprocessing.get_context("spawn").Pool(args.workers, signal.signal, deaf) as pool:
        results = list(tqdm(pool.imap(run_cell, cells), total=len(cells), desc="two moons", unit="cell"))
    rows = [row for row, shots in results]
    with write_atomically(args.out / "two_moons.json", "w") as file:
        json.dump(rows, file, indent=1)
    pictures(args.out, {(r["regime"], r["dim"], r["method"]): shots for r, shots in results if shots}, dims)
    print_table(rows)


if __name__ == "__main__":
    command(main)
