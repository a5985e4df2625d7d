"""What else could one do with this teacher? The families of distillation at equal budgets.

    python toy/rivals.py                every method on OUT/teacher.pt -> OUT/rivals.json and .png
    python toy/rivals.py --space vae    the same in the space of toy/vae.py's VAE-64 -> rivals_vae.*
    python toy/rivals.py --quick        a tenth of the budget: a look, no result
    python toy/rivals.py --rates        what RATES was chosen from -> OUT/rivals_rates.*

All students start from the teacher's weights and spend as many network evaluations as drift_rae.py:
of a sample a forward pass is 1, a backward pass 2 (1 to the input alone), a forward-mode product 2;
those of the teacher, a second network, generated pairs count. Falling learning rate, clipping and
moving average are the default's. Rows that are done are kept. Throughout x_t = (1−t)·x + t·ε,
v(x_t, t) ≈ ε − x, and a step is G(z) = z − v(z, 1).
"""
import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (Attention, Config, command, encode, flow_matching_loss,  # noqa: E402
                       generate, load_pair, ode_sample, one_step, reading, require,
                       update_average, write_atomically, zero)
from toy.digits import make_teacher  # noqa: E402
from toy.plot import panels  # noqa: E402
from toy.runs import Metrics, complete, distil_aside, print_means  # noqa: E402
from toy.vae import make_vae64, ode_path, read_vae64  # noqa: E402

BATCH = 256         # samples a step where nothing else is said
GRID = 50           # points of the teacher's Euler grid, as in drift_rae.py's report
CANDIDATES = (3e-4, 1e-3, 3e-3)
RATES = {           # the best of these at a quarter of the budget, RAE, seed 0
    "regression": 1e-3, "reflow": 1e-3, "dmd": 3e-3, "sid": 3e-4, "twinflow": 3e-4, "ard-4": 1e-3,
    "step-4": 3e-4, "drift-a": 3e-3, "drift": 3e-3, "drift-windows": 3e-3,
    "consistency": 3e-4,    # 1e-3 was better at a quarter; the whole budget diverges with it
    "msd-2": 3e-3, "drift-gradient": 3e-3}      # not tried: drift's
NFE = {"teacher-4": 4, "teacher-50": GRID - 1, "ard-4": 4, "step-4": 4}     # of a sample; else 1
CPU = Config(device="cpu")

def column(t):
    return t.view(-1, 1, 1, 1)

class Task:
    """Flow teacher, latents [n,D,h,w], labels [n], a budget of evaluations: `spent` counts them."""
    def __init__(self, teacher, latents, labels, budget, lr, seed):
        self.teacher = teacher.requires_grad_(False).eval()
        self.latents, self.labels = latents, labels
        self.budget, self.spent = budget, 0
        self.lr, self.seed = lr, seed

    def student(self):
        return copy.deepcopy(self.teacher).requires_grad_(True)

    def draw(self, n):
        """-> real latents [n,D,h,w], their labels [n], noise like the latents."""
        i = torch.randint(len(self.latents), (n,))
        return self.latents[i], self.labels[i], torch.randn_like(self.latents[i])

    def optimizer(self, net):
        return torch.optim.AdamW(net.parameters(), self.lr, (0.9, 0.95), weight_decay=0, fused=True)

    def fit(self, student, loss, cost, share=1.0):
        """Spend a share of the budget on steps of `cost` evaluations -> the moving average."""
        steps = int(share * self.budget) // cost
        self.spent += steps * cost
        ema = copy.deepcopy(student).requires_grad_(False)
        optimizer = self.optimizer(student)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = self.lr * (1 - 0.99 * step / steps)
            descend(student, optimizer, loss())
            warmth = min(1, step / Config.ema_warmup)
            update_average(ema, student, decay=0.5 * (Config.ema / 0.5) ** warmth)
        return ema

    @torch.no_grad()
    def paths(self, model, steps, share):
        """Spend a share of the budget on the model's ODE -> points [n,steps+1,D,h,w] of its paths,
        noise first, their times [steps+1], labels [n]. The end, at t = 0.001, is called 0.
        """
        n = int(share * self.budget) // (GRID - 1)
        self.spent += n * (GRID - 1)
        _, labels, noise = self.draw(n)
        index = torch.linspace(0, GRID - 1, steps + 1).round().long()
        times = 1 - torch.linspace(0, 0.999, GRID)[index]
        times[-1] = 0
        points = []
        for z, y in zip(noise.split(BATCH), labels.split(BATCH)):
            points.append(ode_path(model, z, y)[index].transpose(0, 1))     # [B,steps+1,D,h,w]
        return torch.cat(points), times, labels

def descend(net, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if not norm.isfinite():
        raise FloatingPointError("NaN or infinite gradient")
    optimizer.step()

# ---- Regression on the ends of trajectories (Luhman & Luhman 2101.02388), and on points between.

def path_loss(model, points, times, y):
    """‖v(x_s, t_s) − (x_s − x_s+1)/(t_s − t_s+1)‖²; with one step, from z to x̂: ‖G(z) − x̂‖²."""
    now, after = points[:, :-1], points[:, 1:]                              # [B,S,D,h,w]
    velocity = (now - after) / column(times[:-1] - times[1:])
    return (model(now, times[:-1], y) - velocity).square().mean()

class PathAttention(Attention):
    """Of x [B·S,N,D], S = `points` of a path side by side; a token does not see later points'."""
    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                # [B·S,N,3,heads,d]
        qkv = qkv.unflatten(0, (-1, self.points))                           # [B,S,N,3,heads,d]
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)                             # [B,heads,S,N,d] each
        point = torch.arange(self.points).repeat_interleave(x.shape[1])
        seen = point.unsqueeze(1) >= point                                  # [S·N,S·N]
        q = rope(q).flatten(2, 3)                                           # [B,heads,S·N,d]
        k = rope(k).flatten(2, 3)
        v = v.flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, seen)                 # [B,heads,S·N,d]
        out = out.unflatten(2, (self.points, -1)).permute(0, 2, 3, 1, 4)    # [B,S,N,heads,d]
        return self.proj(out.flatten(0, 1).flatten(2))

class Points(nn.Module):
    """A DiT^DH at S points of each path: x [B,S,D,h,w], times [S], y [B] -> velocities like x.
    history: in the lower layers, DiT^DH's encoder, a point also sees the earlier ones of its path.
    """
    def __init__(self, net, history=False):
        super().__init__()
        self.net = net
        self.lower = net.blocks[:net.depth[0]] if history else []
        for block in self.lower:
            attention = PathAttention(block.attn.qkv.in_features, block.attn.heads)
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention

    def forward(self, x, times, y):
        for block in self.lower:
            block.attn.points = len(times)
        t = times.repeat(len(x))
        v = self.net(x.flatten(0, 1), t, y.repeat_interleave(len(times)))
        return v.unflatten(0, x.shape[:2])

def regress(task, student, paths, share):
    """Fit path_loss with a share of the budget, on paths that are drawn again and again."""
    points, times, y = paths

    def loss():
        i = torch.randint(len(y), (BATCH // (len(times) - 1),))     # BATCH points: cost by tokens
        return path_loss(student, points[i], times, y[i])

    return task.fit(student, loss, 3 * BATCH, share)

def few_steps(task, steps, history=False):
    """One step: regression on (z, x̂); more: step distillation, with history ARD (2504.11295).
    Half of the budget makes the teacher's paths. Without a cache ARD computes 10 points a sample.
    """
    paths = task.paths(task.teacher, steps, 1 / 2)
    ema = regress(task, Points(task.student(), history), paths, 1 / 2)
    times = paths[1]

    def sampler(z, y):
        path = [z]
        for s in range(steps):
            first = 0 if history else s
            v = ema(torch.stack(path[first:], 1), times[first:s + 1], y)[:, -1]
            path.append(path[-1] + (times[s + 1] - times[s]) * v)
        return path[-1]

    return sampler

def reflow(task):
    """Rectified flow (2209.03003), InstaFlow (2309.06380): flow matching on the straight lines of
    the pairs (z, x̂); then regression on fresh pairs of the straightened network.
    """
    pairs, _, y = task.paths(task.teacher, 1, 1 / 4)
    student = task.student()

    def loss():
        i = torch.randint(len(y), (BATCH,))
        z, x = pairs[i].unbind(1)
        t = torch.rand(BATCH)
        v = student((1 - column(t)) * x + column(t) * z, t, y[i])
        return (v - (z - x)).square().mean()

    straight = task.fit(student, loss, 3 * BATCH, 1 / 4)
    student = copy.deepcopy(straight).requires_grad_(True)
    ema = regress(task, Points(student), task.paths(straight, 1, 1 / 4), 1 / 4)
    return partial(one_step, ema.net)

# ---- Consistency, mean velocity (2303.01469; sCM 2503.09641; MeanFlow 2505.13447; MF-RAE)

def consistency_loss(student, teacher, x, y, noise):
    """u(x_t, t) is the mean velocity from t down to 0: u = v − t·du/dt along the teacher's path, a
    forward-mode product along (v, 1). A sample's squared error is divided by itself.
    """
    t = torch.rand(len(x))
    x_t = (1 - column(t)) * x + column(t) * noise
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):     # the others have no forward mode
        v = teacher(x_t, t, y)
        along = v, torch.ones_like(t)
        _, change = torch.func.jvp(lambda x, t: student(x, t, y), (x_t, t), along)
        target = v - column(t) * change
    error = (student(x_t, t, y) - target).square().sum((1, 2, 3))
    return (error / (error.detach() + 1e-3)).mean()

def consistency(task):
    """Of a sample the teacher costs 1, the product 2, the student 3."""
    u = task.student()
    ema = task.fit(u, lambda: consistency_loss(u, task.teacher, *task.draw(BATCH)), 6 * BATCH)
    return partial(one_step, ema)

# ---- Scores: a second network follows the student's own flow.

def denoised(x, y, *networks):
    """Each network's x̂ = x_t − t·v(x_t, t) at one t in [0.02, 0.98] a sample."""
    t = 0.02 + 0.96 * torch.rand(len(x))
    x_t = (1 - column(t)) * x + column(t) * torch.randn_like(x)
    return [x_t - column(t) * v(x_t, t, y) for v in networks]

def dmd_loss(x, y, real, fake):
    """½‖x − sg[x − g]‖², g = (x̂_fake − x̂_real) / mean|x − x̂_real|: DMD (2311.18828) without its
    regression, as DMD2 (2405.14867), but without that one's GAN loss.
    """
    with torch.no_grad():
        x_real, x_fake = denoised(x, y, real, fake)
        size = (x - x_real).abs().mean((1, 2, 3), keepdim=True)
        target = x - (x_fake - x_real) / size
    return 0.5 * (x - target).square().mean()

def sid_loss(x, y, real, fake):
    """⟨x̂_real − x̂_fake, x̂_fake − x⟩ / sg[mean|x − x̂_real|]: SiD (2404.04057) at α = 1, without
    SiDA's GAN loss. The gradient runs through both networks into their inputs.
    """
    x_real, x_fake = denoised(x, y, real, fake)
    size = (x - x_real).detach().abs().mean((1, 2, 3), keepdim=True)
    weight = 1 / size.clamp(min=1e-5)
    return (weight * (x_real - x_fake) * (x_fake - x)).mean()

def scores(task, loss, cost, updates):
    """Before a step of the student, `cost` a sample, the other network takes `updates`, 1 + 3."""
    n = BATCH // 2
    student, fake = task.student(), task.student()
    optimizer = task.optimizer(fake)

    def step():
        fake.requires_grad_(True)
        for _ in range(updates):
            _, y, z = task.draw(n)
            with torch.no_grad():
                x = one_step(student, z, y)
            descend(fake, optimizer, flow_matching_loss(fake, x, y))
        fake.requires_grad_(False)
        _, y, z = task.draw(n)
        return loss(one_step(student, z, y), y, task.teacher, fake)

    return partial(one_step, task.fit(student, step, n * (cost + updates * (1 + 3))))

# ---- Self-adversarial twins: TwinFlow (2512.05150), without its any-step term RCGM.

class TwoTimes(nn.Module):
    """v(x, t, r), the mean velocity from t to a number r or, instantaneous, r = t; at −t that of
    the student's own samples. An embedding of r, zero at first, is added to that of t.
    """
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.embed = copy.deepcopy(net.t_embedder)
        zero(self.embed.mlp[2])

    def forward(self, x, t, y, r=None):
        shift = self.embed(t if r is None else torch.full_like(t, r))
        hook = self.net.t_embedder.register_forward_hook(lambda module, inputs, out: out + shift)
        v = self.net(x, t, y)
        hook.remove()                       # a hook, since DiTDH has no r
        return v

def twinflow_loss(net, x, y, z):
    """The twin at −t learns the flow of sg[G(z)], ‖v(x_t, −t, −t) − (ε − G)‖²; the difference d of
    the twins, in ±1, moves the student, ½‖v(z, 1, 0) − sg[v(z, 1, 0) + d]‖²; and flow matching.
    """
    t, noise = torch.rand(len(z)), torch.randn_like(z)
    v = net(z, torch.ones(len(z)), y, r=0)
    fake = (z - v).detach()
    x_t = (1 - column(t)) * fake + column(t) * noise
    twin = net(x_t, -t, y)
    with torch.no_grad():
        d = (net(x_t, t, y) - twin).clamp(-1, 1)            # v_real − v_fake
        target = v + d
    following = (twin - (noise - fake)).square().mean()
    rectification = 0.5 * (v - target).square().mean()
    return following + rectification + flow_matching_loss(net, x, y)

def twinflow(task):
    net = TwoTimes(task.student())
    ema = task.fit(net, lambda: twinflow_loss(net, *task.draw(BATCH)), (3 + 3 + 1 + 3) * BATCH)
    return partial(one_step, partial(ema, r=0))             # G(z) = z − v(z, 1, 0)

# ---- Drifting (Deng et al. 2602.04770; Drift-RAE 2606.15553; windows, ours), MSD (2410.23274)

def drifting(task, **changes):
    """drift_rae.py's distil, with changes of its defaults."""
    cfg = Config(device="cpu", lr=task.lr, seed=task.seed, **changes)
    cost = cfg.n_class * (3 * cfg.n_neg + cfg.n_extra_neg)
    cfg.steps = cfg.save_every = task.budget // cost
    task.spent += cfg.steps * cost
    student = distil_aside(task.student(), task.latents, task.labels, cfg)
    return partial(one_step, student)

def several_students(task):
    """Two students, half the classes and the budget each. A sample needs one; both are computed."""
    half = task.teacher.num_classes // 2
    samplers = []
    for first in 0, half:
        teacher = copy.deepcopy(task.teacher)
        table = teacher.y_embedder.embedding_table.weight
        table[:2 * half] = table[:2 * half].roll(-first, 0)     # its class c is first + c
        labels = task.labels - first
        its = (labels >= 0) & (labels < half)
        part = Task(teacher, task.latents[its], labels[its], task.budget // 2, task.lr, task.seed)
        samplers.append(drifting(part, n_class=half))
        task.spent += part.spent

    def both(z, y):
        low, high = [sampler(z, y % half) for sampler in samplers]
        return torch.where(column(y < half), low, high)

    return both

# ---- The rows

def by_teacher(task, sampler):
    return partial(sampler, task.teacher)

METHODS = {
    "teacher-1": partial(by_teacher, sampler=one_step),
    "teacher-4": partial(by_teacher, sampler=partial(ode_sample, steps=5)),
    "teacher-50": partial(by_teacher, sampler=partial(ode_sample, steps=GRID)),
    "regression": partial(few_steps, steps=1),
    "reflow": reflow,
    "consistency": consistency,
    "dmd": partial(scores, loss=dmd_loss, cost=3 + 1 + 1, updates=5),     # as DMD2
    "sid": partial(scores, loss=sid_loss, cost=3 + 2 + 2, updates=1),
    "twinflow": twinflow,
    "ard-4": partial(few_steps, steps=4, history=True),
    "step-4": partial(few_steps, steps=4),
    "msd-2": several_students,
    "drift-a": partial(drifting, n_pos=64, n_extra_neg=0, perturb=False, field="y-softmax"),
    "drift": drifting,
    "drift-windows": partial(drifting, windows=(1, 2)),
    "drift-gradient": partial(drifting, field="gradient"),
}
BUDGET = Config.steps * Config.n_class * (3 * Config.n_neg + Config.n_extra_neg)
RESULTS = {"fd": 2, "precision": 3, "recall": 3, "label_accuracy": 3, "seconds": 0}     # digits

def open_space(out, name):
    """-> flow teacher, latents, the autoencoder that decodes them, what OUT/teacher.pt holds."""
    teacher, rae, ours = load_pair(out / "teacher.pt", CPU)
    if name == "rae":
        return teacher, encode(rae, ours["images"], CPU), rae, ours
    teacher, space = read_vae64(out / "vae64.pt", ours["labels"])
    return teacher, space.latents, space.rae, ours

def work(job):
    """job: OUT, the row's key, what is known of it before -> the row. Some digits go to a file."""
    out, key, row = job
    teacher, latents, rae, ours = open_space(out, row["space"])
    torch.manual_seed(row["seed"])
    task = Task(teacher, latents, ours["labels"], row["budget"], row["lr"], row["seed"])
    began = time.perf_counter()
    try:
        sampler = METHODS[row["method"]](task)
    except FloatingPointError:                      # it diverged
        return row | dict.fromkeys(RESULTS, torch.nan)
    row = row | {"evaluations": task.spent, "seconds": time.perf_counter() - began}
    measure = Metrics(ours)
    images = generate(sampler, rae, measure.labels, CPU)
    with write_atomically(out / "rivals" / key) as file:
        torch.save(images.unflatten(0, (10, -1))[:, :2].clone(), file)
    return row | measure(images, measure.labels)

def jobs_of(args):
    jobs = {}
    budget = BUDGET // (10 if args.quick else 1) // (4 if args.rates else 1)
    for seed in range(args.seeds):
        for method in args.methods:
            if seed > 0 and method.startswith("teacher"):
                continue                                    # it is not trained
            for lr in CANDIDATES if args.rates else [RATES.get(method, Config.lr)]:
                key = f"{args.space}-{method}-{seed}-{budget}-{lr}"
                row = dict(method=method, space=args.space, seed=seed, nfe=NFE.get(method, 1),
                           budget=budget, lr=lr)
                jobs[key] = args.out, key, row
    return jobs

def draw_strips(runs, ours, out, name):
    """A strip a method, of seed 0: a place stands for a class and, but in `real`, for its noise."""
    strips = {"real": ours["images"].unflatten(0, (10, -1))[:, :2]}
    for key, row in runs.items():
        if row["seed"] == 0 and row["fd"] > 0:      # not NaN
            with reading(out / "rivals" / key) as digits:
                strips[f"{row['method']}, {row['fd']:.2f}"] = digits
    tiles = {title: x.transpose(0, 1).flatten(0, 1) for title, x in strips.items()}
    with write_atomically(out / f"{name}.png") as file:
        panels(tiles, rows=2).save(file, "PNG")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of all files (default: out)")
    add("--seeds", type=int, default=1, help="of the distillation; the teacher is one (default: 1)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--space", choices=("rae", "vae"), default="rae", help="teacher.pt's, or that of a VAE")
    add("--quick", action="store_true", help="a tenth of the budget")
    add("--rates", action="store_true", help="try three learning rates at a quarter of the budget")
    args = parser.parse_args(argv)
    require(args.seeds > 0, "--seeds must be at least 1")
    args.methods = args.methods or list(RATES if args.rates else METHODS)
    (args.out / "rivals").mkdir(parents=True, exist_ok=True)
    name = "rivals"
    teacher = args.out / "teacher.pt"
    if not teacher.exists():
        make_teacher(teacher)
    _, _, ours = load_pair(teacher, CPU)
    if args.space == "vae":
        name = "rivals_vae"
        teacher = args.out / "vae64.pt"
        if not teacher.exists():
            make_vae64(teacher, ours)
    if args.rates:
        name += "_rates"
    runs = complete(args.out / f"{name}.json", teacher, jobs_of(args), work)
    print_means(runs.values(), ["method", "lr", "nfe"], RESULTS)
    draw_strips(runs, ours, args.out, name)

if __name__ == "__main__":
    command(main)
