"""§3.2 on real digits: is an RAE's space more anisotropic, concentrated and curved than a VAE's?

    python toy/geometry.py [--seeds 1]     a table; OUT has geometry.json, theorem1.json, .png and
                                           curvature.png
    python toy/geometry.py --quick         two spaces and few steps: a look, not a result

The RAE is that of toy/teacher.pt; toy/vae.py trains the VAEs. In every space a flow model is
trained and then distilled. Runs are kept in OUT/geometry.json, so an interrupted command continues
where it stopped.
"""
import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from toy import digits, plot, runs, vae  # noqa: E402

VAES = {"VAE-16": 16, "VAE-64": 64, "VAE-128": 128}         # width of their tokens
DIMS = [2**k for k in range(2, 13)]                         # of Theorem 1: 4, 8, … 4096
FULL = {"spaces": ["RAE-64", *VAES], "dims": DIMS,
        "steps": (*vae.STEPS, 100)}                         # of VAE, flow, student
QUICK = {"spaces": ["RAE-64", "VAE-64"], "dims": DIMS[:9], "steps": (200, 200, 20)}
CPU = dr.Config(device="cpu")           # how samples are drawn: all methods get the same noise


def average(rows):
    """Dicts of numbers or tensors -> a dict with the mean of each entry over everything."""
    means = {}
    for key in rows[0]:
        values = [np.asarray(row[key]) for row in rows]
        means[key] = float(np.mean(values))
    return means


# ---- Theorem 1: scattered targets share the weight, and the attraction vanishes

# r, or None for √(3/d), which makes x as long as y; τ; whether τ is in units of the mean distance S
SETTINGS = {"r = 1, τ = 1": (1.0, 1.0, False), "r = 1, τ = 4": (1.0, 4.0, False),
            "‖x‖ = ‖y‖, τ = 0.2 S": (None, 0.2, True), "‖x‖ = ‖y‖, τ = 0.05 S": (None, 0.05, True),
            "‖x‖ = ‖y‖, τ = 0.02 S": (None, 0.02, True)}


def theorem1(d, r, tau, in_mean_distances, queries=64, seed=0):
    """The field at some of d generated points x ~ U[−r,r]^d; d positives y on the unit sphere.

    According to the theorem the means of v_pos2 and v_neg go to 1 with d. share_pos is 1/Σw², the
    number of positives that count, divided by d; its mean should go to 1, too.
    """
    g = torch.Generator().manual_seed(seed)
    r = r or (3 / d)**0.5
    y = F.normalize(torch.randn(d, d, generator=g), dim=-1)
    x = (2 * torch.rand(d, d, generator=g) - 1) * r
    to_pos = torch.cdist(x[:queries], y)                    # [queries,d]
    to_neg = torch.cdist(x[:queries], x)
    if in_mean_distances:
        tau = tau * (to_pos.mean() + to_neg.mean()) / 2
    to_neg.fill_diagonal_(torch.inf)                        # k ≠ j: no sample repels itself
    w_pos = (-to_pos / tau).softmax(-1)
    w_neg = (-to_neg / tau).softmax(-1)
    attraction, repulsion = w_pos @ y, w_neg @ x
    table = {"v_pos2": d * attraction.square().sum(-1)}
    table["v_neg"] = repulsion.norm(dim=-1) / (r / 3**0.5)
    table["share_pos"] = 1 / w_pos.square().sum(-1) / d
    return table


def simulate(dims):
    """One row per setting and d, each a mean over 256 queries."""
    rows = []
    for setting, arguments in SETTINGS.items():
        for d in dims:
            seeds = range(256 // min(64, d))
            draws = [theorem1(d, *arguments, seed=seed) for seed in seeds]
            rows.append({"setting": setting, "d": d} | average(draws))
    return rows


# ---- Tables 1 and 2: how the latents are spread


def kernel(a, b):
    """The mean of exp(−‖a − b‖/√d) over all pairs of a and b [L,·,d] -> [L]."""
    distance = torch.cdist(a, b) / a.shape[-1]**0.5
    return (-distance).exp().mean((1, 2))


def statistics(x):
    """Of n samples of one class at each of L tokens, x [L,n,d] -> four numbers per token, [L] each.

    PR and SE lie between 1/d and 1, where 1 is isotropic. A concentrated class has a small NN-d
    and a large S-MMD.
    """
    x = x - x.mean(1, keepdim=True)
    d = x.shape[2]
    mu = torch.linalg.eigvalsh(x.mT @ x).clamp(min=0)       # the factor n − 1 cancels below
    p = mu / mu.sum(1, keepdim=True)
    entropy = torch.special.entr(p).sum(1)
    two = torch.cdist(x, x).topk(2, largest=False).values   # the sample itself, and the nearest
    eye = torch.eye(d, dtype=x.dtype)
    rho = x.norm(dim=-1).mean(1)
    poles = torch.cat([eye, -eye]) * rho.view(-1, 1, 1)     # ±ρ·e_i [L,2d,d]
    table = {"PR": 1 / (d * p.square().sum(1))}             # Eq. (47)
    table["SE"] = entropy.exp() / d                         # Eq. (48)
    table["NN-d"] = two[..., 1].mean(1) / d**0.5            # Eq. (49)
    table["S-MMD"] = kernel(x, x) + kernel(poles, poles) - 2 * kernel(x, poles)     # Eq. (50)-(53)
    return table


def class_statistics(latents, labels):
    """Latents [n,D,h,w], labels [n] -> means over classes and tokens (App. B.1)."""
    classes = [dr.tokens(latents[labels == c]) for c in labels.unique()]
    return average([statistics(x.double()) for x in classes])


def token_statistics(raw, labels):
    """class_statistics of the normalised latents, and then of the raw ones."""
    normalised = (raw - raw.mean(0)) / raw.std(0)
    table = class_statistics(normalised, labels)
    table_raw = class_statistics(raw, labels)
    return table | {f"{name} raw": value for name, value in table_raw.items()}


# ---- Figure 1: how the teacher's paths bend


def curvature(path):
    """K points [K,n,…] of n curves, at equal steps of time.

    -> κ = ‖x''⊥‖/‖x'‖² at the inner points [K−2,n], the angle that each curve turns in all [n].
    """
    x = path.flatten(2).double()
    before, now, after = x[:-2], x[1:-1], x[2:]
    v = (after - before) / 2                                # the step of time cancels in κ
    a = after - 2 * now + before
    along = (a * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
    a = a - along * v                                       # the part across the curve
    speed = v.norm(dim=-1)
    turn = a.norm(dim=-1) / speed                           # radians per step
    return turn / speed, turn.sum(0)


def flow_curvature(teacher, shape):
    """Of 32 paths: mean, 10th and 90th percentile of κ·√dimensions over t [3,48]; means over t."""
    z = torch.randn(32, *shape)
    y = torch.arange(32) % 10
    kappa, angle = curvature(vae.ode_path(teacher, z, y))
    scaled = kappa * math.prod(shape)**0.5                  # radians per length of the noise
    band = [scaled.mean(1), scaled.quantile(0.1, 1), scaled.quantile(0.9, 1)]
    means = average([{"κ": kappa, "κ·√dimensions": scaled, "degrees turned": angle.rad2deg()}])
    return torch.stack(band).tolist(), means


# ---- One space: statistics, a flow model and its paths, a student


def open_space(name, path, steps):
    """-> the Space, {name: latents whose statistics are of interest}, the posterior's share.

    The posterior's share is the part of the latents' variance that its noise makes.
    """
    if name in VAES:
        space, mean = vae.vae_space(VAES[name], steps)
        views = {name: space.raw, f"{name}, posterior mean": mean}
        explained = (mean / space.rae.std).var(0).mean().item()
        share = 1 - explained
    else:
        _, rae, checkpoint = runs.open_teacher(path)
        latents = checkpoint["latents"].float()
        space = vae.Space(rae, latents * rae.std + rae.mean, latents, checkpoint["labels"])
        views = {name: space.raw}
        share = math.nan                                    # an RAE has no posterior
    views["N(0, I)"] = torch.randn_like(space.latents)
    return space, views, share


def study(job):
    """Everything about one space with one seed. job: its name, seed, the teacher's path, steps."""
    name, seed, path, steps = job
    torch.manual_seed(seed)
    metrics = digits.Metrics(dr.load(path))
    space, views, share = open_space(name, path, steps[0])
    tables = {view: token_statistics(x, space.labels) for view, x in views.items()}
    teacher = vae.flow_teacher(space, steps[1], seed)
    cfg = dr.Config(device="cpu", seed=seed, steps=steps[2])
    student = runs.distilled(teacher, space.latents, space.labels, cfg)
    samplers = {"teacher, 50 steps": partial(dr.ode_sample, teacher),
                "teacher, 1 step": partial(dr.one_step, teacher),
                "distilled": partial(dr.one_step, student)}
    rebuilt = dr.to_uint8(space.rae.decode(space.latents[::2]))
    methods = {"autoencoder": metrics(rebuilt, space.labels[::2])}
    for method, sampler in samplers.items():
        images = dr.generate(sampler, space.rae, metrics.labels, CPU)
        methods[method] = metrics(images, metrics.labels)
    band, means = flow_curvature(teacher, space.rae.mean.shape)
    means["posterior's share"] = share
    return {"space": name, "statistics": tables, "methods": methods, "band": band, "path": means}


# ---- Pictures and the table

PAPER = {
    "paper: SD-VAE": [{"PR raw": 0.2068, "SE raw": 0.378, "NN-d raw": 4.308, "S-MMD raw": 0.00576}],
    "paper: RAE": [{"PR raw": 0.0630, "SE raw": 0.2110, "NN-d raw": 1.0664, "S-MMD raw": 0.07913}]}
PAPER_CURVATURE = {                     # κ of Figure 1, times √dimensions
    "paper: RAE, κ = 1e-3": 1e-3 * (16 * 16 * 768)**0.5,
    "paper: SD-VAE, κ = 1e-5": 1e-5 * (32 * 32 * 4)**0.5}


def draw_theorem1(rows, dims, path):
    charts = []
    titles = {"v_pos2": "d·E‖V⁺‖²: 1 is an attraction of length 1/√d",
              "v_neg": "repulsion E‖V⁻‖ / (r/√3)", "share_pos": "share of the positives that count"}
    for name, title in titles.items():
        x_label = "dimensions d, and samples; black: Theorem 1"
        axes = plot.Axes("", x_label, title, (dims[0], dims[-1]), (0.04, 40), x_log=True,
                         y_log=True, size=(480, 400), font=16)
        axes.line(dims, np.ones(len(dims)), "#000000")
        for i, setting in enumerate(SETTINGS):
            values = [row[name] for row in rows if row["setting"] == setting]
            axes.line(dims, values, plot.COLOURS[i])
            if name == "share_pos":
                axes.text(dims[0], 24 / 1.6**i, setting, plot.COLOURS[i])
        charts.append(axes.image())
    runs.save_png(path, plot.sheet(charts, 3))


def draw_curvature(studies, spaces, path):
    title = "Curvature of the teacher's paths: their mean, and 80 % of them"
    y_label = "κ·√dimensions: radians per length of the noise"
    legend = dict(zip(spaces, plot.COLOURS))
    axes = plot.Axes(title, "t (1: noise, 0: data)", y_label, (0, 1), (3e-4, 30), y_log=True,
                     legend=legend, size=(820, 480))
    t = 1 - np.linspace(0, 0.999, 50)[1:-1]
    for space, colour in legend.items():
        bands = [row["band"] for row in studies if row["space"] == space]
        mean, low, high = np.mean(bands, 0)
        axes.line(t, mean, colour, low, high)
    for name, value in PAPER_CURVATURE.items():
        axes.diamonds(0.5, value)
        axes.text(0.51, value, name)
    runs.save_png(path, axes.image())


def three_digits(values):
    """The values of the seeds as the text of a cell, with three significant digits."""
    mean = np.mean(values)
    if np.isnan(mean):
        return ""
    decimals = 2 - int(np.floor(np.log10(abs(mean) + 1e-9)))
    return runs.cell(values, max(0, decimals))


def print_measures(studies, spaces):
    """Print a table with one row per measure and one column per space, over the seeds."""
    columns = {space: [] for space in spaces}
    for row in studies:
        column = row["statistics"][row["space"]] | row["path"]
        for method, metrics in row["methods"].items():
            column[f"Fréchet, {method}"] = metrics["fd"]
        columns[row["space"]].append(column)
    measures = list(column)             # all columns but the paper's have the same ones
    columns |= PAPER
    rows = []
    for measure in measures:
        cells = [measure]
        for seeds in columns.values():
            values = [seed.get(measure, math.nan) for seed in seeds]
            cells.append(three_digits(values))
        rows.append(cells)
    runs.print_table(["", *columns], rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of what is written (default: out)")
    add("--teacher", type=Path, default=dr.Config.teacher, help="default: toy/teacher.pt")
    add("--seeds", type=int, default=1, help="seeds of VAEs, flows and students (default: 1)")
    add("--quick", action="store_true", help="two spaces and few steps: a look, not a result")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise dr.UserError("--seeds must be at least 1")
    size = QUICK if args.quick else FULL
    dr.make_folder(args.out)
    runs.open_teacher(args.teacher)     # refuse a wrong file before the work starts
    theorem = simulate(size["dims"])
    draw_theorem1(theorem, size["dims"], args.out / "theorem1.png")
    runs.save_json(args.out / "theorem1.json", theorem)
    jobs = {}
    for seed in range(args.seeds):
        for name in size["spaces"]:
            key = f"{name}, seed {seed}, steps {size['steps']}"
            jobs[key] = name, seed, args.teacher, size["steps"]
    done = runs.complete(args.out / "geometry.json", args.teacher, jobs, study)
    studies = list(done.values())
    draw_curvature(studies, size["spaces"], args.out / "curvature.png")
    print_measures(studies, size["spaces"])


if __name__ == "__main__":
    dr.run_as_script(main)
