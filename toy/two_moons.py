"""Where drifting works and where it collapses: two moons hidden in R^D.

    python toy/two_moons.py [--out out] [--seeds 1] [--quick]   a table; two_moons.json, .png, .gif

Two coordinates of the data are the moons, of variance 1 each. The other D − 2 are noise, each of
variance 0.2/D in the concentrated regime, of 1 in the scattered one. A small network makes such
points from 8 random numbers. It is trained with drift_loss, which sees all of R^D.
Spread of its samples among the moons, over that of the data (1 is right, 0 a collapse; 3 seeds),
at D = 2, 32, 128, 512: concentrated 1.00, 0.99, 0.97, 0.97; scattered 1.00, 1.00, 0.32, 0.03.

Theorem 1 (§3.2) says why. Scattered points are all about equally far apart, so the softmax averages
over many positives, and the attraction's centre Σ w·y nears the mean of all. The cure is a loss on
features that concentrate the data, here simply the moons' own coordinates: 1.00 at D = 512.
"""
import json
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import command, drift_field, drift_loss, require, write_atomically  # noqa: E402
from toy.plot import COLOURS, Axes, note, sheet  # noqa: E402
from toy.runs import print_means, start_worker  # noqa: E402

DIMS, STEPS, BATCH = (2, 32, 128, 512), 2400, 192           # a step: 192 samples, 192 positives
TEMPERATURES = torch.tensor([[[0.02]], [[0.05]], [[0.2]]])  # Table 8, as in drift_loss: [T,1,1]
REPEATS, POINTS = 16, 2000              # so many energy distances are averaged, of so many points
FRAMES, SHOWN, ARROWS = 25, 500, 40     # of the GIF, but for the first; of a panel: points, arrows
CASES = {("concentrated", "drift-rae"): COLOURS[0], ("scattered", "drift-rae"): COLOURS[1],
         ("scattered", "features"): COLOURS[2]}             # regime and method
PANEL = {"x_ticks": {}, "y_ticks": {}, "size": (240, 290), "right": 8}
CHART = {"x_log": True, "x_ticks": {dim: str(dim) for dim in DIMS}, "size": (600, 300)}
LEGEND = {"grey: the data": "black", "drift-rae: the loss sees R^D": "black",
          "features: it sees the moons": COLOURS[2], "arrows: V of Eq. (11)": "black",
          "spread: 1 is right, 0 a collapse": "black"}
DIGITS = {"energy_distance": 4, "energy_floor": 4, "spread_ratio": 2, "attraction": 2,
          "effective_positives": 0}

# ---- The data

def moons(n):
    """Two interleaved half circles with noise 0.05, standardised by their exact moments: [n,2]."""
    angle = math.pi * torch.rand(n)
    x = angle.cos() - 0.5
    y = angle.sin() - 0.25
    arc = torch.stack([x, y], 1)
    side = 2 * torch.randint(2, (n, 1)) - 1
    noise = torch.randn(n, 2)
    return (side * arc + 0.05 * noise) / torch.tensor([0.8675, 0.4967])

def sample_data(regime, dim, n):
    """The moons in R^D: [n,D]."""
    width = 1.0                                             # scattered: as wide as the moons
    if regime == "concentrated":
        width = math.sqrt(0.2 / dim)                        # little in all, at every D
    noise = torch.randn(n, dim - 2)
    return torch.cat([moons(n), width * noise], 1)

# ---- The generator, and its training

def make_generator(data):
    """8 random numbers -> a point of R^D; at first as wide as the data in each coordinate."""
    width = data(POINTS).std(0)                             # [D]
    first, second = nn.Linear(8, 256), nn.Linear(256, 256)
    last = nn.Linear(256, len(width))
    nn.init.normal_(last.weight, std=0.62)                  # as wide as the moons
    last.weight.data *= width[:, None]
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)

def train(generator, data, seen, steps):
    """Yields 0 … steps. data(n): [n,D], of which the loss sees the first `seen` columns."""
    optimizer = torch.optim.Adam(generator.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, steps)
    for step in range(steps):
        yield step
        z = torch.randn(BATCH, 8)
        gen = generator(z)[:, :seen]                        # [N,seen]
        pos = data(BATCH)[:, :seen]                         # [P,seen]
        loss, _ = drift_loss(gen[None], pos[None])
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    yield steps

# ---- What is measured

def distance(x, y):
    return torch.cdist(x, y).mean()

def energy_distance(x, y):
    return 2 * distance(x, y) - distance(x, x) - distance(y, y)

def attraction(x, pos):
    """Σ w·y of Eq. (11) at x, means over x and τ: its length over y's; how many y count, 1/Σw²."""
    scale = distance(x, torch.cat([x, pos]))                # S, as in drift_loss
    logits = -torch.cdist(x, pos) / (scale * TEMPERATURES)  # [T,N,P]
    weights = logits.softmax(-1)
    centre = weights @ pos                                  # [T,N,D]
    length = centre.norm(dim=-1).mean()
    count = 1 / weights.square().sum(-1)
    return length / pos.norm(dim=-1).mean(), count.mean()

@torch.no_grad()
def measure(generator, data, seen):
    """Of samples in the plane: energy distance, spread. Of the data alone: floor, attraction."""
    z = torch.randn(REPEATS, POINTS, 8)
    x = generator(z)[..., :2]
    y = data(REPEATS * POINTS)[:, :2].view_as(x)
    row = {"energy_distance": energy_distance(x, y)}
    row["energy_floor"] = 2 * distance(y, y) / POINTS       # the mean between two sets of data
    row["spread_ratio"] = x.std(1).mean() / y.std(1).mean()
    query, pos = data(2 * BATCH)[:, :seen].split(BATCH)
    row["attraction"], row["effective_positives"] = attraction(query, pos)
    return {name: value.item() for name, value in row.items()}

# ---- The pictures

def panel(gen, pos, colour, title):
    """The plane of the moons, in standard deviations of the data; V there, at the widest τ."""
    scale = distance(gen, torch.cat([gen, pos]))
    V, = drift_field(gen[None], pos[None], gen[None], 0.2, scale)
    title += f", spread {gen[:, :2].std(0).mean():.2f}"
    axes = Axes(title, "", "", (-3, 3), (-3, 3), **PANEL)
    axes.points(*pos[:, :2].T, "#c0c0c0", radius=2)
    axes.points(*gen[:, :2].T, colour, radius=2)
    x, y = gen[:ARROWS, :2].T
    dx, dy = V[:ARROWS, :2].T
    axes.arrows(x, y, dx, dy)
    return axes.image()

def chart(title, results, name, top):
    """A measure over D, from 0 to top."""
    axes = Axes(title, "dimensions D", "", (1.8, 600), (0, top), **CHART)
    for case, colour in CASES.items():
        same = [row for row, _ in results if (row["regime"], row["method"]) == case]
        dims = [row["dim"] for row in same]
        values = [row[name] for row in same]
        axes.line(dims, values, colour)
        axes.points(dims, values, colour)
    return axes.image()

def draw_png(results):
    """The end of seed 0's runs; the cause below."""
    images = [film[-1] for _, film in results]
    images.insert(len(DIMS), note(LEGEND, images[0].size))  # at the end of the first row
    length = chart("why: how far the attraction leads, |Σw·y| / |y|", results, "attraction", 1.1)
    count = chart("why: how many of 192 positives count", results, "effective_positives", BATCH)
    ends = sheet(images, len(DIMS) + 1)
    causes = sheet([length, count], 2)
    return sheet([ends, causes], 1)

# ---- The command

def run(job):
    """-> a row of two_moons.json, and its film, a list of panels."""
    regime, method, dim, seed, steps = job
    torch.manual_seed(seed)
    data = partial(sample_data, regime, dim)
    generator = make_generator(data)
    seen = 2 if method == "features" else dim               # the moons' own coordinates, or all
    pos = data(SHOWN)[:, :seen]
    z = torch.randn(SHOWN, 8)
    film = []
    for step in train(generator, data, seen, steps):
        if step % (steps // FRAMES) == 0:
            gen = generator(z)[:, :seen].detach()
            title = f"{regime}, {method}, D = {dim}\nstep {step:,}"
            film.append(panel(gen, pos, CASES[regime, method], title))
    row = {"regime": regime, "dim": dim, "seed": seed, "method": method}
    return row | measure(generator, data, seen), film

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="out", help="folder (default: out)")
    parser.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, … (default: 1)")
    parser.add_argument("--quick", action="store_true", help="an eighth of the steps")
    args = parser.parse_args(argv)
    require(args.seeds > 0, "--seeds must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    steps = STEPS // 8 if args.quick else STEPS
    cells = [("concentrated", "drift-rae", dim) for dim in DIMS]
    cells += [("scattered", "drift-rae", dim) for dim in DIMS]
    cells.append(("scattered", "features", DIMS[-1]))
    jobs = [(*key, seed, steps) for key in cells for seed in range(args.seeds)]
    with get_context("spawn").Pool(initializer=start_worker) as pool:
        runs = pool.imap(run, jobs)
        results = list(tqdm(runs, "two moons", len(jobs)))
    rows = [row for row, _ in results]
    with write_atomically(args.out / "two_moons.json", "w") as file:
        json.dump(rows, file, indent=1)
    shown = results[::args.seeds]                           # seed 0
    with write_atomically(args.out / "two_moons.png") as file:
        draw_png(shown).quantize(64).save(file, "PNG")
    films = [film for row, film in shown if row["dim"] == DIMS[-1]]
    frames = [sheet(images, 3).quantize(64) for images in zip(*films)]
    times = [120] * FRAMES + [2500]                         # ms: the last one stays
    with write_atomically(args.out / "two_moons.gif") as file:
        frames[0].save(file, "GIF", append_images=frames[1:], save_all=True, duration=times, loop=0)
    print_means(rows, ["regime", "method", "dim"], DIGITS)

if __name__ == "__main__":
    command(main)
