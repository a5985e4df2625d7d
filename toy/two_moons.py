"""Where drifting works and where it collapses: two moons hidden in R^D.

    python toy/two_moons.py [--out out] [--seeds 1] [--quick]   a table; two_moons.json, .png, .gif

A small network makes points of R^D from 8 random numbers and is trained with drift_loss. Two
coordinates of the data are the moons, with variance 1 each. The others are noise, with variance
0.2/D each in the concentrated regime and 1 each in the scattered one. The loss sees all of R^D.
The spread is the standard deviation of the samples in the plane of the moons, divided by that of
the data: 1 is right, 0 is a collapse. Its means over three seeds are

    D                2     32    128    512
    concentrated   1.00   0.99   0.97   0.97
    scattered      1.00   1.00   0.32   0.03

Theorem 1 of the paper (§3.2) says why. Scattered points are all about equally far apart, so the
softmax gives a similar weight w to many positives y, and the attraction pulls every sample to
nearly the same point Σ w·y, the mean of all data. The remedy is a loss on features that concentrate
the data. Here we simply take the moons' own coordinates: the spread at D = 512 is then 1.00.
"""
import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from toy import plot, runs  # noqa: E402

DIMS = (2, 32, 128, 512)
STEPS = 2400
BATCH = 192         # generated samples per step, and as many positives

# ---- The data


def moons(n):
    """Two interleaved half circles with noise 0.05, standardised by their exact moments: [n,2]."""
    angle = math.pi * torch.rand(n)
    x = angle.cos() - 0.5
    y = angle.sin() - 0.25
    arc = torch.stack([x, y], 1)
    side = 2 * torch.randint(2, (n, 1)) - 1                 # −1 or 1: which of the two moons
    noise = torch.randn(n, 2)
    return (side * arc + 0.05 * noise) / torch.tensor([0.8675, 0.4967])


def sample_data(regime, dim, n):
    """The moons in R^D: [n,D]."""
    width = 1.0                                             # scattered: as wide as the moons
    if regime == "concentrated":
        width = math.sqrt(0.2 / dim)                        # a total variance below 0.2 at every D
    noise = torch.randn(n, dim - 2)
    return torch.cat([moons(n), width * noise], 1)


# ---- The generator, and its training


def make_generator(data):
    """A network from 8 random numbers to R^D. At first it is as wide as the data per coordinate."""
    width = data(2000).std(0)                               # [D]
    first, second = nn.Linear(8, 256), nn.Linear(256, 256)
    last = nn.Linear(256, len(width))
    nn.init.normal_(last.weight, std=0.62)                  # makes outputs of variance 1
    last.weight.data *= width[:, None]
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)


def train(generator, data, seen, steps):
    """Train the generator; yield the number of steps that are done, from 0 to `steps`.

    data(n) gives [n,D]; the loss sees the first `seen` coordinates.
    """
    optimizer = torch.optim.Adam(generator.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, steps)
    for step in range(steps):
        yield step
        z = torch.randn(BATCH, 8)
        gen = generator(z)[:, :seen]                        # [N,seen]
        pos = data(BATCH)[:, :seen]                         # [P,seen]
        loss, _ = dr.drift_loss(gen[None], pos[None])       # one token: L = 1
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    yield steps


# ---- What is measured

REPEATS, POINTS = 16, 2000          # the energy distance is a mean over 16 draws of 2,000 points
TEMPERATURES = torch.tensor([0.02, 0.05, 0.2]).view(3, 1, 1)    # of drift_loss: [T,1,1]
DECIMALS = {"energy_distance": 4, "energy_floor": 4, "spread_ratio": 2, "attraction": 2,
            "effective_positives": 0}


def distance(x, y):
    return torch.cdist(x, y).mean()


def energy_distance(x, y):
    return 2 * distance(x, y) - distance(x, x) - distance(y, y)


def attraction(x, pos):
    """Two means over the queries x and the temperatures, for the softmax weights w of Eq. (11).

    -> the length of Σ w·y, divided by that of the positives y; how many y count, 1/Σw².
    """
    scale = distance(x, torch.cat([x, pos]))                # S, as in drift_loss
    logits = -torch.cdist(x, pos) / (scale * TEMPERATURES)  # [T,N,P]
    weights = logits.softmax(-1)
    centre = weights @ pos                                  # [T,N,D]
    length = centre.norm(dim=-1).mean()
    count = 1 / weights.square().sum(-1)
    return length / pos.norm(dim=-1).mean(), count.mean()


@torch.no_grad()
def measure(generator, data, seen):
    """Energy distance and spread of the samples, in the plane of the moons. The other numbers
    describe the data alone: the energy distance between two draws (the floor), the attraction."""
    z = torch.randn(REPEATS, POINTS, 8)
    x = generator(z)[..., :2]
    y = data(REPEATS * POINTS)[:, :2].view_as(x)
    row = {"energy_distance": energy_distance(x, y)}
    row["energy_floor"] = 2 * distance(y, y) / POINTS
    row["spread_ratio"] = x.std(1).mean() / y.std(1).mean()
    query, pos = data(2 * BATCH)[:, :seen].split(BATCH)
    row["attraction"], row["effective_positives"] = attraction(query, pos)
    return {name: value.item() for name, value in row.items()}


# ---- The pictures

CASES = {("concentrated", "drift-rae"): plot.COLOURS[0],    # regime and method: colour
         ("scattered", "drift-rae"): plot.COLOURS[1],
         ("scattered", "features"): plot.COLOURS[2]}
FRAMES = 25                     # of the GIF, without the first
SHOWN, ARROWS = 500, 40         # points and arrows of a panel
PANEL = {"x_ticks": {}, "y_ticks": {}, "size": (240, 290), "right": 8}
CHART = {"x_log": True, "x_ticks": {dim: str(dim) for dim in DIMS}, "size": (600, 300)}
LEGEND = {"grey: the data": "black", "drift-rae: the loss sees R^D": "black",
          "features: it sees the moons": plot.COLOURS[2], "arrows: V of Eq. (11)": "black",
          "spread: 1 is right, 0 a collapse": "black"}


def panel(gen, pos, colour, title):
    """The plane of the moons, in standard deviations of the data, with V at the widest τ."""
    scale = distance(gen, torch.cat([gen, pos]))
    V = dr.drift_field(gen[None], pos[None], gen[None], 0.2 * scale)[0]
    title += f", spread {gen[:, :2].std(0).mean():.2f}"
    axes = plot.Axes(title, "", "", (-3, 3), (-3, 3), **PANEL)
    axes.points(*pos[:, :2].T, "#c0c0c0", radius=2)
    axes.points(*gen[:, :2].T, colour, radius=2)
    x, y = gen[:ARROWS, :2].T
    dx, dy = V[:ARROWS, :2].T
    axes.arrows(x, y, dx, dy)
    return axes.image()


def chart(title, rows, name, top):
    """One measure over D, on an axis from 0 to top."""
    axes = plot.Axes(title, "dimensions D", "", (1.8, 600), (0, top), **CHART)
    for case, colour in CASES.items():
        same = [row for row in rows if (row["regime"], row["method"]) == case]
        dims = [row["dim"] for row in same]
        values = [row[name] for row in same]
        axes.line(dims, values, colour)
        axes.points(dims, values, colour)
    return axes.image()


def draw_png(rows, films):
    """The last panel of every run; below them the charts of the cause."""
    images = [film[-1] for film in films]
    images.insert(len(DIMS), plot.note(LEGEND, images[0].size))     # at the end of the first row
    length = chart("why: how far the attraction leads, |Σw·y| / |y|", rows, "attraction", 1.1)
    count = chart("why: how many of 192 positives count", rows, "effective_positives", BATCH)
    ends = plot.sheet(images, len(DIMS) + 1)
    causes = plot.sheet([length, count], 2)
    return plot.sheet([ends, causes], 1)


def save_gif(path, frames):
    times = [120] * (len(frames) - 1) + [2500]              # milliseconds: the last frame stays
    dr.save(path, partial(frames[0].save, format="GIF", append_images=frames[1:], save_all=True,
                          duration=times, loop=0))


# ---- The command


def run(job):
    """Train one generator -> its row of two_moons.json, and its film, which is a list of panels."""
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default="out", help="folder (default: out)")
    parser.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, … (default: 1)")
    parser.add_argument("--quick", action="store_true", help="an eighth of the steps")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise dr.UserError("--seeds must be at least 1")
    dr.make_folder(args.out)
    steps = STEPS // 8 if args.quick else STEPS
    cases = [("concentrated", "drift-rae", dim) for dim in DIMS]
    cases += [("scattered", "drift-rae", dim) for dim in DIMS]
    cases.append(("scattered", "features", DIMS[-1]))
    jobs = {}
    for case in cases:
        for seed in range(args.seeds):
            jobs[case, seed] = (*case, seed, steps)
    done = dict(runs.in_workers(run, jobs))
    rows, films = zip(*[done[key] for key in jobs])         # in the order of the jobs
    runs.save_json(args.out / "two_moons.json", rows)
    # The pictures show seed 0, which comes first for every case.
    rows_0, films_0 = rows[::args.seeds], films[::args.seeds]
    runs.save_png(args.out / "two_moons.png", draw_png(rows_0, films_0).quantize(64))
    widest = [film for row, film in zip(rows_0, films_0) if row["dim"] == DIMS[-1]]
    frames = [plot.sheet(panels, 3).quantize(64) for panels in zip(*widest)]
    save_gif(args.out / "two_moons.gif", frames)
    runs.print_means(rows, ["regime", "method", "dim"], DECIMALS)


if __name__ == "__main__":
    dr.run_as_script(main)
