"""What else could one do with this teacher? Families of distillation at one budget, on digits.

    python toy/rivals.py                    print the tables of toy/results/rivals.json
    python toy/rivals.py --out DIR --rates  try three learning rates per method: DIR/rivals.json
    python toy/rivals.py --out DIR          measure the table: DIR/rivals.json and two pictures
    python toy/rivals.py --quick            a tenth of the budget and one seed, into out/

The teacher, toy/teacher.pt, is a flow model on the latents of a tiny autoencoder of digits. It
needs 49 evaluations of its network per image. Every method makes of it a student that needs one
(step-4: four), and starts from the teacher's weights.

What a method may spend. All have the same budget of network evaluations of one sample. A forward
pass counts as 1, a backward pass as 2 (as 1 if only the input has a gradient), a forward-mode
product as 2. Everything counts: the teacher, a second network, and training pairs that a network
generates. Decay of the learning rate, clipping and moving average are those of drift_rae.py.

What a method sees. Regression, reflow, step-4, DMD and SiD see the teacher alone and no real
latent. Consistency sees the teacher and real latents. Drifting sees real latents and takes nothing
of the teacher except its weights at the start. An evaluation compares 2,500 images with R, half of
the 5,000 real digits. Consistency and drifting have trained on R, too (so has the teacher), whereas
the others know of R only what the teacher knows.

What the table says. All methods are minimal baselines of which only the learning rate was tuned.
The best of them is the best of these minimal baselines at this budget, and nothing more. DMD and
SiD run without the GAN losses of their best versions. Three families are left out. TwinFlow
(2512.05150) does not train without its any-step loss, and with that loss it would be the largest
method here. ARD (2504.11295) needs a network of its own, whose attention sees the history of a
path. MSD (2410.23274) trains several students, and would be drifting on half of the classes each.

In this file x is data, z or ε is noise, and x_t = (1−t)·x + t·ε. The flow's velocity is
v(x_t, t) ≈ ε − x, and a single step from noise is G(z) = z − v(z, 1). sg stops the gradient.
Finished runs stay in DIR/rivals.json, so an interrupted command continues where it stopped.
"""
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drift_rae as dr  # noqa: E402
from toy import digits, plot, runs, vae  # noqa: E402

BUDGET = 192_000    # network evaluations, as many as 50 steps of drift_rae.py take
BATCH = 256         # samples per step, except where a method says otherwise
PATH = 49           # evaluations per path of the teacher, as in the report of drift_rae.py
RATES_SEED = 100    # of the trials of learning rates: the table does not use this seed


@dataclasses.dataclass
class Task:
    """What a method gets, and how many evaluations it has spent of its budget."""
    teacher: dr.DiTDH
    latents: torch.Tensor           # of the real digits, [n,D,h,w]
    labels: torch.Tensor            # [n]
    budget: int
    cfg: dr.Config                  # holds the learning rate and the seed
    spent: int = 0

    def draw_batch(self, n):
        """-> real latents [n,D,h,w], their labels [n], noise [n,D,h,w]."""
        i = torch.randint(len(self.latents), (n,))
        x = self.latents[i]
        return x, self.labels[i], torch.randn_like(x)

    def fit_student(self, start, loss, cost, share=1.0):
        """Train a copy of the network `start` for a share of the budget -> its moving average.

        A step minimises loss(student) and costs `cost` evaluations.
        """
        cfg = self.cfg
        steps = int(share * self.budget) // cost
        self.spent += steps * cost
        student, ema, optimizer = dr.prepare(start, cfg)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = cfg.lr * (1 - 0.99 * step / steps)
            take_step(student, optimizer, loss(student))
            warmup = min(1, step / cfg.ema_warmup)
            dr.update_average(ema, student, decay=0.5 * (cfg.ema / 0.5) ** warmup)
        return ema

    @torch.no_grad()
    def make_paths(self, model, steps, share):
        """Follow paths of the model's ODE for a share of the budget.

        -> steps + 1 points of each path, noise first, [steps+1,n,D,h,w]; labels [n]
        """
        n = int(share * self.budget) // PATH
        self.spent += n * PATH
        _, labels, noise = self.draw_batch(n)
        # 49 is no multiple of 4: these points are the closest ones to dr.ode_sample's four steps.
        index = torch.linspace(0, PATH, steps + 1).round().long()
        parts = zip(noise.split(BATCH), labels.split(BATCH))
        points = [vae.ode_path(model, z, y)[index] for z, y in parts]
        return torch.cat(points, 1), labels


def column(t):
    """Times [B], shaped to multiply latents."""
    return t.view(-1, 1, 1, 1)


def take_step(net, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), dr.Config.clip)
    if not norm.isfinite():
        raise dr.UserError("the gradient is NaN or infinite: try a lower rate")     # as train_step
    optimizer.step()


# The methods: each takes a Task and returns a network. A network of one step is sampled by
# dr.one_step, one of several steps by dr.ode_sample.


def keep_teacher(task):
    return task.teacher


# ---- Regression on the ends of the teacher's paths (Luhman & Luhman 2101.02388)


def path_loss(model, paths, along=0):
    """‖v(x_s, t_s) − (x_s − x_s+1)/(t_s − t_s+1)‖² at random points of paths from make_paths.

    For paths of one step, from z to x̂, this is ‖G(z) − x̂‖² (where x̂ is taken on from t = 0.001,
    at which dr.ode_sample ends, to 0). With along = 1 such paths are also learnt between their
    ends. That is flow matching on the straight lines from x̂ to z.
    """
    points, labels = paths
    steps = len(points) - 1
    i = torch.randint(len(labels), (BATCH,))
    s = torch.randint(steps, (BATCH,))
    v = (points[s, i] - points[s + 1, i]) * steps / 0.999
    back = along * torch.rand(BATCH)
    x_t = points[s, i] - column(back) * v
    t = 1 - 0.999 * s / steps - back                        # the times of dr.ode_sample
    return (model(x_t, t, labels[i]) - v).square().mean()


def fit_paths(task, start, paths, share, along=0):
    """Train a copy of `start` on the paths, which are used again and again."""
    loss = partial(path_loss, paths=paths, along=along)
    return task.fit_student(start, loss, 3 * BATCH, share)


def train_steps(task, steps):
    """Step distillation; one step is plain regression. The paths take half of the budget."""
    paths = task.make_paths(task.teacher, steps, 1 / 2)
    return fit_paths(task, task.teacher, paths, 1 / 2)


def train_reflow(task):
    """Rectified flow (2209.03003), InstaFlow (2309.06380), with a quarter of the budget per stage.

    Flow matching between the ends of the teacher's paths straightens the flow. Then regression on
    fresh paths of the straightened network makes a single step of it.
    """
    paths = task.make_paths(task.teacher, 1, 1 / 4)
    straight = fit_paths(task, task.teacher, paths, 1 / 4, along=1)
    paths = task.make_paths(straight, 1, 1 / 4)
    return fit_paths(task, straight, paths, 1 / 4)


# ---- Consistency, mean velocity (2303.01469; sCM 2503.09641; MeanFlow 2505.13447)


def consistency_loss(student, teacher, x, y, noise):
    """u(x_t, t) becomes the mean velocity from t down to 0: u = v − t·du/dt on the teacher's path.

    A forward-mode product along (v, 1) gives du/dt. The squared error of a sample is divided by
    its own size.
    """
    t = torch.rand(len(x))
    x_t = (1 - column(t)) * x + column(t) * noise

    def u(x, t):
        return student(x, t, y)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):     # other backends have no forward mode
        v = teacher(x_t, t, y)
        direction = v, torch.ones_like(t)
        _, du_dt = torch.func.jvp(u, (x_t, t), direction)
        target = v - column(t) * du_dt
    error = (u(x_t, t) - target).square().sum((1, 2, 3))
    return (error / (error.detach() + 1e-3)).mean()


def train_consistency(task):
    def loss(student):
        return consistency_loss(student, task.teacher, *task.draw_batch(BATCH))

    cost = 1 + 2 + 3        # per sample: the teacher, the forward-mode product, the student
    return task.fit_student(task.teacher, loss, cost * BATCH)


# ---- Scores: a second network, "fake", learns the flow of the student's samples


def denoise(x, y, *networks):
    """Add noise to samples x. -> what each network takes for the clean samples, and mean|x − x̂|.

    That is x̂ = x_t − t·v(x_t, t) with one t in [0.02, 0.98] per sample. The mean is taken per
    sample, for the first network, without gradient.
    """
    t = 0.02 + 0.96 * torch.rand(len(x))
    x_t = (1 - column(t)) * x + column(t) * torch.randn_like(x)
    clean = [x_t - column(t) * v(x_t, t, y) for v in networks]
    error = (x - clean[0]).detach().abs()
    return *clean, error.mean((1, 2, 3), keepdim=True)


def dmd_loss(x, y, real, fake):
    """½‖x − sg[x − g]‖², g = (x̂_fake − x̂_real) / mean|x − x̂_real|.

    This is DMD (2311.18828) without its regression, as in DMD2 (2405.14867), but also without the
    GAN loss of DMD2.
    """
    with torch.no_grad():
        x_real, x_fake, size = denoise(x, y, real, fake)
        target = x - (x_fake - x_real) / size
    return 0.5 * (x - target).square().mean()


def sid_loss(x, y, real, fake):
    """⟨x̂_real − x̂_fake, x̂_fake − x⟩ / sg[mean|x − x̂_real|]: SiD (2404.04057) at α = 1.

    The GAN loss of SiDA (2410.14919) is left out. The gradient runs through both networks to their
    inputs.
    """
    x_real, x_fake, size = denoise(x, y, real, fake)
    product = (x_real - x_fake) * (x_fake - x)
    return (product / size).mean()


def match_scores(task, score_loss, cost, updates):
    """Before each step of the student, the fake network takes `updates` steps.

    All these steps together cost `cost` per sample.
    """
    n = BATCH // 2
    real = task.teacher.requires_grad_(False)               # gradients pass it, to its input
    fake, _, optimizer = dr.prepare(real, task.cfg)

    def loss(student):
        fake.requires_grad_(True)
        for _ in range(updates):
            _, y, z = task.draw_batch(n)
            with torch.no_grad():
                x = dr.one_step(student, z, y)
            take_step(fake, optimizer, dr.flow_matching_loss(fake, x, y))
        fake.requires_grad_(False)
        _, y, z = task.draw_batch(n)
        return score_loss(dr.one_step(student, z, y), y, real, fake)

    return task.fit_student(real, loss, cost * n)


# ---- Drifting (Deng et al. 2602.04770; Drift-RAE 2606.15553; windows are our addition)


def train_drift(task, **changes):
    """The distillation of drift_rae.py, with changes of its defaults."""
    cfg = dataclasses.replace(task.cfg, **changes)
    cost = cfg.n_class * (3 * cfg.n_neg + cfg.n_extra_neg)
    cfg.steps = task.budget // cost
    task.spent += cfg.steps * cost
    return runs.distilled(task.teacher, task.latents, task.labels, cfg)


# ---- What is compared


class Method(NamedTuple):
    title: str
    group: str              # what the method sees
    nfe: int                # network evaluations per sample
    train: Callable         # of a Task; returns a network


GROUPS = ("the teacher itself", "the teacher alone", "real latents and the teacher")
ITSELF, ALONE, REAL = GROUPS
COLOURS = dict(zip(GROUPS, plot.COLOURS))     # in the picture
DENG = dict(n_pos=64, n_extra_neg=0, perturb=False, field="y-softmax")
METHODS = {
    "teacher-1": Method("teacher-1", ITSELF, 1, keep_teacher),
    "teacher-4": Method("teacher-4", ITSELF, 4, keep_teacher),
    "teacher-49": Method("teacher-49", ITSELF, 49, keep_teacher),
    "regression": Method("regression", ALONE, 1, partial(train_steps, steps=1)),
    "reflow": Method("reflow", ALONE, 1, train_reflow),
    "step-4": Method("step-4", ALONE, 4, partial(train_steps, steps=4)),
    # Costs per sample: the student 3, real and fake 1 each, or 2 each where they pass on gradients.
    # An update of the fake network costs 4: its sample 1, the fake network 3. DMD2 takes 5, too.
    "dmd": Method("DMD without GAN", ALONE, 1,
                  partial(match_scores, score_loss=dmd_loss, cost=5 + 5 * 4, updates=5)),
    "sid": Method("SiD without GAN", ALONE, 1,
                  partial(match_scores, score_loss=sid_loss, cost=7 + 4, updates=1)),
    "consistency": Method("consistency", REAL, 1, train_consistency),
    "drift-a": Method("drift-a (Deng et al.)", REAL, 1, partial(train_drift, **DENG)),
    "drift": Method("drift (Drift-RAE)", REAL, 1, train_drift),
    "drift-windows": Method("drift-windows", REAL, 1, partial(train_drift, windows=(1, 2))),
}
# The learning rates that --rates tries. The middle one is the best, and the main table takes it.
RATES = {
    "regression": (3e-4, 1e-3, 3e-3), "reflow": (3e-4, 1e-3, 3e-3), "step-4": (1e-4, 3e-4, 9e-4),
    "dmd": (3e-4, 1e-3, 3e-3), "sid": (1e-4, 3e-4, 9e-4), "consistency": (3e-4, 1e-3, 3e-3),
    "drift-a": (3e-3, 9e-3, 3e-2), "drift": (7e-4, 2e-3, 6e-3), "drift-windows": (7e-4, 2e-3, 6e-3)}
DECIMALS = {"fd": 2, "precision": 3, "recall": 3, "label_accuracy": 3, "seconds": 0}
HEADER = ["method", "what it sees", "evaluations per sample (NFE)", "rate", "distance ↓",
          "precision ↑", "recall ↑", "label accuracy ↑", "seconds, one thread"]


def distil_and_measure(path, out, run):
    """-> the run with its results, which are NaN if the training diverges; path: of the teacher.

    For the picture of samples, two images of each class go into the folder `out`.
    """
    teacher, rae, checkpoint = runs.open_teacher(path)
    cfg = dr.Config(device="cpu", seed=run["seed"], lr=run["rate"])
    torch.manual_seed(cfg.seed)
    latents = checkpoint["latents"].float()
    task = Task(teacher, latents, checkpoint["labels"], run["budget"], cfg)
    method = METHODS[run["method"]]
    began = time.process_time()     # of this process alone, however busy the machine is
    try:
        network = method.train(task)
    except dr.UserError:                                    # the gradient became NaN or infinite
        return run | dict.fromkeys(DECIMALS, np.nan)
    seconds = round(time.process_time() - began, 1)
    sampler = partial(dr.one_step, network)
    if method.nfe > 1:
        sampler = partial(dr.ode_sample, network, steps=method.nfe + 1)
    measure = digits.Metrics(checkpoint)
    images = dr.generate(sampler, rae, measure.labels, cfg)
    dr.save(image_file(out, run), partial(torch.save, {"images": take_two(images)}))
    results = measure(images, measure.labels)
    results = {name: round(value, 5) for name, value in results.items()}
    return run | results | {"seconds": seconds, "evaluations": task.spent}


def take_two(images):
    """Images sorted by class -> two of each class, [20,28,28,3]."""
    return images[::len(images) // 20].clone()              # saving a view would save all images


def image_file(out, run):
    return out / "rivals" / f"{run['method']}, seed {run['seed']}.pt"


# ---- The runs. A run is {method, seed, budget, rate}, and its key is a text that says so.


def plan_runs(args, rates):
    """-> {key: run} of the main table or, if `rates` is true, of the table of rates."""
    planned = {}
    budget = BUDGET // 10 if args.quick else BUDGET
    for method in args.methods:
        for seed, rate in choose_trials(method, args.seeds, rates):
            run = {"method": method, "seed": seed, "budget": budget, "rate": rate}
            key = ", ".join(f"{name} {value}" for name, value in run.items())
            planned[key] = run
    return planned


def choose_trials(method, seeds, rates):
    """-> [(seed, rate), ...]"""
    if rates:
        return [(RATES_SEED, rate) for rate in RATES.get(method, [])]
    if method in RATES:
        _, best, _ = RATES[method]
        return [(seed, best) for seed in range(seeds)]
    return [(0, None)]                                      # the teacher is not trained here


# ---- Tables and pictures. `done` is {key: run with results}.


def by_method(done):
    """-> {method: its runs}"""
    groups = {}
    for run in done.values():
        groups.setdefault(run["method"], []).append(run)
    return groups


def write_cell(values, decimals=2):
    return "diverged" if np.isnan(values).any() else runs.cell(values, decimals)


def write_rate(rate):
    return f"{rate:.0e}".replace("e-0", "e-") if rate else ""


def show_table(done):
    """Print the main table. A method is called diverged if one of its seeds did."""
    lines = []
    for name, same in by_method(done).items():
        title, group, nfe, _ = METHODS[name]
        line = [title, group, str(nfe), write_rate(same[0]["rate"])]
        for column, decimals in DECIMALS.items():
            values = [run[column] for run in same]
            line.append(write_cell(values, decimals))
        lines.append(line)
    runs.print_table(HEADER, lines)


def show_rates(done):
    lines = []
    for name, same in by_method(done).items():
        cells = [f"{write_cell([run['fd']])} at {write_rate(run['rate'])}" for run in same]
        lines.append([METHODS[name].title, *cells])
    print(f"\nDistances at three learning rates, seed {RATES_SEED}:")
    runs.print_table(["method", "a third of the rate", "the rate", "three times the rate"], lines)


def draw_distances(done):
    """A row per method, a dot per run, and a colour for what the methods see."""
    rows = {name: -i for i, name in enumerate(METHODS)}     # from the top to the bottom
    names = {rows[name]: METHODS[name].title for name in rows}
    axes = plot.Axes("Fréchet distance to real digits, lower is better; one dot per run", "",
                     "what the methods see:", (1, 100), (-len(rows), 1), x_log=True,
                     y_ticks=names, legend=COLOURS, size=(820, 440))
    for run in done.values():
        method = METHODS[run["method"]]
        axes.points(run["fd"], rows[run["method"]], COLOURS[method.group])
    return axes.image()


STRIPS = ("regression", "dmd", "drift")     # methods of the picture of samples


def draw_samples(done, out):
    """Digits of seed 0, all from one noise, beside real ones; the number is the distance."""
    images, _ = digits.load_digits()
    strips = {"real digits": take_two(images)}
    for run in done.values():
        if run["method"] in STRIPS and run["seed"] == 0 and run["fd"] > 0:      # not NaN
            title = f"{METHODS[run['method']].title}, {run['fd']:.2f}"
            strips[title] = dr.load(image_file(out, run))["images"]
    return plot.panels(strips, rows=5)


# ---- The command


def parse(argv):
    parser = runs.make_parser(__doc__, quick="with a tenth of the budget and one seed")
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all of them")
    add("--rates", action="store_true", help="with --out: measure three learning rates per method")
    return runs.parse_seeds(parser, argv)


def main(argv=None):
    args = parse(argv)
    if args.out:
        dr.make_folder(args.out / "rivals")
        runs.open_teacher(args.teacher)     # refuse a wrong file before the workers start
    work = partial(distil_and_measure, args.teacher, args.out)
    if args.out is None or not args.rates:
        done = runs.get_runs("rivals", args, plan_runs(args, rates=False), work)
        show_table(done)
        if args.out:
            runs.save_png(args.out / "rivals.png", draw_distances(done))
            runs.save_png(args.out / "rivals_samples.png", draw_samples(done, args.out))
    if args.out is None or args.rates:
        show_rates(runs.get_runs("rivals", args, plan_runs(args, rates=True), work))


if __name__ == "__main__":
    dr.run_as_script(main)
