"""§3.2 on real digits: is an RAE's space more anisotropic, concentrated and curved than a VAE's?

    python toy/geometry.py                  print the tables of toy/results/geometry.json
    python toy/geometry.py --out DIR        measure anew: DIR/geometry.json and two pictures
    python toy/geometry.py --quick          two spaces, one seed and few steps, into out/

RAE-64 is the representation autoencoder (RAE) of toy/teacher.pt, whose tokens are 64 numbers wide.
toy/vae.py trains two variational autoencoders (VAEs) of the same digits, whose tokens have 16 and
64 numbers. In each space a flow model, the teacher, is trained, and then distilled into students at
three learning rates, since the best rate need not be the same in every space. Theorem 1, which says
why drifting needs concentrated latents, is simulated.
Runs are kept in DIR/geometry.json, so an interrupted command continues where it stopped.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from toy import digits, plot, runs, vae  # noqa: E402

VAES = {"VAE-16": 16, "VAE-64": 64}     # width of their tokens
RATES = (1e-3, 3e-3, 1e-2)
STUDENTS = {f"student at rate {lr:g}": lr for lr in RATES}
SPACES = ["RAE-64", *VAES]
STEPS = (800, 3000, 50)                 # of VAE, flow and student
QUICK_SPACES, QUICK_STEPS = ["RAE-64", "VAE-64"], (200, 200, 20)
CPU = dr.Config(device="cpu")           # how samples are drawn: all methods get the same noise


def average(rows):
    """Dicts of numbers or tensors -> a dict with the mean of each entry over everything."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def rounded(content):
    """Round all numbers in nested dicts and lists to five significant digits."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return float(f"{content:.5g}")


# ---- Theorem 1: scattered targets share the weight, and the attraction vanishes

DIMS = [2**k for k in range(2, 13)]     # 4, 8, … 4096
# For each setting: r and the temperature τ. Where r is None, it is √(3/d), so that x is as long as
# the positives y, and τ is in units of the mean distance between x and its targets.
SETTINGS = {"r = 1, temperature 1": (1.0, 1.0),
            "r = 1, temperature 4": (1.0, 4.0),
            "x as long as y, temperature 0.2 of the mean distance": (None, 0.2),
            "x as long as y, temperature 0.05 of the mean distance": (None, 0.05),
            "x as long as y, temperature 0.02 of the mean distance": (None, 0.02)}


def theorem1(d, r, tau, seed=0):
    """The field at 64 of d generated points x ~ U[−r,r]^d; d positives y on the unit sphere.

    V⁺ is what pulls a query to the positives, and V⁻ is what pushes it from the other x.
    v_pos2      d·‖V⁺‖²; according to the theorem its mean goes to 1 with d
    v_neg       ‖V⁻‖/(r/√3); according to the theorem its mean goes to 1, too
    neg_over_x  ‖V⁻‖ as a share of the mean ‖x‖
    share_pos   the number of positives that count, 1/Σw², divided by d; uniform weights give 1
    """
    g = torch.Generator().manual_seed(seed)
    half = r or (3 / d)**0.5                                # half the width of the cube of x
    y = F.normalize(torch.randn(d, d, generator=g), dim=-1)
    x = (2 * torch.rand(d, d, generator=g) - 1) * half
    to_pos = torch.cdist(x[:64], y)                         # [64,d]
    to_neg = torch.cdist(x[:64], x)
    if r is None:
        tau = tau * (to_pos.mean() + to_neg.mean()) / 2
    to_neg.fill_diagonal_(torch.inf)                        # k ≠ j: no sample repels itself
    w_pos = (-to_pos / tau).softmax(-1)
    w_neg = (-to_neg / tau).softmax(-1)
    pull = w_pos @ y                                        # V⁺ of the theorem
    push = w_neg @ x                                        # V⁻
    length = push.norm(dim=-1)
    table = {"v_pos2": d * pull.square().sum(-1)}
    table["v_neg"] = length / (half / 3**0.5)
    table["neg_over_x"] = length / x.norm(dim=-1).mean()
    table["share_pos"] = 1 / w_pos.square().sum(-1) / d
    return table


def simulate(job):
    """job: the setting's name and d -> means over 256 queries."""
    setting, d = job
    seeds = range(256 // min(64, d))
    draws = [theorem1(d, *SETTINGS[setting], seed=seed) for seed in seeds]
    return rounded(average(draws))


# ---- Tables 1 and 2: how the latents are spread


def kernel(a, b):
    """The mean of exp(−‖a − b‖/√d) over all pairs of a and b [L,·,d] -> [L]."""
    distance = torch.cdist(a, b) / a.shape[-1]**0.5
    return (-distance).exp().mean((1, 2))


def statistics(x):
    """n samples of one class at each of L tokens, x [L,n,d] -> four numbers per token, [L] each.

    PR     participation ratio of the covariance's eigenvalues, from 1/d to 1, which is isotropic
    SE     spectral entropy of these eigenvalues, with the same range
    NN-d   mean distance to the nearest sample; it is small where a class is concentrated
    S-MMD  how far the samples are from points spread evenly on a sphere; large if concentrated
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
    """class_statistics of the latents as the encoder gives them, and of normalised ones."""
    normalised = (raw - raw.mean(0)) / raw.std(0)
    table = {}
    for kind, latents in {"raw": raw, "normalised": normalised}.items():
        for name, value in class_statistics(latents, labels).items():
            table[f"{name}, {kind}"] = value
    return table


# ---- Figure 1: how the teacher's paths bend

TIMES = 1 - torch.linspace(0, 0.999, 50)[1:-1]  # t of the inner points of ode_sample's grid
# The curvature is averaged over these t. The range was fixed before the committed runs were made.
# Near t = 1 the flow has hardly been trained, because a training time is the sigmoid of a normal
# number, and 0.2 % of these lie above 0.95. Near t = 0 a step of the grid is large relative to
# the rest of the path.
RANGE = (0.05, 0.95)
IN_RANGE = (RANGE[0] < TIMES) & (TIMES < RANGE[1])


def curvature(path):
    """K points [K,n,…] of n curves, at equal steps of time -> κ at the inner points [K−2,n].

    κ = ‖x''⊥‖/‖x'‖², where x''⊥ is the part of the acceleration across the curve.
    """
    x = path.flatten(2).double()
    before = x[:-2]
    now = x[1:-1]
    after = x[2:]
    v = (after - before) / 2                                # the step of time cancels in κ
    a = after - 2 * now + before
    squared_speed = v.square().sum(-1, keepdim=True)
    along = (a * v).sum(-1, keepdim=True) / squared_speed
    across = a - along * v
    return across.norm(dim=-1) / squared_speed.squeeze(-1)


def curvature_band(teacher, shape):
    """κ·√dimensions of 32 paths: its mean, 10th and 90th percentile at each of TIMES, [3,48].

    Noise has about the length √dimensions. In units of this length, the number is a curvature that
    may be compared between spaces of different dimensions.
    """
    z = torch.randn(32, *shape)
    y = torch.arange(32) % 10
    kappa = curvature(vae.ode_path(teacher, z, y))
    scaled = kappa * z[0].numel()**0.5
    band = [scaled.mean(1), scaled.quantile(0.1, 1), scaled.quantile(0.9, 1)]
    return torch.stack(band)


def curvature_means(values):
    """The curvature at TIMES -> its mean over the t in RANGE, and over all t."""
    return {"curvature, t from 0.05 to 0.95": values[IN_RANGE].mean().item(),
            "curvature, all t": values.mean().item()}


# ---- One space: statistics, a flow model and its paths, students


def open_space(name, path, vae_steps):
    """-> the Space, and what the noise of a VAE's posterior does to the latents ({} for the RAE).

    The posterior's means are the latents without that noise.
    """
    if name in VAES:
        space, mean = vae.vae_space(VAES[name], vae_steps)
        nn_d = class_statistics(mean, space.labels)["NN-d"]
        explained = (mean / space.rae.std).var(0).mean().item()
        return space, {"NN-d of the posterior's means, raw": nn_d,
                       "posterior's noise, share of the variance": 1 - explained}
    _, rae, checkpoint = runs.open_teacher(path)
    latents = checkpoint["latents"].float()
    raw = latents * rae.std + rae.mean
    return vae.Space(rae, raw, latents, checkpoint["labels"]), {}


def study(job):
    """Everything about one space with one seed. job: its name, seed, the teacher's path, steps."""
    name, seed, path, (vae_steps, flow_steps, student_steps) = job
    torch.manual_seed(seed)
    space, posterior = open_space(name, path, vae_steps)
    numbers = token_statistics(space.raw, space.labels) | posterior
    teacher = vae.flow_teacher(space, flow_steps, seed)
    band = curvature_band(teacher, space.rae.mean.shape)
    numbers |= curvature_means(band[0])
    samplers = {"teacher, 49 evaluations": partial(dr.ode_sample, teacher),
                "teacher, 1 evaluation": partial(dr.one_step, teacher)}
    for method, lr in STUDENTS.items():
        cfg = dr.Config(device="cpu", seed=seed, steps=student_steps, lr=lr)
        try:
            student = runs.distilled(teacher, space.latents, space.labels, cfg)
            samplers[method] = partial(dr.one_step, student)
        except dr.UserError:            # train_step: the gradient is NaN or infinite
            numbers[f"Fréchet, {method}"] = float("inf")
    measure = digits.Metrics(dr.load(path))
    images = dr.to_uint8(space.rae.decode(space.latents[::2]))
    metrics = {"autoencoder": measure(images, measure.labels)}
    for method, sampler in samplers.items():
        images = dr.generate(sampler, space.rae, measure.labels, CPU)
        metrics[method] = measure(images, measure.labels)
    for method in metrics:
        numbers[f"Fréchet, {method}"] = metrics[method].pop("fd")
    return rounded({"numbers": numbers, "metrics": metrics, "band": band.tolist()})


# ---- Tables and pictures

# The paper's SD-VAE and RAE. In Figure 1, κ is about 1e-5 and 1e-3; here it is multiplied by the
# roots of the dimensions, √(32·32·4) and √(16·16·768).
PAPER = {"PR, raw": ["0.2068", "0.0630"], "SE, raw": ["0.3781", "0.2110"],
         "NN-d, raw": ["4.3083", "1.0664"], "S-MMD, raw": ["0.00576", "0.07913"],
         "curvature, all t": ["0.0006", "0.44"]}
THEOREM = {"v_pos2": "squared length of the pull, relative to 1/d",
           "v_neg": "length of the push, relative to r/√3",
           "neg_over_x": "length of the push, relative to ‖x‖",
           "share_pos": "share of the positives that count"}


def values_of(seeds):
    """The runs of one space -> {row of the table: its values, one per seed}."""
    rows = {}
    for name in seeds[0]["numbers"]:
        rows[name] = [run["numbers"][name] for run in seeds]
    return rows


def print_spaces(columns):
    """Print one row per measure and one column per space, over the seeds."""
    lines = []
    for name in columns["VAE-64"]:      # a VAE has all rows
        decimals = 2 if name.startswith("Fréchet") else 4
        line = [name.replace("Fréchet", "distance")]
        for rows in columns.values():
            cell = runs.cell(rows[name], decimals) if name in rows else ""
            line.append(cell)
        lines.append(line + PAPER.get(name, ["", ""]))
    runs.print_table(["", *columns, "paper: SD-VAE", "paper: RAE"], lines)


def print_best(columns):
    """Print how near the students come to their teachers, with the best rate in each space."""
    lines = []
    for space, rows in columns.items():
        best = min(STUDENTS, key=lambda name: np.mean(rows[f"Fréchet, {name}"]))
        student = rows[f"Fréchet, {best}"]
        teacher = rows["Fréchet, teacher, 49 evaluations"]
        gap = np.subtract(student, teacher)
        cells = [runs.cell(values) for values in (student, teacher, gap)]
        lines.append([space, f"{STUDENTS[best]:g}", *cells])
    runs.print_table(["", "best rate", "student", "teacher", "student minus teacher"], lines)


def print_theorem(theorem):
    """Print one row per setting; a cell has the numbers for three d."""
    three = slice(2, None, 4)                               # d = 16, 256, 4096
    lines = []
    for setting, rows in theorem.items():
        cells = [", ".join(f"{row[name]:.3f}" for row in rows[three]) for name in THEOREM]
        lines.append([setting, *cells])
    runs.print_table([f"d = {DIMS[three]}", *THEOREM.values()], lines)


def draw_theorem(theorem):
    """Pull and push over d, with one line per setting."""
    colours = dict(zip(theorem, plot.COLOURS))
    charts = []
    for name in ("v_pos2", "v_neg"):
        ends = DIMS[0], DIMS[-1]
        axes = plot.Axes(THEOREM[name], "dimensions d", "", ends, (0.7, 40), x_log=True, y_log=True,
                         size=(480, 380))
        axes.line(ends, [1, 1], "#000000")
        for setting, colour in colours.items():
            values = [row[name] for row in theorem[setting]]
            axes.line(DIMS, values, colour)
        charts.append(axes.image())
    legend = {"black: the limit of Theorem 1": "#000000"} | colours
    return plot.sheet([plot.sheet(charts, 2), plot.note(legend, (960, 150))], 1)


def draw_curvature(studies):
    """The curvature over t. The black lines mark RANGE."""
    legend = dict(zip(studies, plot.COLOURS))
    bands = [np.mean([run["band"] for run in seeds], 0) for seeds in studies.values()]
    limits = np.min(bands), np.max(bands)
    title = "Curvature of the flow models' paths; line: mean, band: 80 % of the paths"
    axes = plot.Axes(title,
                     "time t (1: noise, 0: data); the table averages between the black lines",
                     "radians per length of the noise", (0, 1), limits, y_log=True, legend=legend)
    for (mean, low, high), colour in zip(bands, plot.COLOURS):
        axes.line(TIMES, mean, colour, low, high)
    for t in RANGE:
        axes.line(t, limits, "#000000")
    return axes.image()


# ---- The command


def plan(args):
    """-> what `simulate` takes and what `study` takes, {key: job} each."""
    settings = {f"Theorem 1, {name}, d = {d}": (name, d) for name in SETTINGS for d in DIMS}
    spaces = {}
    names, steps = (QUICK_SPACES, QUICK_STEPS) if args.quick else (SPACES, STEPS)
    for seed in range(args.seeds):
        for name in names:
            key = f"{name}, seed {seed}, steps {steps}"
            spaces[key] = name, seed, args.teacher, steps
    return settings, spaces


def gather(jobs, work, args):
    """Get the runs -> {setting: its runs, one per d}, or {space: its runs, one per seed}."""
    results = {}
    for key, run in runs.get_runs("geometry", args, jobs, work).items():
        name, *_ = jobs[key]
        results.setdefault(name, []).append(run)
    return results


def parse(argv):
    parser = runs.make_parser(__doc__, quick="two spaces, with one seed and few steps")
    return runs.parse_seeds(parser, argv)


def main(argv=None):
    args = parse(argv)
    settings, spaces = plan(args)
    if args.out:
        dr.make_folder(args.out)
        runs.open_teacher(args.teacher)     # refuse a wrong file before the workers start
    theorem = gather(settings, simulate, args)
    studies = gather(spaces, study, args)
    columns = {space: values_of(seeds) for space, seeds in studies.items()}
    print_spaces(columns)
    print_best(columns)
    print_theorem(theorem)
    if args.out:
        runs.save_png(args.out / "theorem1.png", draw_theorem(theorem))
        runs.save_png(args.out / "curvature.png", draw_curvature(studies))


if __name__ == "__main__":
    dr.run_as_script(main)
