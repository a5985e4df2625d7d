"""Why drifting works and where it fails, on two moons hidden in R^D.

    python toy/two_moons.py [--out out] [--quick]      table, two_moons.json, two_moons.png, two_moons.gif

A small generator, noise -> MLP -> R^D, is trained with drift_rae.py's drift_loss. The moons lie in a random plane;
in the other D − 2 directions the data is Gaussian noise, σ = 0.1 in the *concentrated* regime or σ = 1, the moons'
own scale, in the *scattered* one. The generator starts at the scale of the scattered data, so
whatever is small in the end was shrunk by the loss. Measured, 3 seeds, generated over real spread in the plane for
D = 8, 32, 128, 512: concentrated 1.00, 0.99, 0.94, 0.83; scattered 1.07, 1.05, 0.36, 0.09.

Theorem 1 (§3.2): scattered points are all about √(2D)·σ apart, to a relative 1/√D, so softmax(−distance/τ) nears
uniform and the attraction's centre Σ w·y averages many independent directions: it falls from ‖y‖ towards ‖y‖/√P
(column |Σwy|, in units of ‖y‖). Our reading of the collapse: samples made from 8 noise dimensions have near
neighbours among themselves, so the repulsion's centre Σ w·x stays near x_j, and the target x_j + Σ w·y − Σ w·x lies
near Σ w·y, close to the origin. v_pos and v_neg are ‖V⁺‖/S and ‖V⁻‖/S of drift_loss, measured from x_j as Eq. (5)
has them (the theorem's V⁺ is from the origin). A cure and a control:

"features"       a map φ that concentrates, and the loss on φ(G(z)) and φ(y), gradient through φ, as Deng et al. do
                 with an MAE. Here φ is linear CCA between two noisy views of each point. It is told which views
                 belong together, nothing else, and keeps what they share, as DINOv2 does with augmentations. PCA
                 could not: all variances are equal by construction. φ is blind to the noise directions.
"identity path"  G(z) = z + MLP(z), z in R^D: as scattered as the data from the start. V⁺ and V⁻ stay equally
                 long, so nothing collapses; but the field that is left hardly teaches the moons.
"""
import json
import math
import multiprocessing
import signal
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import distances, drift_loss  # noqa: E402
from eval_fid import Parser, UserError, exit_code, write_atomically  # noqa: E402

SIGMA = {"concentrated": 0.1, "scattered": 1.0}   # of the noise outside the plane; in it the data's is 1
N, WIDTH, NOISE, LR = 128, 256, 8, 8e-3           # samples and positives a step; the generator's layers and input
TEMPERATURES = (0.02, 0.05, 0.2)                  # Table 8
METHODS = {"drift-rae": {}, "baseline": {"y_softmax": True, "perturb": False}, "perturb only": {"y_softmax": True},
           "single softmax only": {"perturb": False}, "features": {}, "identity path": {}}
TABLE_5 = 32                                      # the D at which all rows of Table 5 are run: hard but possible
FRAMES, VIEWS, EVALUATE = 36, 4096, 2000          # of the GIF; pairs that CCA sees; samples of an energy distance


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
    """Canonical correlation analysis of two views of VIEWS points: same moon point, fresh noise -> φ, R^D -> R^k.

    φ keeps the k directions whose canonical correlation is above 0.9, whitened. Neither plane nor labels are given.
    """
    xy = moons(VIEWS, generator)
    a, b = (embed(xy, frame, sigma, generator) for _ in range(2))           # [n,D]
    within, between = (a.T @ a + b.T @ b) / (2 * VIEWS), (a.T @ b + b.T @ a) / (2 * VIEWS)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))                # [D,D]
    correlation, directions = torch.linalg.eigh(whiten @ between @ whiten.T)
    projection = whiten.T @ directions[:, correlation > 0.9]                # [D,k]
    return lambda x: x @ projection


class Generator(nn.Module):
    """Noise -> R^D, of standard deviation 1 at the start."""

    def __init__(self, dim, identity):
        super().__init__()
        self.noise, self.identity = dim if identity else NOISE, identity
        self.net = nn.Sequential(nn.Linear(self.noise, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(),
                                 nn.Linear(WIDTH, dim))
        last = self.net[-1]
        with torch.no_grad():
            std = self.net(torch.randn(EVALUATE, self.noise)).std(0).mean()
            last.weight.mul_(0 if identity else 1 / std)
            last.bias.zero_()

    def forward(self, z):
        return self.net(z) + (z if self.identity else 0)


def energy_distance(a, b):
    """2·E‖a−b‖ − E‖a−a'‖ − E‖b−b'‖ over all pairs of [n,2] and [m,2]: never negative, 0.002 between equals."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def run_cell(cell):
    """(regime, dim, seed, method, steps, n_shots) -> row of two_moons.json, shots for the pictures.

    A shot is (step, generated [3N,2], push [N,2]) in the plane: push is minus the loss's gradient at the first N.
    """
    regime, dim, seed, method, steps, n_shots = cell
    torch.manual_seed(seed)
    g, g_shot = (torch.Generator().manual_seed(seed + s) for s in (0, 10**6))   # pictures leave the numbers alone
    frame = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q
    net, plane = Generator(dim, method == "identity path"), frame[:, :2]
    phi = concentrating_map(frame, SIGMA[regime], g) if method == "features" else nn.Identity()

    def draw(n, g):
        return embed(moons(n, g), frame, SIGMA[regime], g)

    def loss(x, g):  # the gradient reaches the generator through φ
        value, info = drift_loss(phi(x)[None], phi(draw(N, g))[None], temperatures=TEMPERATURES, generator=g,
                                 **METHODS[method])
        return value.sum(), info

    z_shot = torch.randn(3 * N, net.noise, generator=g_shot)                # the same in all frames of the GIF
    when = {round(steps * (1 - i / max(n_shots - 1, 1))**1.5) for i in range(n_shots)}
    opt = torch.optim.AdamW(net.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - 0.99 * t / steps)
    shots = []
    for step in range(steps + 1):
        if step in when:
            x = net(z_shot).detach().requires_grad_()
            push = -torch.autograd.grad(loss(x[:N], g_shot)[0], x)[0][:N]
            shots.append((step, x.detach() @ plane, push @ plane))
        if step < steps:
            loss(net(torch.randn(N, net.noise, generator=g)), g)[0].backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            schedule.step()
    with torch.no_grad():
        info = loss(net(torch.randn(N, net.noise, generator=g)), g)[1]
        x = net(torch.randn(EVALUATE, net.noise, generator=g))
        y, again = draw(EVALUATE, g), draw(EVALUATE, g)
        row = {"regime": regime, "dim": dim, "seed": seed, "method": method,
               "energy_distance": energy_distance(x @ plane, y @ plane),
               "energy_floor": energy_distance(again @ plane, y @ plane),
               "spread_ratio": ((x @ plane).std(0).mean() / (y @ plane).std(0).mean()).item(),
               **{k: info[k].item() for k in ("v_pos", "v_neg", "effective_positives")},
               "attraction": attraction(phi(x[:N]), phi(y[:N]), info["scale"])}
    return row, shots


def attraction(x, y, scale):
    """Theorem 1's ‖V⁺‖ = ‖Σ w·y‖, mean over the temperatures, in units of the root mean square of ‖y‖."""
    w = torch.cat([(distances(x[None], y[None]) / (-scale * t)).softmax(-1) for t in TEMPERATURES])  # [T,N,N]
    return ((w @ y).norm(dim=-1).mean() / y.square().sum(-1).mean().sqrt()).item()


# ---------------------------------------------------------------------------------------------------- pictures

PANEL, GAP, REACH, SCALE = 150, 26, 2.7, 2        # pixels; half a side, in the data's deviations; oversampling
GREY, COLOUR = (150, 150, 150), {"concentrated": (31, 96, 196), "scattered": (206, 84, 20)}


def draw_panel(draw, column, row, title, data, regime, shot):
    """One plane: data grey, samples coloured, the push on 24 of them as arrows of the same RMS length everywhere."""
    left, top = GAP + column * (PANEL + GAP), 36 + row * (PANEL + 60)

    def pixel(p):
        return SCALE * (left + PANEL * (0.5 + p[0] / (2 * REACH))), SCALE * (top + PANEL * (0.5 - p[1] / (2 * REACH)))

    small, large = (ImageFont.load_default(size=SCALE * size) for size in (10, 12))
    draw.text((SCALE * (left + PANEL / 2), SCALE * (top - 5)), title, "black", large, "md", align="center")
    draw.rectangle([*pixel((-REACH, REACH)), *pixel((REACH, -REACH))], outline=GREY, width=SCALE)
    for tick in (-2, 0, 2):
        (x, y0), (x0, y) = pixel((tick, -REACH)), pixel((-REACH, tick))
        draw.line([x, y0, x, y0 + 4 * SCALE], GREY, SCALE)
        draw.line([x0, y, x0 - 4 * SCALE, y], GREY, SCALE)
        draw.text((x, y0 + 5 * SCALE), str(tick), "black", small, "ma")
        draw.text((x0 - 6 * SCALE, y), str(tick), "black", small, "rm")
    step, samples, push = shot
    arrows = 0.45 * push / push.square().sum(1).mean().sqrt().clamp(min=1e-12)
    for points, colour, r in ((data, (200, 200, 200), 1.2 * SCALE), (samples, COLOUR[regime], 1.4 * SCALE)):
        for x, y in map(pixel, points[points.abs().amax(1) < REACH].tolist()):
            draw.ellipse([x - r, y - r, x + r, y + r], colour)
    for p, v in zip(samples[:24], arrows):
        if max(p.abs().max(), (p + v).abs().max()) < REACH:
            along, tip = 0.16 * v / v.norm().clamp(min=1e-12), p + v
            across = 0.5 * torch.stack([-along[1], along[0]])
            draw.line([*pixel(p.tolist()), *pixel(tip.tolist())], "black", SCALE)
            draw.polygon([pixel(q.tolist()) for q in (tip, tip - along + across, tip - along - across)], "black")


def draw_panels(rows, legend):
    """rows: lists of (title, data, regime, shot); legend: (x, y, text) in panels -> image."""
    size = max(map(len, rows)) * (PANEL + GAP) + GAP, len(rows) * (PANEL + 60) + 6
    image = Image.new("RGB", [SCALE * s for s in size], "white")
    draw, (x, y, text) = ImageDraw.Draw(image), legend
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            draw_panel(draw, c, r, *panel)
    draw.text((SCALE * (GAP + x * (PANEL + GAP)), SCALE * y * (PANEL + 60)), text, "black",
              ImageFont.load_default(size=SCALE * 10.5))
    return image.resize(size, Image.LANCZOS)


def pictures(out, results, dims):
    """two_moons.png: the end, for every D. two_moons.gif: the way there, for the two largest."""
    data = moons(500, torch.Generator().manual_seed(0))
    cells = {(row["regime"], row["dim"], row["method"]): (row, shots) for row, shots in results if shots}

    def name(regime, dim, method):
        return f"D = {dim} through a map" if method == "features" else f"{regime}, D = {dim}"

    def end(*key):
        row, shots = cells[key]
        numbers = f"spread {row['spread_ratio']:.2f}, energy {row['energy_distance']:.3f}"
        return f"{name(*key)}\n{numbers}", data, key[0], shots[-1]

    cure = ("scattered", dims[-1], "features")
    rows = [[end(regime, d, "drift-rae") for d in dims] for regime in SIGMA]
    image = draw_panels([rows[0], rows[1] + [end(*cure)]], (
        len(dims), 0.25, "grey: data\nblue, orange: generated\narrows: where the loss\npushes a sample\n"
                         "energy: distance of the\ntwo clouds\n\naxes: the moons' plane,\nin standard deviations"))
    write_atomically(out / "two_moons.png", lambda f: image.quantize(128).save(f, "PNG", optimize=True))

    near, far = dims[-2:][0], dims[-1]                  # the same if there is only one
    keys = [*dict.fromkeys((r, d, "drift-rae") for r, d in (*((r, near) for r in SIGMA), ("scattered", far))), cure]
    frames = []
    for shots in zip(*(cells[k][1] for k in keys)):
        panels = [(f"{name(*k)}\nspread {s[1].std(0).mean():.2f}", data, k[0], s) for k, s in zip(keys, shots)]
        frames.append(draw_panels([panels], (0, 0.97, f"step {shots[0][0]}")))
    palette = frames[-1].quantize(64)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    write_atomically(out / "two_moons.gif", lambda f: frames[0].save(
        f, "GIF", save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [2500], loop=0))


# ---------------------------------------------------------------------------------------------------- command

def print_table(rows):
    """Means over the seeds ± standard deviations."""
    print(f"\n{'method':<21}{'regime':<14}{'D':>4}  {'energy distance':>15}  {'floor':>6}  {'spread':>13}  "
          f"{'|Σwy|':>6}  {'‖V⁺‖':>6}  {'‖V⁻‖':>6}  {'eff. pos.':>9}")
    for key in dict.fromkeys((r["method"], r["regime"], r["dim"]) for r in rows):
        group = [r for r in rows if (r["method"], r["regime"], r["dim"]) == key]
        mean, sd = ({k: f([r[k] for r in group]).item() for k in group[0] if k not in ("method", "regime")}
                    for f in (np.mean, np.std))
        print(f"{key[0]:<21}{key[1]:<14}{key[2]:>4}  {mean['energy_distance']:>6.3f} ± {sd['energy_distance']:<6.3f}  "
              f"{mean['energy_floor']:>6.3f}  {mean['spread_ratio']:>5.2f} ± {sd['spread_ratio']:<5.2f}  "
              f"{mean['attraction']:>6.2f}  {mean['v_pos']:>6.2f}  {mean['v_neg']:>6.2f}  "
              f"{mean['effective_positives']:>9.1f}")


def one_thread():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def run(args):
    began, out, dims = time.perf_counter(), Path(args.out), sorted(set(args.dims))
    out.mkdir(parents=True, exist_ok=True)
    table = [("drift-rae", regime, d) for regime in SIGMA for d in dims]
    table += [(m, regime, TABLE_5) for m in list(METHODS)[1:4] for regime in SIGMA if TABLE_5 in dims]
    table += [(m, "scattered", dims[-1]) for m in ("features", "identity path")]
    cells = [(regime, d, seed, method, args.steps, 0 if seed else FRAMES if d in dims[-2:] else 1)
             for method, regime, d in table for seed in range(args.seeds)]
    # cells side by side are faster than two threads on one cell, and repeat bit for bit
    with multiprocessing.get_context("spawn").Pool(args.workers, one_thread) as pool:
        results = list(tqdm(pool.imap(run_cell, cells), total=len(cells), desc="two moons", unit="cell"))
    rows = [row for row, _ in results]
    write_atomically(out / "two_moons.json", lambda f: f.write(json.dumps(rows, indent=1).encode()))
    pictures(out, results, dims)
    print_table(rows)
    print(f"{time.perf_counter() - began:.0f} s: see two_moons.png, two_moons.gif and two_moons.json in {out}")


@exit_code
def main(argv):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder for table and pictures (default: out)")
    parser.add_argument("--seeds", type=int, help="repetitions, seeds 0, 1, … (default: 3; 1 if --quick)")
    parser.add_argument("--dims", type=int, nargs="+", metavar="D",
                        help="widths of the space (default: 2 8 32 128 512; 2 32 128 if --quick)")
    parser.add_argument("--steps", type=int, help="of training (default: 400; 200 if --quick)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a coarse look: fewer seeds, widths and steps")
    args = parser.parse_args(argv)
    defaults = (1, [2, 32, 128], 200) if args.quick else (3, [2, 8, 32, 128, 512], 400)
    for name, value in zip(("seeds", "dims", "steps"), defaults):
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("seeds", "steps", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if min(args.dims) < 2:
        raise UserError(f"--dims must be at least 2, the plane itself, not {min(args.dims)}")
    run(args)


if __name__ == "__main__":
    sys.exit(main())
