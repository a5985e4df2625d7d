"""The method against naive float64 loops, closed forms, and official numbers (tests/golden/).

L tokens per sample, N generated samples, P positives, E extra negatives, D channels of a token.
"""
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import TensorDataset

import drift_rae as dr
from toy.digits import train_flow
from toy.runs import gradient_field

TEMPERATURES = (0.05, 0.1, 0.2)
EACH_FIELD = pytest.mark.parametrize("field", [*dr.FIELDS.values(), gradient_field])
IMAGENET = dr.Config(**dr.PRESETS["imagenet256"], device="cpu")


def golden(name):
    path = Path(__file__).parent / "golden" / f"{name}.pt"
    return torch.load(path, weights_only=True)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shapes):
    generator = seeded(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def problem(seed, L, N, P, E, D):
    """-> samples [L,N,D], positives [L,P,D], extra negatives [L,E,D], noise [L,N,D]."""
    return normal(seed, (L, N, D), (L, P, D), (L, E, D), (L, N, D))


def error(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def relative(a, b):
    return error(a, b) / b.abs().max().item()


def flat(model):
    return parameters_to_vector(model.parameters()).detach()


def tiny(classes=2, hidden=(16, 24), depth=(1, 1), heads=(2, 2), std=0.2, **dropout):
    """A DiT^DH on latents [3,2,2], in eval mode, always with the same random weights.

    A fresh DiT^DH outputs zero, so its weights are drawn anew; with std=None it stays fresh.
    """
    torch.manual_seed(0)
    model = dr.DiTDH(2, 3, hidden, depth, heads, classes, **dropout)
    if std is not None:
        for p in model.parameters():
            nn.init.normal_(p, std=std)
    return model.eval()


# ---- The method in naive loops


def naive_shift(query, targets, tau):
    """A sum of Eq. (11), term by term: query [D], targets [n,D]; tau in latent units."""
    kernel = [torch.exp(-(y - query).norm() / tau) for y in targets]
    total = sum(kernel)
    return sum(k / total * (y - query) for k, y in zip(kernel, targets))


def naive_field(query, pos, neg, tau):
    """Eq. (11) of queries [L,N,D], which may be perturbed."""
    V = torch.zeros_like(query)
    for i in range(len(query)):
        for j, x in enumerate(query[i]):
            others = torch.cat([neg[i, :j], neg[i, j + 1:]])         # k ≠ j
            V[i, j] = naive_shift(x, pos[i], tau) - naive_shift(x, others, tau)
    return V


def naive_loss(gen, pos, extra, temperatures, noise):
    """Eq. (10) in the units of Deng et al.'s code -> loss [L], S, the raw sizes of V, the drift Ṽ.

    That code counts a distance below 1e-4 as 1e-4, and that of a sample to itself is part of S.
    """
    neg = torch.cat([gen, extra], 1)
    distances = []
    for i in range(len(gen)):
        targets = torch.cat([neg[i], pos[i]])
        distances += [(x - y).norm() for x in gen[i] for y in targets]
    S = torch.stack(distances).clamp(min=1e-4).mean()
    drift = torch.zeros_like(gen)
    raw = []
    for temperature in temperatures:
        V = naive_field(gen + temperature * S * noise, pos, neg, temperature * S)
        mean_square = V.square().sum(-1).mean()
        raw.append(mean_square.sqrt().item() / S.item())
        drift += V / V.square().mean().sqrt()
    loss = drift.square().mean((1, 2))
    return loss, S.item(), raw, drift


def naive_tokens(x, window):
    """What tokens() does, cut by hand."""
    found = []
    for i in range(0, x.shape[2], window):
        for j in range(0, x.shape[3], window):
            square = x[:, :, i:i + window, j:j + window]
            found.append(square.flatten(1))
    return torch.stack(found)


def naive_stream(seed, step, label, purpose):
    """The random numbers of a class at a step. All published results depend on this seeding."""
    return np.random.default_rng([seed, step, label + 1, purpose])


def naive_samples(model, label, step, cfg):
    """Eq. (8) for the noise of the step, and the generator that then draws the perturbation."""
    seed = naive_stream(cfg.seed, step, label, 0).integers(2**63)
    generator = seeded(int(seed))
    n = cfg.n_neg + cfg.n_extra_neg
    z = torch.randn(n, 3, 2, 2, generator=generator).to(flat(model).dtype)
    samples = z - model(z, torch.ones(n), torch.full((n,), label))
    return samples, generator


def naive_class(model, label, pos, step, cfg):
    """The loss of a class, with gradient, and what is logged of it. The model is in float64."""
    samples, generator = naive_samples(model, label, step, cfg)
    total = 0
    for window in cfg.windows:
        gen = naive_tokens(samples[:cfg.n_neg], window)
        extra = naive_tokens(samples[cfg.n_neg:], window).detach()
        real = naive_tokens(pos.double(), window)
        x = gen.detach()
        noise = dr.laplace_noise(x.float(), generator).double()
        _, S, raw, drift = naive_loss(x, real, extra, cfg.temperatures, noise)
        unit = S / x.shape[-1] ** 0.5
        target = x / unit + drift
        total = total + (gen / unit - target).square().mean()
    return total, [S, *raw, total.item()]


# ---- Eq. (11), Prop. 1

SIZES = pytest.mark.parametrize("sizes", [                   # L, N, P, E, D
    (1, 2, 3, 0, 1), (2, 5, 4, 3, 7), (3, 4, 9, 6, 16), (1, 28, 27, 3, 5)])


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_distances_are_euclidean_and_finite_between_equal_points(dtype, tolerance):
    x, y, *_ = problem(0, 3, 6, 40, 1, 16)
    expected = torch.cdist(x, y)
    x, y = x.to(dtype), y.to(dtype)
    found = dr.distances(x, y)
    assert found.dtype == dtype
    assert error(found, expected) < tolerance
    to_itself = dr.distances(100 * x, 100 * x)
    assert to_itself.isfinite().all()
    assert to_itself.diagonal(dim1=1, dim2=2).max() < 1e-2 * to_itself.mean()


@SIZES
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("noisy", [False, True])
def test_field_is_eq_11(sizes, dtype, tolerance, noisy):
    x, pos, extra, noise = problem(0, *sizes)
    neg = torch.cat([x, extra], 1)
    noise = 0.3 * noise if noisy else torch.zeros_like(x)
    expected = naive_field(x + noise, pos, neg, 0.34)
    x, pos, neg, noise = [tensor.to(dtype) for tensor in (x, pos, neg, noise)]
    V = dr.drift_field(x, pos, neg, 0.34, noise if noisy else None)
    assert V.dtype == dtype
    assert error(V, expected) < tolerance


def log_density(x, targets, tau):
    """Of the kernel exp(−distance/τ) around targets [n,D], up to a constant."""
    distance = (targets - x).norm(dim=1)
    return torch.logsumexp(-distance / tau, 0)


def log_ratio_gradient(query, pos, neg, tau):
    """Prop. 1: ∇ log q̂/p̂ at each query [N,D], by autograd; k ≠ j."""
    query = query.clone().requires_grad_()
    log_ratio = 0
    for j, x in enumerate(query):
        others = torch.cat([neg[:j], neg[j + 1:]])
        log_ratio += log_density(x, pos, tau) - log_density(x, others, tau)
    return torch.autograd.grad(log_ratio, query)[0]


def field_weights(x, pos, neg, noise, tau):
    """-> −w⁻ and w⁺ in one tensor [N,M+P], read off drift_field.

    Each target gets a coordinate of its own, where this target has 1e-6 and all others have 0, so
    V shows there how much the target weighs. The noise puts the queries at 0 in all of these.
    """
    n_neg = len(neg)
    n_targets = n_neg + len(pos)
    tick = 1e-6 * torch.eye(n_targets, dtype=x.dtype)
    targets = torch.cat([neg, pos])
    targets = torch.cat([targets, tick], 1).unsqueeze(0)
    noise = torch.cat([noise, -tick[:len(x)]], 1).unsqueeze(0)
    wide_x = targets[:, :len(x)]
    V = dr.drift_field(wide_x, targets[:, n_neg:], targets[:, :n_neg], tau, noise)
    return V[0, :, -n_targets:] / 1e-6


def test_weights_are_the_gradient_of_the_log_density_ratio():
    """Prop. 1 for l = 1: ∇ log q̂/p̂ = Σ w·(target − query)/‖target − query‖ / τ."""
    x, pos, extra, noise = [tensor[0] for tensor in problem(3, 1, 5, 8, 4, 6)]
    neg = torch.cat([x, extra])
    query = x + 0.3 * noise
    w = field_weights(x, pos, neg, 0.3 * noise, 0.7)         # [5,17]
    away = torch.cat([neg, pos]) - query.unsqueeze(1)        # [5,17,6]
    direction = away / away.norm(dim=-1, keepdim=True)
    expected = (w.unsqueeze(-1) * direction).sum(1) / 0.7
    assert error(log_ratio_gradient(query, pos, neg, 0.7), expected) < 1e-8
    one = torch.ones(5, dtype=torch.float64)
    assert error(w[:, :9].sum(1), -one) < 1e-8
    assert error(w[:, 9:].sum(1), one) < 1e-8


def test_gradient_field_is_tau_times_the_gradient_of_the_log_density_ratio():
    x, pos, extra, noise = problem(0, 1, 5, 7, 3, 6)
    neg = torch.cat([x, extra], 1)
    V = gradient_field(x, pos, neg, 0.85, noise)
    gradient = log_ratio_gradient(x[0] + noise[0], pos[0], neg[0], 0.85)
    assert error(V[0], 0.85 * gradient) < 1e-9
    # The gradient is not defined where a query lies on a target. There the field is zero.
    x = torch.zeros(1, 3, 4)
    assert torch.equal(gradient_field(x, x, x, 0.05), x)


@pytest.mark.parametrize("shift,low,high", [(0.0, 0, 4), (0.3, 10, 1000)])
def test_field_vanishes_in_the_mean_only_when_the_distributions_agree(shift, low, high):
    x, pos = normal(0, (1000, 16, 2), (1000, 15, 2))
    V = dr.drift_field(x, pos + shift, x, 0.4).mean(1)
    standard_error = V.std(0).max() / 1000**0.5
    assert low <= V.mean(0).abs().max() / standard_error < high


@EACH_FIELD
def test_field_is_equivariant_and_no_noise_is_noise_of_zero(field):
    x, pos, extra, noise = problem(0, 3, 6, 7, 4, 5)

    def moved(x, pos, extra, noise):
        neg = torch.cat([x, extra], 1)
        return field(x, pos, neg, 0.3, noise)

    V = moved(x, pos, extra, noise)
    assert error(moved(x + 2, pos + 2, extra + 2, noise), V) < 1e-9
    rotation, _ = torch.linalg.qr(normal(1, (5, 5))[0])
    turned = [tensor @ rotation for tensor in (x, pos, extra, noise)]
    assert error(moved(*turned), V @ rotation) < 1e-9
    order = [3, 0, 5, 1, 4, 2]
    permuted = moved(x[:, order], pos, extra, noise[:, order])
    assert error(permuted, V[:, order]) < 1e-9
    assert error(moved(x, pos.flip(1), extra.flip(1), noise), V) < 1e-9
    still = moved(x, pos, extra, None)
    assert torch.equal(moved(x, pos, extra, 0 * noise), still)
    assert not torch.equal(V, still)


# ---- Eq. (10), (12)


@SIZES
@pytest.mark.parametrize("perturb", [False, True])
def test_loss_is_eq_10(sizes, perturb):
    L, N, P, E, D = sizes
    gen, pos, extra, _ = problem(7 * N, *sizes)
    noise = perturb * dr.laplace_noise(gen, seeded(5))
    expected, S, raw, drift = naive_loss(gen, pos, extra, TEMPERATURES, noise)
    gen.requires_grad_()
    loss, info = dr.drift_loss(gen, pos, extra if E else None, TEMPERATURES, perturb=perturb,
                               generator=seeded(5))
    loss.sum().backward()
    assert relative(loss, expected) < 1e-6
    assert info.pop("scale").item() == pytest.approx(S, rel=1e-9)
    assert list(info) == ["V_0.05", "V_0.1", "V_0.2"]
    assert [rms.item() for rms in info.values()] == pytest.approx(raw, rel=1e-6)
    # A descent step moves G along Ṽ.
    assert relative(gen.grad, -2 * drift * D**0.5 / S / (N * D)) < 1e-6


@pytest.mark.parametrize("case", ["plain", "with_neg", "close"])
def test_loss_is_the_released_baseline(case):
    g = golden("drift_loss")
    official = g | g.get(case, {})
    gen = official["gen"].requires_grad_()
    loss, info = dr.drift_loss(gen, g["pos"], official.get("neg"), g["R_list"], perturb=False,
                               field=dr.y_softmax_field)
    loss.sum().backward()
    assert relative(loss, official["loss"]) < 1e-4
    assert relative(gen.grad, official["grad"]) < 1e-4
    assert info["scale"].item() == pytest.approx(official["info"]["scale"], rel=1e-4)
    for temperature in g["R_list"]:                          # they log the mean square
        expected = official["info"][f"loss_{temperature}"]
        assert info[f"V_{temperature:g}"].item() ** 2 == pytest.approx(expected, rel=1e-4)


@EACH_FIELD
def test_negatives_and_positives_get_no_gradient_but_count(field):
    gen, pos, extra, _ = problem(1, 2, 4, 5, 6, 3)
    for tensor in (gen, pos, extra):
        tensor.requires_grad_()

    def loss(pos, extra):
        return dr.drift_loss(gen, pos, extra, field=field, generator=seeded(0))[0]

    first = loss(pos, extra)
    first.sum().backward()
    assert gen.grad.abs().sum() > 0
    assert pos.grad is None
    assert extra.grad is None
    assert not torch.equal(loss(pos + 1, extra), first)
    assert not torch.equal(loss(pos, extra + 1), first)


def test_perturbation_is_laplace_in_norm_and_uniform_in_direction():
    n = dr.laplace_noise(torch.zeros(2, 4000, 3), seeded(0)).flatten(0, 1)
    norm = n.norm(dim=1, keepdim=True)
    # |Laplace(0, 1)| is Exp(1).
    assert stats.kstest(norm.flatten().numpy(), "expon").pvalue > 1e-3
    for axis in (n / norm).T.numpy():                        # uniform, for points of a sphere
        assert stats.kstest(axis, "uniform", (-1, 2)).pvalue > 1e-3


@EACH_FIELD
def test_loss_stays_in_float32_under_autocast(field):
    *latents, _ = problem(2, 2, 30, 30, 5, 16)
    latents = [tensor.float() for tensor in latents]

    def loss_and_gradient(gen, pos, extra):
        gen = gen.clone().requires_grad_()
        loss, info = dr.drift_loss(gen, pos, extra, field=field, generator=seeded(0))
        loss.sum().backward()
        return loss.detach(), gen.grad, *info.values()

    plain = loss_and_gradient(*latents)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_and_gradient(*latents)
    assert len(plain) == len(mixed) == 6
    for a, b in zip(plain, mixed):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_tokens_are_windows(window):
    x = torch.arange(2 * 3 * 36.0).view(2, 3, 6, 6)
    assert torch.equal(dr.tokens(x, window), naive_tokens(x, window))
    assert dr.tokens(x).shape == (36, 2, 3)
    assert torch.equal(dr.tokens(x)[7], x[:, :, 1, 1])
    with pytest.raises(dr.UserError, match="4 does not divide"):
        dr.tokens(x, 4)


# ---- A training step, §4

STEP = 2
CFG = dr.Config(device="cpu", seed=4, steps=10, n_class=2, n_pos=4, n_neg=3, n_extra_neg=2,
                windows=(1, 2), temperatures=(0.05, 0.2), ema=0.9, ema_warmup=4, lr=0.1,
                lr_final=0.4)
ONE_WINDOW = replace(CFG, windows=(1,))
REAL = normal(1, (2, 4, 3, 2, 2))[0].float()
BATCH = [(1, REAL[0]), (0, REAL[1])]


class NotingOptimizer(torch.optim.SGD):
    """Notes the gradient; its step adds 1 to each weight."""

    @torch.no_grad()
    def step(self):
        params = self.param_groups[0]["params"]
        self.gradient = parameters_to_vector(p.grad for p in params)
        for p in params:
            p.add_(1)


def take_step(cfg=CFG, loss_function=dr.variant_loss, step=STEP, batch=BATCH, student=None):
    """One train_step with NotingOptimizer -> everything that took part, and what is logged."""
    student = student or tiny()
    ema = deepcopy(student).requires_grad_(False)
    optimizer = NotingOptimizer(student.parameters())
    log = dr.train_step(student, ema, optimizer, iter(batch), step, cfg, loss_function)
    return SimpleNamespace(student=student, ema=ema, optimizer=optimizer, log=log)


@pytest.mark.parametrize("clip", [1.0, 0.3, 1e6])
@pytest.mark.parametrize("windows,loss_function", [
    ((1,), dr.latent_loss), ((1, 2), dr.variant_loss)])
@pytest.mark.parametrize("n_extra_neg", [0, 2])
def test_a_step_takes_the_clipped_gradient_of_naive_loops(
        clip, windows, loss_function, n_extra_neg):
    """A whole step of two classes, against float64."""
    cfg = replace(CFG, clip=clip, windows=windows, n_extra_neg=n_extra_neg)
    exact = tiny().double()
    rows = []
    for label, pos in BATCH:
        loss, row = naive_class(exact, label, pos, STEP, cfg)
        (loss / 2).backward()                                # the mean over two classes
        rows.append(row)
    expected = parameters_to_vector(p.grad for p in exact.parameters())
    done = take_step(cfg, loss_function)
    norm = done.log.pop("grad_norm").item()
    assert norm > 1.1
    assert norm == pytest.approx(expected.norm().item(), rel=1e-4)
    assert relative(done.optimizer.gradient, min(1, clip / norm) * expected) < 1e-4
    assert all(p.grad is None for p in done.student.parameters())
    # The log holds means over the classes. Of several windows it shows the last one.
    assert list(done.log) == ["scale", "V_0.05", "V_0.2", "loss"]
    means = [value.item() for value in done.log.values()]
    assert means == pytest.approx(np.mean(rows, 0).tolist(), rel=1e-4)


def test_the_average_follows_the_weights_after_they_moved_and_the_learning_rate_falls():
    done = take_step()
    before = flat(tiny())
    decay = 0.5 * (0.9 / 0.5) ** (STEP / 4)
    expected = decay * before + (1 - decay) * (before + 1)
    assert error(flat(done.ema), expected) < 1e-6
    lr = done.optimizer.param_groups[0]["lr"]                # at step 2 of 10
    assert lr == pytest.approx(0.1 - 0.2 * (0.1 - 0.04))


def test_extra_negatives_are_generated_without_gradient():
    """Modification 3."""
    calls = []

    def note(model, inputs):
        calls.append((len(inputs[0]), torch.is_grad_enabled()))

    for n_extra_neg in (2, 0):
        student = tiny()
        student.register_forward_pre_hook(note)
        take_step(replace(CFG, n_extra_neg=n_extra_neg), student=student)
    assert calls == 2 * [(3, True), (2, False)] + 2 * [(3, True)]    # two classes per step


def test_a_gradient_of_nan_stops_the_run_before_a_weight_moves():
    student, ema, optimizer = dr.prepare(tiny(), CFG)
    bad = torch.full((4, 3, 2, 2), torch.nan)
    with pytest.raises(dr.UserError, match="NaN or infinite at step 2"):
        dr.train_step(student, ema, optimizer, iter([(0, bad), (1, bad)]), STEP, CFG)
    assert torch.equal(flat(student), flat(tiny()))
    assert torch.equal(flat(ema), flat(tiny()))


def test_ranks_share_the_classes_and_sum_their_gradients(monkeypatch):
    """The sum that all_reduce would make of the ranks is the gradient of a single process."""
    cfg = replace(CFG, clip=1e6, n_class=3)                  # two classes for rank 0, one for 1
    batch = [*BATCH, BATCH[0]]
    alone = take_step(cfg, batch=batch)
    monkeypatch.setattr(dr, "WORLD", 2)
    summed = []
    monkeypatch.setattr(dr.distributed, "all_reduce", summed.append)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(dr, "RANK", rank)
        shares.append(take_step(cfg, batch=batch[rank::2]))
    gradients = [done.optimizer.gradient for done in shares]
    assert relative(sum(gradients), alone.optimizer.gradient) < 1e-5
    for name in ("scale", "V_0.05", "V_0.2", "loss"):
        total = sum(done.log[name] for done in shares)
        assert total.item() == pytest.approx(alone.log[name].item(), rel=1e-5)
    # The gradient of every weight and the four logged numbers are summed, once per rank.
    assert len(summed) == 2 * (len(list(tiny().parameters())) + 4)


@pytest.mark.parametrize("name", ["softmax", "y-softmax"])
@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("n_extra_neg", [0, 2])
def test_the_configuration_chooses_the_loss_of_a_class(name, perturb, n_extra_neg):
    label, pos = BATCH[0]
    cfg = replace(ONE_WINDOW, field=name, perturb=perturb, n_extra_neg=n_extra_neg)
    samples, generator = naive_samples(tiny(), label, STEP, cfg)
    gen, real, extra = [dr.tokens(x) for x in (samples[:3], pos, samples[3:])]
    expected, _ = dr.drift_loss(gen, real, extra if n_extra_neg else None, CFG.temperatures,
                                field=dr.FIELDS[name], perturb=perturb, generator=generator)
    loss, _ = dr.class_loss(tiny(), label, pos, STEP, cfg, dr.variant_loss)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_variant_loss_without_a_variant_is_latent_loss_bit_for_bit():
    a, b = [take_step(ONE_WINDOW, function) for function in (dr.latent_loss, dr.variant_loss)]
    assert torch.equal(a.optimizer.gradient, b.optimizer.gradient)
    assert a.log == b.log


def test_the_null_class_stays_what_the_teacher_had():
    """Training never asks for the null class, so guide() may extrapolate from its embedding.

    Its gradient is exactly zero: after any other gradient, AdamW would move it by the whole rate.
    """
    student, ema, optimizer = dr.prepare(tiny(), CFG)
    dr.train_step(student, ema, optimizer, iter(BATCH), STEP, ONE_WINDOW)
    before = tiny().y_embedder.embedding_table.weight
    for model in (student, ema):
        after = model.y_embedder.embedding_table.weight
        assert torch.equal(after[2], before[2])
        assert (after[:2] != before[:2]).all()


@pytest.mark.parametrize("step,lr,decay", [
    (0, 3e-5, 0.5), (500, 2.8515e-5, math.sqrt(0.5 * 0.9995)),
    (1000, 2.703e-5, 0.9995), (9999, 3.0297e-7, 0.9995)])
def test_schedules_are_table_8(step, lr, decay):
    student = tiny(std=0)
    cfg = replace(IMAGENET, dtype="fp32", n_class=1, n_neg=4, n_extra_neg=0)
    batch = [(0, torch.ones(4, 3, 2, 2))]
    done = take_step(cfg, dr.latent_loss, step, batch, student)
    assert done.optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-6)
    # The weights went from 0 to 1.
    assert flat(done.ema).numpy() == pytest.approx(1 - decay, rel=1e-5)


def test_imagenet_preset_trains_the_papers_16_epochs():
    trained = IMAGENET.steps * IMAGENET.n_class * IMAGENET.n_neg
    assert trained / 1_281_167 == pytest.approx(16, abs=0.02)
    assert IMAGENET.n_pos == IMAGENET.n_neg + IMAGENET.n_extra_neg


# ---- Distillation


def test_student_and_average_start_as_the_teacher_and_only_the_student_trains():
    teacher = tiny(class_dropout_prob=1.0).requires_grad_(False)
    cfg = replace(CFG, betas=(0.7, 0.8), weight_decay=0.3, lr=0.02)
    student, ema, optimizer = dr.prepare(teacher.train(), cfg)
    for model, trains in ((student, True), (ema, False)):
        assert torch.equal(flat(model), flat(teacher))
        assert all(p.requires_grad == trains for p in model.parameters())
        assert not any(part.training for part in model.modules())
    storages = {p.data_ptr() for model in (teacher, student, ema) for p in model.parameters()}
    assert len(storages) == 3 * len(list(teacher.parameters()))      # nothing is shared
    group, = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.7, 0.8), 0.3, 0.02)
    assert {id(p) for p in group["params"]} == {id(p) for p in student.parameters()}


LATENTS = normal(0, (12, 3, 2, 2))[0].half()                 # as toy/digits.py saves them
LABELS = torch.arange(12) % 3


def load_positives(latents, labels, cfg, first_step=0):
    """-> the sampler, and what load_positives yields of latents in memory."""
    sampler = dr.ClassSampler(labels, cfg, first_step)
    return sampler, dr.load_positives(TensorDataset(latents, labels), sampler, None, cfg)


def drawn(cfg, first_step=0):
    """All positives from a step on, as (step, class, numbers)."""
    rows = []
    sampler, positives = load_positives(LATENTS, LABELS, cfg, first_step)
    for (step, expected), (label, pos) in zip(sampler.schedule(), positives, strict=True):
        assert label == expected
        assert pos.dtype == torch.float32
        rows.append((step, label, pos.tolist()))
    return rows


@pytest.mark.parametrize("n_pos", [4, 9])
def test_positives_are_of_the_class_and_repeat_only_where_there_are_too_few(n_pos):
    for step, label, pos in drawn(replace(CFG, n_pos=n_pos, n_class=3)):
        members = [label, label + 3, label + 6, label + 9]
        rng = naive_stream(4, step, label, 1)
        chosen = rng.choice(members, n_pos, replace=n_pos > 4)
        assert pos == LATENTS[chosen].tolist()


def test_draws_depend_on_seed_step_and_class_alone(monkeypatch):
    unbroken = drawn(CFG)
    classes = [label for _, label, _ in unbroken]
    for step in range(10):
        rng = naive_stream(4, step, -1, 1)
        assert classes[2 * step:2 * step + 2] == rng.choice(3, 2, replace=False).tolist()
    assert drawn(CFG, 7) == unbroken[14:]                    # as in a resumed run
    assert drawn(replace(CFG, seed=5)) != unbroken
    three_classes = replace(CFG, n_class=3)                  # which two ranks cannot halve
    alone = drawn(three_classes)
    monkeypatch.setattr(dr, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(dr, "RANK", rank)
        assert drawn(CFG) == unbroken[rank::2]
        share = [alone[i] for i in range(30) if i % 3 % 2 == rank]
        assert drawn(three_classes) == share
    for number, purpose in enumerate(["noise", "data", "samples", "mirror"]):
        seed = dr.torch_stream(CFG, purpose, 5, 2).initial_seed()
        assert seed == naive_stream(4, 5, 2, number).integers(2**63)


class TwoPoints:
    """Class 0 lies around a point, class 1 around the opposite point; z is noise to start from."""

    def __init__(self):
        shape = (128, 3, 2, 2)
        centre, noise, z = normal(0, shape[1:], shape, shape)
        self.labels = torch.arange(2).repeat_interleave(64)
        sign = (1 - 2 * self.labels).view(-1, 1, 1, 1)
        self.centres = (sign * centre).float()
        self.latents = self.centres + 0.1 * noise.float()
        self.z = z.float()

    def distance(self, samples):
        """Mean distance of samples from the points of their labels, in norms of a point."""
        away = (samples - self.centres).flatten(1).norm(dim=1)
        return (away.mean() / self.centres[0].norm()).item()

    def train(self, model, steps, **how):
        return train_flow(model, self.latents, self.labels, steps, **how)


@pytest.fixture(scope="module")
def two_points():
    return TwoPoints()


@pytest.fixture(scope="module")
def teacher_of_two_points(two_points):
    model = tiny(hidden=(32, 32), std=None).train()
    return two_points.train(model, 200, batch=32, lr=2e-2, decay=0.9)


@torch.no_grad()
def test_teacher_learns_two_points(two_points, teacher_of_two_points):
    teacher = teacher_of_two_points
    assert not teacher.training
    samples = dr.ode_sample(teacher, two_points.z, two_points.labels, 20)
    assert two_points.distance(samples) < 0.5
    torch.manual_seed(1)
    loss = dr.flow_matching_loss(teacher, two_points.latents, two_points.labels)
    assert loss < 0.5                                        # 2.2 before training


def test_student_is_nearer_in_one_step_than_its_teacher(two_points, teacher_of_two_points):
    cfg = dr.Config(device="cpu", n_class=2, n_pos=16, n_neg=16, n_extra_neg=16, steps=25, lr=5e-3,
                    ema=0.8, ema_warmup=10)
    results = []
    for breaks in ([25], [10, 25]):                          # a run that is resumed at 10
        student, ema, optimizer = dr.prepare(teacher_of_two_points, cfg)
        steps = []
        for end in breaks:
            first = len(steps)
            _, positives = load_positives(two_points.latents, two_points.labels, cfg, first)
            for step, log in dr.distil(student, ema, optimizer, positives, cfg, first):
                steps.append(step)
                if step + 1 == end:
                    break
        assert steps == list(range(25))
        results.append(ema)
    assert torch.equal(flat(results[0]), flat(results[1]))
    distances = []
    for model in (results[0], teacher_of_two_points):
        with torch.no_grad():
            samples = dr.one_step(model, two_points.z, two_points.labels)
        distances.append(two_points.distance(samples))
    assert distances[0] < 0.8 * distances[1]


def test_training_of_the_flow_repeats_with_its_seed(two_points):
    first, same, other = [flat(two_points.train(tiny(), 3, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(same, first)
    assert not torch.equal(other, first)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_average_of_the_flow_is_taken_after_the_step(two_points, decay):
    model = tiny()
    average = two_points.train(model, 3, decay=decay)
    assert torch.equal(flat(average), flat(model)) == (decay == 0)


# ---- Flow, Eq. (1)-(4), (8)


def test_flow_matching_loss_of_the_exact_velocity_is_zero():
    """y_t = (1−t)·y + t·ε, so the velocity towards a point mass at y is (y_t − y)/t."""
    latents = torch.randn(64, 3, 2, 2, generator=seeded(0))

    def exact(x, t, y):
        return (x - latents) / t.view(-1, 1, 1, 1)

    torch.manual_seed(1)
    assert dr.flow_matching_loss(exact, latents, None) < 1e-6


def test_flow_matching_loss_of_no_velocity_is_the_second_moment_of_noise_minus_data():
    latents = torch.randn(64, 3, 2, 2, generator=seeded(0))
    torch.manual_seed(1)
    loss = dr.flow_matching_loss(lambda x, t, y: 0 * x, latents, None).item()
    assert loss == pytest.approx(1 + latents.square().mean().item(), rel=0.1)


def test_times_of_flow_matching_are_logit_normal_except_for_the_shift():
    times = []

    def note(x, t, y):
        times.append(t)
        return x

    torch.manual_seed(2)
    dr.flow_matching_loss(note, torch.zeros(20000, 1, 1, 1), None, shift=3.0)
    u = times[0] / (3 - 2 * times[0])                        # the shift undone
    assert u.logit().mean().item() == pytest.approx(0, abs=0.03)
    assert u.logit().std().item() == pytest.approx(1, abs=0.03)


def test_one_step_is_eq_8():
    z = torch.randn(3, 2, 2, 2)

    def velocity(x, t, y):
        assert x is z
        assert torch.equal(t, torch.ones(3))
        assert y == "label"
        return 0.25 * x

    assert torch.equal(dr.one_step(velocity, z, "label"), 0.75 * z)


@torch.no_grad()
def test_sampler_matches_the_official_one():
    g = golden("ode")
    model = dr.DiTDH.from_state_dict(g["state_dict"]).eval()

    def draw(steps, *guidance):
        return dr.ode_sample(model, g["z"], g["y"], steps, g["shift"], *guidance)

    assert error(draw(10), g["samples_10"]) < 1e-4
    assert error(draw(50), g["samples_50"]) < 1e-4
    guided = draw(10, g["cfg_scale"], g["cfg_interval"])
    assert error(guided, g["samples_10_cfg"]) < 1e-4


@torch.no_grad()
def test_guidance_acts_inside_its_interval_only():
    g = golden("ditdh")
    model = dr.DiTDH.from_state_dict(g["state_dict"]).eval()
    times = {"class": [], "null class": []}

    def note(model, inputs):
        _, t, y = inputs
        times["null class" if y[0] == 7 else "class"].append(t[0].item())

    model.register_forward_pre_hook(note)
    dr.ode_sample(model, g["x"][:1], g["y"][:1], 6, cfg_scale=2.0, cfg_interval=(0.3, 0.7))
    inside = [t for t in times["class"] if 0.3 <= t <= 0.7]
    assert 0 < len(inside) < len(times["class"]) == 5
    assert times["null class"] == inside


# ---- DiT^DH


@torch.no_grad()
def test_ditdh_matches_the_official_one():
    g = golden("ditdh")
    model = dr.DiTDH.from_state_dict(g["state_dict"]).eval()
    assert error(model(g["x"], g["t"], g["y"]), g["out"]) < 1e-4


def test_fresh_position_embeddings_are_the_official_ones():
    g = golden("ditdh")
    sizes = ["input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"]
    fresh = dr.DiTDH(*[g["config"][name] for name in sizes]).state_dict()
    for rope in ("enc_feat_rope", "dec_feat_rope"):
        for name in (f"{rope}.freqs_cos", f"{rope}.freqs_sin"):
            assert error(fresh[name], g["state_dict"][name]) < 1e-6
    assert error(fresh["pos_embed"], g["state_dict"]["pos_embed"]) < 1e-6


@torch.no_grad()
def test_fresh_ditdh_outputs_zero_and_its_blocks_are_the_identity():
    """This is adaLN-Zero. No other layer starts at zero."""
    model = tiny(5, depth=(2, 1), std=None).train()
    x = torch.randn(4, 3, 2, 2)
    velocity = model(x, torch.rand(4), torch.arange(4))
    assert torch.equal(velocity, torch.zeros_like(x))
    ropes = [model.enc_feat_rope, model.enc_feat_rope, model.dec_feat_rope]
    for block, rope, width in zip(model.blocks, ropes, (16, 16, 24), strict=True):
        features, condition = torch.randn(2, 4, 4, width)
        assert torch.equal(block(features, condition, rope), features)
    for name, p in model.named_parameters():
        starts_at_zero = "adaLN_modulation" in name or "final_layer.linear" in name
        assert (p.count_nonzero() == 0) == starts_at_zero, name


@torch.no_grad()
@pytest.mark.parametrize("hidden,depth,heads", [
    ((32, 64), (3, 1), (4, 2)), ((64, 32), (1, 4), (2, 4)),
    ((48, 48), (3, 2), (4, 4)), ((24, 40), (2, 2), (2, 5))])
def test_sizes_are_read_off_the_tensors(hidden, depth, heads):
    model = tiny(11, hidden, depth, heads)
    again = dr.DiTDH.from_state_dict(model.state_dict()).eval()
    assert (again.depth, again.num_classes) == (depth, 11)
    assert (again.input_size, again.in_channels) == (2, 3)
    x, t = torch.randn(2, 3, 2, 2), torch.rand(2)
    y = torch.tensor([3, 11])
    assert torch.equal(again(x, t, y), model(x, t, y))


@pytest.mark.parametrize("sizes,millions", [(dr.DITDH_XL, 839), (dr.DITDH_S, 197)])
def test_the_papers_networks_have_its_number_of_parameters(sizes, millions):
    with torch.device("meta"):                               # without memory for the weights
        model = dr.DiTDH(**sizes)
    numbers = sum(x.numel() for x in model.state_dict().values())
    assert round(numbers / 1e6) == millions


@torch.no_grad()
def test_labels_are_dropped_in_training_only():
    model = tiny(4, class_dropout_prob=1.0)
    x, t = torch.randn(2, 3, 2, 2), torch.rand(2)
    y = torch.tensor([0, 1])
    dropped = model.train()(x, t, y)
    kept = model.eval()(x, t, y)
    null_class = model(x, t, torch.tensor([4, 4]))
    assert torch.equal(dropped, null_class)
    assert error(kept, null_class) > 1e-4


def test_share_of_dropped_labels_is_the_probability():
    torch.manual_seed(0)
    embedder = dr.LabelEmbedder(4, 8, 0.3)
    null_class = embedder.embedding_table.weight[4]
    dropped = (embedder(torch.arange(4000) % 4) == null_class).all(-1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.04)     # 5 standard errors


def test_guide_extrapolates_the_classes_of_a_copy():
    model = tiny(4)
    table = model.y_embedder.embedding_table.weight
    before = table.detach().clone()
    after = dr.guide(model, 0.3).y_embedder.embedding_table.weight
    expected = 1.3 * before[:4] - 0.3 * before[4]
    assert error(after[:4], expected) < 1e-6
    assert torch.equal(after[4], before[4])
    assert torch.equal(table, before)
    assert torch.equal(flat(dr.guide(model, 0.0)), flat(model))


# ---- RAE


def official_rae(g, mean=None, **how):
    encoder = dr.ViT(98, 14, 32, 3, 4)
    encoder.load_state_dict(g["encoder_state_dict_native"])
    decoder = dr.Decoder.from_official(g["decoder_state_dict"], num_heads=4)
    if mean is None:
        mean = g["stats"]["mean"]
    var = g["stats"]["var"]
    return dr.RAE(encoder, decoder, mean, var, g["config"]["encoder_input_size"], **how)


@torch.no_grad()
def test_encoder_matches_dinov2():
    g = golden("dinov2_reg_native")
    sizes = ["img_size", "patch_size", "embed_dim", "depth", "num_heads"]
    vit = dr.ViT(*[g["config"][name] for name in sizes])
    vit.load_state_dict(g["state_dict"])
    assert error(vit(g["pixel_values"]), g["tokens"]) < 1e-4     # 98 pixels -> 56: interpolated
    assert error(vit(g["pixel_values_full"]), g["tokens_full"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("grid", [2, 7, 37])
def test_interpolating_positions_to_their_own_grid_is_exactly_the_identity(grid):
    vit = dr.ViT(3 * grid, 3, embed_dim=8, depth=0, num_heads=1)
    images = torch.randn(2, 3, 3 * grid, 3 * grid)
    patches = vit.patch_embed(images).flatten(2).mT
    found = vit.features(images)
    assert torch.equal(found[:, 5:], patches + vit.pos_embed[:, 1:])
    assert torch.equal(found[1, :1], vit.cls_token[0] + vit.pos_embed[0, :1])
    assert torch.equal(found[1, 1:5], vit.register_tokens[0])


@torch.no_grad()
def test_decoder_matches_the_official_one():
    g = golden("decoder")
    decoder = dr.Decoder.from_official(g["state_dict"], num_heads=4)
    assert error(decoder(g["latents"]), g["image"]) < 1e-4
    fresh = dr.Decoder(32, 48, 3, 4, 96, 4, 4)
    assert error(fresh.pos_embed, decoder.pos_embed) < 1e-6


@pytest.mark.parametrize("size", ["", "_noresize"])
def test_encoding_matches_the_official_one(size):
    g = golden("rae")
    expected = g["latent" + size]
    wrong = official_rae(g).encode(g["image" + size]) - expected
    wrong_of_channel = wrong.abs().amax((0, 2, 3))
    assert (wrong_of_channel / expected.abs().amax((0, 2, 3))).max() < 1e-3


def test_decoding_matches_the_official_one():
    g = golden("rae")
    rae = official_rae(g)
    assert error(rae.decode(g["latent"]), g["reconstruction"]) < 1e-4
    assert error(rae.decode(g["latent_random"]), g["decoded_random"]) < 1e-4
    assert not any(p.requires_grad for p in rae.parameters())
    assert not any(part.training for part in rae.modules())


@pytest.mark.parametrize("released", ["mean", "None", "no key"])
def test_released_files_make_the_same_autoencoder_whose_mean_may_be_missing(
        released, tmp_path, monkeypatch):
    """The released statistics hold `mean: None`, which stands for zero."""
    g = golden("rae")
    statistics = dict(g["stats"])
    mean = statistics["mean"]
    if released != "mean":
        mean = torch.zeros_like(mean)
        statistics["mean"] = None
    if released == "no key":
        del statistics["mean"]
    files = {"dinov2_vitb14_reg4_pretrain.pth": g["encoder_state_dict_native"],
             "decoders/dinov2/wReg_base/ViTXL_n08/model.pt": g["decoder_state_dict"],
             "stats/dinov2/wReg_base/imagenet1k/stat.pt": statistics}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, tmp_path / name)
    small = {"img_size": 98, "embed_dim": 32, "depth": 3, "num_heads": 4}
    monkeypatch.setattr(dr, "VIT_B14", dr.VIT_B14 | small)
    monkeypatch.setattr(dr, "DECODER_XL", {"num_heads": 4})
    loaded = dr.load_autoencoder({}, "teacher.pt", tmp_path)
    expected = official_rae(g, mean)
    assert torch.equal(loaded.encode(g["image"]), expected.encode(g["image"]))
    assert torch.equal(loaded.decode(g["latent"]), expected.decode(g["latent"]))


def test_sigmoid_takes_a_pixel_for_a_logit():
    g = golden("rae")
    images = official_rae(g, sigmoid=True).decode(g["latent"])
    logit = 6 * (g["reconstruction"] - 0.5)
    assert error(images, 1 / (1 + torch.exp(-logit))) < 1e-4
