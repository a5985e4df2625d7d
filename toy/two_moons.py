"""Where drifting works and where it collapses: two moons hidden in R^D.

    python toy/two_moons.py [--out out] [--seeds 1] [--quick]       drift.png, two_moons.*, a table
    python toy/two_moons.py --show     run nothing: print the table of toy/results/two_moons.json

The first picture to look at is OUT/drift.png. It explains the drift V: every generated point is
pulled towards the real points around it and pushed away from the other generated points.

A small network makes points of R^D from 8 random numbers and is trained with drift_loss, which sees
all of R^D. Two coordinates of the data are the moons, with variance 1 each. The others are noise,
with variance 0.2/D each in the concentrated regime and 1 each in the scattered one. The spread is
the standard deviation of the samples in the plane of the moons, divided by that of the data: 1 is
right, 0 is a collapse. Its means over three seeds are

    D                2     32    128    512
    concentrated   1.00   0.99   0.97   0.97
    scattered      1.00   1.02   0.32   0.03

Concentrated data is learnt at every D. Scattered data is not: at D = 32 the samples spread but miss
the moons, at D = 128 they collapse to a line that depends on the start, and at D = 512 nearly to a
point. Theorem 1 of the paper (§3.2) says why. Scattered points are all about equally far apart, so
the softmax gives a similar weight w to many positives y (real points), and every sample is pulled
to nearly the same point Σ w·y, the mean of all data.

The remedy is a space that concentrates the data. Two runs on scattered data at D = 512 show what
that means. In "features" the loss sees the moons' own two coordinates, and the moons are learnt.
These features are an oracle: they show that the space is the cause, not how to find a good one. In
"projection" the loss sees a random plane of R^D, and the moons are not learnt. Few dimensions alone
do not help: they must be the right ones.
"""
import argparse
import json
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


def make_view(method, dim):
    """-> a function that maps points [n,D] to what the loss sees of them."""
    if method == "features":                                # the moons' own coordinates: an oracle
        return lambda points: points[:, :2]
    if method == "projection":                              # onto a random plane
        basis, _ = torch.linalg.qr(torch.randn(dim, 2))     # [D,2], orthonormal columns
        return lambda points: points @ basis
    return lambda points: points


def train(generator, data, see, steps):
    """Train the generator; yield the number of steps that are done, from 0 to `steps`.

    data(n) gives [n,D]; the loss sees see(points).
    """
    optimizer = torch.optim.Adam(generator.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, steps)
    for step in range(steps):
        yield step
        z = torch.randn(BATCH, 8)
        gen = see(generator(z))                             # [N,D], or [N,2]
        pos = see(data(BATCH))                              # [P,D], or [P,2]
        loss, _ = dr.drift_loss(gen[None], pos[None])       # one token: L = 1
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    yield steps


# ---- What is measured

REPEATS, POINTS = 16, 2000          # the energy distance is a mean over 16 draws of 2,000 points
TEMPERATURES = torch.tensor([0.02, 0.05, 0.2]).view(3, 1, 1)    # of drift_loss: [T,1,1]


def distance(x, y):
    return torch.cdist(x, y).mean()


def energy_distance(x, y):
    return 2 * distance(x, y) - distance(x, x) - distance(y, y)


def mean_distance(x, pos):
    """S of drift_loss: the mean distance from the points x to x and to the positives."""
    return distance(x, torch.cat([x, pos]))


def pull_and_push(x, pos, tau):
    """The two halves of the drift V = pull + push of Eq. (11), at the generated points x [N,D].

    A point moves by `pull` to a weighted mean of the positives pos [P,D], in which near ones count
    most. It moves by `push` away from such a mean of the other generated points.
    """
    to_pos = torch.cdist(x, pos)                            # [N,P]
    to_gen = torch.cdist(x, x).fill_diagonal_(torch.inf)    # [N,N]; no point pushes itself
    w_pos = (-to_pos / tau).softmax(-1)
    w_gen = (-to_gen / tau).softmax(-1)
    return w_pos @ pos - x, x - w_gen @ x


def attraction(x, pos):
    """Two means over the queries x and the temperatures, for the softmax weights w of Eq. (11).

    -> the length of Σ w·y, divided by that of the positives y; how many y count, 1/Σw².
    """
    scale = mean_distance(x, pos)
    logits = -torch.cdist(x, pos) / (scale * TEMPERATURES)  # [T,N,P]
    weights = logits.softmax(-1)
    centre = weights @ pos                                  # [T,N,D]
    length = centre.norm(dim=-1).mean()
    count = 1 / weights.square().sum(-1)
    return length / pos.norm(dim=-1).mean(), count.mean()


@torch.no_grad()
def measure(generator, data, see):
    """Energy distance and spread of the samples, in the plane of the moons. The other numbers
    describe the data alone: the energy distance between two draws of the data (the floor), and the
    attraction in the space that the loss sees."""
    z = torch.randn(REPEATS, POINTS, 8)
    x = generator(z)[..., :2]
    y = data(REPEATS * POINTS)[:, :2].view_as(x)
    row = {"energy_distance": energy_distance(x, y)}
    row["energy_floor"] = 2 * distance(y, y) / POINTS
    row["spread_ratio"] = x.std(1).mean() / y.std(1).mean()
    query, pos = see(data(2 * BATCH)).split(BATCH)
    row["attraction"], row["effective_positives"] = attraction(query, pos)
    return {name: round(value.item(), 5) for name, value in row.items()}


# ---- The pictures

CASES = {("concentrated", "drift-rae"): plot.COLOURS[0],    # regime and method: colour
         ("scattered", "drift-rae"): plot.COLOURS[1],
         ("scattered", "features"): plot.COLOURS[2],
         ("scattered", "projection"): plot.COLOURS[3]}
SEES = {"drift-rae": "all of R^D", "features": "features (oracle)", "projection": "random plane"}
GREY, PALE = "#c0c0c0", "#b9cdee"
FRAMES = 15                     # of the GIF, without the first
SHOWN = 500                     # points of a panel
PANEL = {"x_ticks": {}, "y_ticks": {}, "size": (300, 360), "right": 8}
CHART = {"x_log": True, "x_ticks": {dim: str(dim) for dim in DIMS}, "size": (300, 360)}
LEGEND = {"grey: real points": "#808080",
          "concentrated: the noise is narrow,": plot.COLOURS[0],
          "    of variance 0.2/D per coordinate": plot.COLOURS[0],
          "scattered: the noise is as wide": plot.COLOURS[1],
          "    as the moons, of variance 1": plot.COLOURS[1],
          "features (oracle): the loss sees": plot.COLOURS[2],
          "    only the moons' two coordinates": plot.COLOURS[2],
          "random plane: the loss sees two": plot.COLOURS[3],
          "    dimensions, but the wrong ones": plot.COLOURS[3],
          "spread: 1 is right, 0 is a collapse": "black"}
# The picture of the drift
PULL, PUSH, BOTH = plot.COLOURS[2], plot.COLOURS[1], "#000000"
DRIFT_AXES = {"title": "Before training: where a dozen generated points should move\n ",
              "x_label": "grey: real points, blue: generated points; kernel temperature: 0.2 S",
              "y_label": "", "x": (-3.8, 3.8), "y": (-2.1, 2.75), "x_ticks": {}, "y_ticks": {},
              "size": (720, 520),
              "legend": {"pull to the real points": PULL, "push from the generated points": PUSH,
                         "V = pull + push": BOTH}}


def arrow(axes, tail, move, colour):
    """A thick arrow from the point tail [2] to tail + move."""
    tip = tail + move
    along = 0.15 * move / move.norm()
    across = along.flip(0) * torch.tensor([-0.4, 0.4])      # at a right angle to the arrow
    base = tip - along
    shaft = torch.stack([tail, base])
    head = torch.stack([tip, base + across, base - across])
    axes.draw.line(axes.pixels(*shaft.T), colour, 6)
    axes.draw.polygon(axes.pixels(*head.T), colour)


def draw_drift():
    """The drift of a dozen generated points before training, at D = 2."""
    torch.manual_seed(4)            # here the first samples miss a moon, and the drift shows where
    generator = make_generator(moons)
    gen = generator(torch.randn(BATCH, 8)).detach()         # [N,2]
    pos = moons(BATCH)                                      # [P,2]
    pull, push = pull_and_push(gen, pos, 0.2 * mean_distance(gen, pos))
    axes = plot.Axes(**DRIFT_AXES)
    axes.points(*pos.T, GREY)
    axes.points(*gen.T, PALE)
    columns = torch.linspace(-2, 2, 4)
    rows = torch.linspace(-1.2, 1.2, 3)
    places = torch.cartesian_prod(columns, rows)            # [12,2]
    nearest = torch.cdist(places, gen).argmin(1)            # [12], the point next to each place
    for i in nearest:
        arrow(axes, gen[i], pull[i], PULL)
        arrow(axes, gen[i], push[i], PUSH)
        arrow(axes, gen[i], pull[i] + push[i], BOTH)
        axes.points(*gen[i], plot.COLOURS[0], radius=6)
    return axes.image()


def panel(gen, real, colour, title):
    """The plane of the moons, in standard deviations of the data."""
    axes = plot.Axes(title, "", "", (-3, 3), (-3, 3), **PANEL)
    axes.points(*real.T, GREY, radius=2)
    axes.points(*gen.T, colour, radius=2)
    return axes.image()


def chart(title, rows, name, top):
    """One measure over D, on an axis from 0 to top."""
    axes = plot.Axes(title, "dimensions D", "", (1.8, 600), (0, top), **CHART)
    for case, colour in CASES.items():
        same = [row for row in rows if (row["regime"], row["method"]) == case]
        dims = [row["dim"] for row in same]
        values = [row[name] for row in same]
        axes.line(dims, values, colour)
        # At D = 512 the dot of the projection lies on that of the features, which is larger.
        radius = 7 if "features" in case else 4
        axes.points(dims, values, colour, radius)
    return axes.image()


def draw_png(rows, films):
    """The last panel of every run, and two charts of the cause."""
    images = [film[-1] for film in films]
    # At D = 2 both regimes are one. The legend takes the place of the second picture of it.
    images[len(DIMS)] = plot.note(LEGEND, images[0].size)
    title = "why: how far the pull leads\n(1: as far as the data lies,\n0: nowhere)"
    images.append(chart(title, rows, "attraction", 1.1))
    title = "why: how many of the\n192 positives count\n(192: the pull leads to the mean)"
    images.append(chart(title, rows, "effective_positives", BATCH))
    return plot.sheet(images, len(DIMS))


# ---- The command

# Of the JSON's numbers: the column of the table, and its decimals.
COLUMNS = {"energy_distance": ("energy distance ↓", 4), "spread_ratio": ("spread", 2),
           "attraction": ("pull", 2), "effective_positives": ("positives that count", 0)}


def print_rows(rows):
    """Print a line per regime, method and D, with means over the seeds."""
    table = []
    for row in rows:
        line = {"data": row["regime"], "loss sees": SEES[row["method"]], "D": row["dim"]}
        for name, (column, _) in COLUMNS.items():
            line[column] = row[name]
        table.append(line)
    runs.print_means(table, ["data", "loss sees", "D"], dict(COLUMNS.values()))


def run(job):
    """Train one generator -> its row of two_moons.json, and its film, a list of panels."""
    regime, method, dim, seed, steps = job
    torch.manual_seed(seed)
    data = partial(sample_data, regime, dim)
    generator = make_generator(data)
    see = make_view(method, dim)
    real = data(SHOWN)[:, :2]                               # in the plane of the moons
    z = torch.randn(SHOWN, 8)
    name = regime if dim > 2 else "both regimes"
    film = []
    for step in train(generator, data, see, steps):
        # The pictures show seed 0 alone.
        if seed == 0 and step % (steps // FRAMES) == 0:
            gen = generator(z)[:, :2].detach()
            spread = gen.std(0).mean()
            title = (f"{name}, D = {dim}\nloss sees: {SEES[method]}\n"
                     f"step {step:,}, spread {spread:.2f}")
            film.append(panel(gen, real, CASES[regime, method], title))
    row = {"regime": regime, "dim": dim, "seed": seed, "method": method}
    return row | measure(generator, data, see), film


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default="out", help="folder (default: out)")
    parser.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, … (default: 1)")
    parser.add_argument("--quick", action="store_true", help="an eighth of the steps")
    parser.add_argument("--show", action="store_true",
                        help="run nothing: print the table of toy/results/two_moons.json")
    args = parser.parse_args(argv)
    if args.show:
        print_rows(json.loads((runs.RESULTS / "two_moons.json").read_text()))
        return
    if args.seeds < 1:
        raise dr.UserError("--seeds must be at least 1")
    dr.make_folder(args.out)
    steps = STEPS // 8 if args.quick else STEPS
    cases = [("concentrated", "drift-rae", dim) for dim in DIMS]
    cases += [("scattered", "drift-rae", dim) for dim in DIMS]
    cases += [("scattered", method, DIMS[-1]) for method in ("features", "projection")]
    jobs = {}
    for case in cases:
        for seed in range(args.seeds):
            jobs[case, seed] = (*case, seed, steps)
    done = dict(runs.in_workers(run, jobs))
    rows, films = zip(*[done[key] for key in jobs])         # in the order of the jobs
    runs.save_json(args.out / "two_moons.json", rows)
    runs.save_png(args.out / "drift.png", draw_drift())
    # Seed 0 comes first for every case.
    rows_0, films_0 = rows[::args.seeds], films[::args.seeds]
    runs.save_png(args.out / "two_moons.png", draw_png(rows_0, films_0).quantize(256))
    widest = [film for row, film in zip(rows_0, films_0) if row["dim"] == DIMS[-1]]
    # The GIF has room for three films: it leaves out the last one, of the projection.
    frames = [plot.sheet(panels, 3).quantize(64) for panels in zip(*widest[:3])]
    dr.save(args.out / "two_moons.gif", partial(plot.write_gif, frames=frames))
    print_rows(rows)


if __name__ == "__main__":
    dr.run_as_script(main)
