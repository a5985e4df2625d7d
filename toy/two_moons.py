"""Why drifting works and where it fails, on two moons hidden in R^D: 2 minutes on a CPU.

    python toy/two_moons.py [--out out] [--quick]      table, two_moons.json, two_moons.png, two_moons.gif

A small generator, noise -> MLP -> R^D, is trained with drift_rae.py's drift_loss. The moons lie in a random
plane. In the other D − 2 directions the data is Gaussian noise: σ = 0.1, the *concentrated* regime (RAE latents),
or σ = 1, the moons' own scale, the *scattered* one (latents of a reconstruction VAE). The generator starts at the
scale of the scattered data, so whatever shrinks was shrunk by the loss.

Theorem 1 (§3.2) says what to expect. Scattered points are all about √(2D)·σ apart, with a relative spread of
1/√D, so softmax(−distance/τ) over the positives nears uniform, and the attraction's centre Σ w·y, an average of
P points in random directions, shrinks to ‖y‖/√P: column |Σwy|, in units of ‖y‖. The samples of a generator with
8-dimensional noise have near neighbours among themselves, so the repulsion's centre Σ w·x stays near x_j. The
target x_j + Σ w·y − Σ w·x then sits near Σ w·y: at the origin. Two ways out are shown:

- "features": a map φ that concentrates, and the loss on φ(G(z)), φ(y), gradient through φ, as Deng et al. do with
  an MAE. φ is linear CCA between two noisy views of each point: it is told which pairs belong together and finds
  by itself what they share, as DINOv2 does with augmentations. PCA cannot: all variances are equal by construction.
- "identity path": G(z) = z + MLP(z), z in R^D, as scattered as the data. Both centres vanish, nothing collapses;
  but the field that is left says little about the moons.
"""
from argparse import RawDescriptionHelpFormatter
import json
import math
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import Parser, UserError, distances, drift_loss, signed_weights, write_atomically  # noqa: E402

SIGMA = {"concentrated": 0.1, "scattered": 1.0}   # of the noise outside the plane; in it the data's is 1
N, WIDTH, NOISE, LR = 128, 128, 8, 4e-3           # samples and positives a step; the generator's layers and input
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
    """Canonical correlation analysis of two views of VIEWS points: same moon point, fresh noise -> W [D,k].

    k directions whose canonical correlation is above 0.9, whitened. Neither plane nor labels are given.
    """
    xy = moons(VIEWS, generator)
    a, b = (embed(xy, frame, sigma, generator) for _ in range(2))           # [n,D]
    within, between = (a.T @ a + b.T @ b) / (2 * VIEWS), (a.T @ b + b.T @ a) / (2 * VIEWS)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))                # [D,D]
    correlation, directions = torch.linalg.eigh(whiten @ between @ whiten.T)
    return whiten.T @ directions[:, correlation > 0.9]


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

    A shot is (step, generated [N,2], push [N,2]) in the plane: push is minus the loss's gradient.
    """
    regime, dim, seed, method, steps, n_shots = cell
    torch.manual_seed(seed)
    g, still = (torch.Generator().manual_seed(seed + s) for s in (0, 10**6))
    frame, sigma = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q, SIGMA[regime]
    plane, net = frame[:, :2], Generator(dim, method == "identity path")
    phi = concentrating_map(frame, sigma, g) if method == "features" else None

    def draw(n):
        return embed(moons(n, g), frame, sigma, g)

    def loss(x, y):
        if phi is not None:  # the gradient reaches the generator through φ
            x, y = x @ phi, y @ phi
        value, info = drift_loss(x[None], y[None], generator=g, temperatures=TEMPERATURES,
                                 **METHODS[method])
        return value.sum(), info

    def shot(step):
        x = net(z_still).detach().requires_grad_()
        value, _ = loss(x, draw(N))
        return step, x.detach() @ plane, -torch.autograd.grad(value, x)[0] @ plane

    z_still = torch.randn(N, net.noise, generator=still)                    # the same in all frames of the GIF
    when = {round(steps * (i / max(n_shots - 1, 1))**1.5) for i in range(n_shots)}
    opt = torch.optim.AdamW(net.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - 0.99 * t / steps)
    shots = []
    for step in range(steps):
        if step in when:
            shots.append(shot(step))
        value, _ = loss(net(torch.randn(N, net.noise, generator=g)), draw(N))
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
    if steps in when:
        shots.append(shot(steps))

    with torch.no_grad():
        x, y = net(torch.randn(N, net.noise, generator=g)), draw(N)
        info = loss(x, y)[1]                                                # in φ's space, if there is one
        a, b = (x, y) if phi is None else (x @ phi, y @ phi)
        logits = torch.cat([distances(a[None], b[None]) / (-info["scale"] * t) for t in TEMPERATURES])
        centre = signed_weights(logits, 0, self_mask=False) @ b             # Σ w·y, [T,N,D]
        fake, real, again = (p @ plane for p in (net(torch.randn(EVALUATE, net.noise, generator=g)),
                                                 draw(EVALUATE), draw(EVALUATE)))
    row = {"regime": regime, "dim": dim, "seed": seed, "method": method,
           "energy_distance": energy_distance(fake, real), "energy_floor": energy_distance(again, real),
           "spread_ratio": (fake.std(0).mean() / real.std(0).mean()).item(),
           **{k: info[k].item() for k in ("v_pos", "v_neg", "effective_positives")},
           "attraction": (centre.norm(dim=-1).mean() / b.square().sum(-1).mean().sqrt()).item()}
    return row, shots


PANEL, MARGIN, TOP, REACH, SCALE = 190, 30, 44, 2.7, 2    # pixels; half the width in units of the data's deviation
COLOUR = {"data": (196, 196, 196), "concentrated": (31, 96, 196), "scattered": (206, 84, 20), "push": (20, 20, 20)}


def draw_panel(draw, left, top, title, regime, data, shot):
    """One plane: data grey, samples coloured, the push on 40 of them as arrows of one common length (RMS)."""
    def pixel(p):
        return [SCALE * (left + PANEL * (0.5 + p[0] / (2 * REACH))), SCALE * (top + PANEL * (0.5 - p[1] / (2 * REACH)))]

    def dots(points, colour, r):
        for p in points.tolist():
            if max(map(abs, p)) < REACH:
                x, y = pixel(p)
                draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    small, large = (ImageFont.load_default(size=SCALE * n) for n in (10, 12))
    step, x, push = shot
    draw.rectangle([*pixel((-REACH, REACH)), *pixel((REACH, -REACH))], outline=(90, 90, 90), width=SCALE)
    for tick in (-2, 0, 2):
        a, b = pixel((tick, -REACH)), pixel((-REACH, tick))
        draw.line([*a, a[0], a[1] + 4 * SCALE], fill=(90, 90, 90), width=SCALE)
        draw.line([*b, b[0] - 4 * SCALE, b[1]], fill=(90, 90, 90), width=SCALE)
        draw.text((a[0], a[1] + 5 * SCALE), f"{tick}".replace("-", "−"), (60, 60, 60), small, "ma")
        draw.text((b[0] - 6 * SCALE, b[1]), f"{tick}".replace("-", "−"), (60, 60, 60), small, "rm")
    for i, line in enumerate(title.split("\n")):
        draw.text((SCALE * (left + PANEL / 2), SCALE * (top - 31 + 14 * i)), line, (0, 0, 0), large, "ma")
    dots(data, COLOUR["data"], 1.4 * SCALE)
    dots(x, COLOUR[regime], 1.8 * SCALE)
    arrows = 0.45 * push / push.square().sum(1).mean().sqrt().clamp(min=1e-12)
    for p, v in zip(x[:40], arrows[:40]):
        head = 0.35 * v, 0.18 * torch.stack([-v[1], v[0]])
        if (p + v).abs().max() < REACH and p.abs().max() < REACH:
            draw.line([*pixel(p), *pixel(p + v)], fill=COLOUR["push"], width=SCALE)
            draw.polygon([tuple(pixel(p + v + u)) for u in (0 * v, head[1] - head[0], -head[1] - head[0])],
                         fill=COLOUR["push"])


def canvas(columns, rows, footer):
    size = MARGIN + columns * (PANEL + MARGIN), rows * (PANEL + TOP + 22) + 22
    image = Image.new("RGB", [SCALE * s for s in size], "white")
    draw = ImageDraw.Draw(image)
    draw.text((SCALE * size[0] / 2, SCALE * (size[1] - 8)), footer, (60, 60, 60), ImageFont.load_default(size=SCALE * 11), "ms")
    return image, draw


def finish(image):
    return image.resize([s // SCALE for s in image.size], Image.LANCZOS)


FOOTER = ("plane of the moons, axes in standard deviations of the data · grey: data, {} and orange: generated · "
          "arrows: where the loss pushes a sample")


def pictures(out, results, dims):
    """two_moons.png, the end for every D, and two_moons.gif, the way there at the largest D."""
    data = moons(600, torch.Generator().manual_seed(0))
    shots = {(row["regime"], row["dim"], row["method"]): (row, s) for row, s in results if s}
    image, draw = canvas(len(dims) + 1, 2, FOOTER.format("blue"))
    for r, regime in enumerate(SIGMA):
        for c, key in enumerate([(regime, d, "drift-rae") for d in dims] + [("scattered", dims[-1], "features")] * r):
            row, s = shots[key]
            title = f"{regime}, D = {row['dim']}" + " through φ" * (key[2] == "features")
            draw_panel(draw, MARGIN + c * (PANEL + MARGIN), TOP + r * (PANEL + TOP + 22),
                       f"{title}\nspread {row['spread_ratio']:.2f}", regime, data, s[-1])
    write_atomically(out / "two_moons.png", lambda f: finish(image).save(f, "PNG", optimize=True))

    keys = [(regime, dims[-1], "drift-rae") for regime in SIGMA] + [("scattered", dims[-1], "features")]
    frames = []
    for i in range(min(len(shots[k][1]) for k in keys)):
        image, draw = canvas(3, 1, f"step {shots[keys[0]][1][i][0]}")
        for c, (regime, dim, method) in enumerate(keys):
            s = shots[keys[c]][1][i]
            title = f"{regime}, D = {dim}" + " through φ" * (method == "features")
            draw_panel(draw, MARGIN + c * (PANEL + MARGIN), TOP,
                       f"{title}\nspread {s[1].std(0).mean():.2f}", regime, data, s)
        frames.append(finish(image).quantize(24, dither=Image.Dither.NONE))
    write_atomically(out / "two_moons.gif", lambda f: frames[0].save(
        f, "GIF", save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [2500], loop=0))


def print_table(rows):
    """Means over the seeds ± standard deviations."""
    print(f"\n{'method':<21}{'regime':<14}{'D':>4}  {'energy distance':>15}  {'floor':>6}  {'spread':>13}  "
          f"{'|Σwy|':>6}  {'‖V⁺‖':>6}  {'‖V⁻‖':>6}  {'eff. pos.':>9}")
    for key in dict.fromkeys((r["method"], r["regime"], r["dim"]) for r in rows):
        group = [r for r in rows if (r["method"], r["regime"], r["dim"]) == key]
        (e, de), (s, ds), *rest = (
            (v.mean().item(), v.std(correction=0).item()) for v in
            (torch.tensor([r[k] for r in group]) for k in ("energy_distance", "spread_ratio", "energy_floor",
                                                           "attraction", "v_pos", "v_neg", "effective_positives")))
        floor, attraction, v_pos, v_neg, effective = (m for m, _ in rest)
        print(f"{key[0]:<21}{key[1]:<14}{key[2]:>4}  {e:>6.3f} ± {de:<6.3f}  {floor:>6.3f}  {s:>5.2f} ± {ds:<5.2f}  "
              f"{attraction:>6.2f}  {v_pos:>6.2f}  {v_neg:>6.2f}  {effective:>9.1f}")


def worker():
    torch.set_num_threads(1)  # two cells side by side are faster than two threads on one, and repeat bit for bit
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(args):
    began, out, dims, last = time.perf_counter(), Path(args.out), sorted(set(args.dims)), max(args.dims)
    out.mkdir(parents=True, exist_ok=True)
    cells = [(regime, d, seed, method, args.steps, FRAMES * (seed == 0 and d == last) or 1 * (seed == 0))
             for method in METHODS for regime in SIGMA for d in dims for seed in range(args.seeds)
             if method == "drift-rae" or regime == "scattered" and d == last and method in ("features", "identity path")
             or d == TABLE_5 and method not in ("features", "identity path")]
    with multiprocessing.get_context("spawn").Pool(2, worker) as pool:
        results = list(tqdm(pool.imap(run_cell, cells), total=len(cells), desc="two moons", unit="cell"))
    rows = [row for row, _ in results]
    write_atomically(out / "two_moons.json", lambda f: f.write(json.dumps(rows, indent=1).encode()))
    pictures(out, results, dims)
    print_table(rows)
    print(f"\nD − 2 directions of noise; φ sees {VIEWS} pairs. {time.perf_counter() - began:.0f} s: see two_moons.png, "
          f"two_moons.gif and two_moons.json in {out}")


def main(argv=None):
    """Exit code: 0, or 2 after one sentence on what is wrong, or 130 after Ctrl-C."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder for table and pictures (default: out)")
    parser.add_argument("--seeds", type=int, help="repetitions, seeds 0, 1, … (default: 3; 1 if --quick)")
    parser.add_argument("--dims", type=int, nargs="+", metavar="D", help="(default: 2 8 32 128 512; 2 32 128 if --quick)")
    parser.add_argument("--steps", type=int, help="of training (default: 500; 200 if --quick)")
    parser.add_argument("--quick", action="store_true", help="a look in under 20 s")
    try:
        args = parser.parse_args(argv)
        seeds, dims, steps = (1, [2, 32, 128], 200) if args.quick else (3, [2, 8, 32, 128, 512], 500)
        args.seeds, args.dims, args.steps = args.seeds or seeds, args.dims or dims, args.steps or steps
        for name, low in (("seeds", 1), ("steps", 2)):
            if getattr(args, name) < low:
                raise UserError(f"--{name} must be at least {low}, not {getattr(args, name)}")
        if min(args.dims) < 2:
            raise UserError(f"--dims must be at least 2, the plane itself, not {min(args.dims)}")
        run(args)
        return 0
    except KeyboardInterrupt:
        print("two_moons.py: interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as e:
        print(f"two_moons.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
