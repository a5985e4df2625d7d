"""The method against naive float64 loops, closed forms and the official implementations' numbers."""
import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import drift_rae as dr


def golden(name):
    return torch.load(Path(__file__).parent / "golden" / f"{name}.pt", weights_only=True)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shapes):
    g = rng(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() < tolerance


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters())


def tiny(classes=2, hidden=(16, 24), depth=(1, 1), heads=(2, 2), **more):
    torch.manual_seed(0)
    model = dr.DiTDH(2, 3, hidden, depth, heads, classes, **more)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def naive_field(x, pos, neg, tau, self_mask=True):
    """Eq. (11), term by term, of one token. x [N,D] queries, perturbed or not; tau in latent units."""
    V = torch.zeros_like(x)
    for j in range(len(x)):
        for sign, targets in ((1, pos), (-1, neg)):
            members = [k for k in range(len(targets)) if sign > 0 or k != j or not self_mask]
            w = torch.stack([torch.exp(-(targets[k] - x[j]).norm() / tau) for k in members])
            for weight, k in zip(w / w.sum(), members):
                V[j] += sign * weight * (targets[k] - x[j])
    return V


def naive_loss(gen, pos, extra, temperatures, noise):
    """Eq. (10) in Deng et al.'s units (paper.md §6), noise [C,N,D] -> loss [C], S, raw drifts, Ṽ [C,N,D]."""
    neg = torch.cat([gen, extra], 1)
    S = torch.stack([(gen[c, j] - target).norm() for c in range(len(gen)) for j in range(gen.shape[1])
                     for target in torch.cat([neg[c], pos[c]])]).mean()
    total, raw = torch.zeros_like(gen), []
    for tau in temperatures:
        x = gen + tau * S * noise
        V = torch.stack([naive_field(*tensors, tau * S) for tensors in zip(x, pos, neg)])
        raw.append((V.square().sum(-1).mean().sqrt() / S).item())
        total += V / V.square().mean().sqrt()
    return total.square().mean((1, 2)), S, raw, total


SIZES = [(1, 2, 3, 0, 1), (2, 5, 4, 3, 7), (3, 4, 9, 6, 16), (1, 28, 27, 3, 5)]  # C, N, P, E, D


@pytest.mark.parametrize("C,N,P,E,D", SIZES)
@pytest.mark.parametrize("noisy,self_mask", [(False, True), (True, True), (True, False)])
def test_field_is_eq_11(C, N, P, E, D, noisy, self_mask):
    x, pos, extra, noise = normal(C + N, (C, N, D), (C, P, D), (C, E, D), (C, N, D))
    noise, neg = 0.3 * noise * noisy, torch.cat([x, extra], 1)
    expected = torch.stack([naive_field(*tensors, 0.34, self_mask) for tensors in zip(x + noise, pos, neg)])
    V = dr.drift_field(x, pos, neg, 0.2, 1.7, noise=noise if noisy else None, self_mask=self_mask)
    assert (V - expected).abs().max() < 1e-9
    single = [t.float() for t in (x, pos, neg)]
    V = dr.drift_field(*single, 0.2, 1.7, noise=noise.float(), self_mask=self_mask)
    assert (V - expected).abs().max() < 1e-4


@pytest.mark.parametrize("C,N,P,E,D", SIZES)
@pytest.mark.parametrize("perturb", [False, True])
def test_loss_is_eq_10(C, N, P, E, D, perturb):
    gen, pos, extra = normal(7 * N, (C, N, D), (C, P, D), (C, E, D))
    taus, noise = (0.05, 0.1, 0.2), dr.laplace_noise(gen, rng(5)) * perturb
    expected, S, raw, total = naive_loss(gen, pos, extra, taus, noise)
    gen.requires_grad_()
    loss, info = dr.drift_loss(gen, pos, extra if E else None, taus, perturb=perturb, generator=rng(5))
    loss.sum().backward()
    assert relative(loss, expected) < 1e-6 and abs(info["scale"] / S - 1) < 1e-9
    assert [info[f"drift_{t}"].item() for t in taus] == pytest.approx(raw, rel=1e-6)
    assert relative(gen.grad, -2 * total * D**0.5 / S / (N * D)) < 1e-6     # descent moves G along Ṽ


@pytest.mark.parametrize("case", ["plain", "with_neg", "close"])
def test_loss_is_the_released_baseline(case):
    g = golden("drift_loss")
    ref = g if case == "plain" else g[case]
    gen = (ref if case == "close" else g)["gen"].clone().requires_grad_()
    loss, info = dr.drift_loss(gen, g["pos"], ref.get("neg"), g["R_list"], perturb=False, y_softmax=True)
    loss.sum().backward()
    assert relative(loss, ref["loss"]) < 1e-4 and relative(gen.grad, ref["grad"]) < 1e-4
    assert info["scale"].item() == pytest.approx(ref["info"]["scale"], rel=1e-4)
    for tau in g["R_list"]:     # the released code logs the mean square of the force
        assert info[f"drift_{tau:g}"].item() ** 2 == pytest.approx(ref["info"][f"loss_{tau}"], rel=1e-4)


def test_weights_are_the_gradient_of_the_log_density_ratio():
    """Prop. 1 at l = 1, perturbed queries, k ≠ j: ∇ log q̂/p̂ = Σ w·(target − query)/‖target − query‖ / τ.
    One more coordinate for each target, 1e-6 there and 0 elsewhere, reads its weight off the field.
    """
    (x, pos, extra, noise), tau, tick = normal(3, (5, 6), (8, 6), (4, 6), (5, 6)), 0.7, 1e-6
    targets = torch.cat([x, extra, pos])                                    # 9 negatives, 8 positives
    query = (x + 0.3 * noise).requires_grad_()
    logits = -torch.cdist(query, targets, compute_mode="donot_use_mm_for_euclid_dist") / tau
    logits = logits.masked_fill(torch.eye(5, 17, dtype=torch.bool), -torch.inf)
    log_ratio = logits[:, 9:].logsumexp(1) - logits[:, :9].logsumexp(1)
    (gradient,) = torch.autograd.grad(log_ratio.sum(), query)
    wide = torch.cat([targets, tick * torch.eye(17, dtype=torch.float64)], 1).unsqueeze(0)
    shift = torch.cat([0.3 * noise, -wide[0, :5, 6:]], 1).unsqueeze(0)       # queries have 0 there
    V = dr.drift_field(wide[:, :5], wide[:, 9:], wide[:, :9], tau, 1.0, noise=shift)[0]
    w, away = V[:, 6:] / tick, targets - query.detach().unsqueeze(1)        # [5,17] and [5,17,6]
    expected = (w.unsqueeze(-1) * away / away.norm(dim=-1, keepdim=True)).sum(1) / tau
    assert (gradient - expected).abs().max() < 1e-8
    assert (w[:, :9].sum(1) + 1).abs().max() < 1e-8 and (w[:, 9:].sum(1) - 1).abs().max() < 1e-8


def test_field_vanishes_in_the_mean_when_the_distributions_agree():
    x, pos = normal(0, (1000, 16, 2), (1000, 15, 2))
    for shift, low, high in ((0.0, 0, 4), (0.3, 10, 1000)):
        V = dr.drift_field(x, pos + shift, x, 0.2, 2.0).mean(1)
        assert low <= V.mean(0).abs().max() / V.std(0).max() * 1000**0.5 < high     # in standard errors


def test_field_is_equivariant():
    x, pos, extra, noise, q = normal(0, (3, 6, 5), (3, 7, 5), (3, 4, 5), (3, 6, 5), (5, 5))
    field = lambda x, pos, extra, n: dr.drift_field(x, pos, torch.cat([x, extra], 1), 0.1, 3.0, noise=n)
    V, Q, order = field(x, pos, extra, noise), torch.linalg.qr(q)[0], [3, 0, 5, 1, 4, 2]
    assert close(field(x + 2, pos + 2, extra + 2, noise), V, 1e-9)
    assert close(field(x @ Q, pos @ Q, extra @ Q, noise @ Q), V @ Q, 1e-9)
    assert close(field(x[:, order], pos.flip(1), extra.flip(1), noise[:, order]), V[:, order], 1e-9)


@pytest.mark.parametrize("baseline", [False, True])
def test_negatives_and_positives_get_no_gradient(baseline):
    gen, pos, extra = (t.requires_grad_() for t in normal(1, (2, 4, 3), (2, 5, 3), (2, 6, 3)))
    loss, _ = dr.drift_loss(gen, pos, extra, y_softmax=baseline, generator=rng(0))
    loss.sum().backward()
    assert extra.grad is None and pos.grad is None and gen.grad.abs().sum() > 0
    for p, e in ((pos + 1, extra), (pos, extra + 1)):   # and yet they count
        assert not torch.equal(loss, dr.drift_loss(gen, p, e, y_softmax=baseline, generator=rng(0))[0])


def test_perturbation_is_laplace_in_norm_and_uniform_in_direction():
    n = dr.laplace_noise(torch.zeros(2, 4000, 3), rng(0)).flatten(0, 1)
    assert stats.kstest(n.norm(dim=1).numpy(), "expon").pvalue > 1e-3       # |Laplace(0, 1)| is Exp(1)
    for axis in (n / n.norm(dim=1, keepdim=True)).T.numpy():                # on S² coordinates are uniform
        assert stats.kstest(axis, "uniform", (-1, 2)).pvalue > 1e-3


def test_field_stays_in_float32_under_autocast():
    gen, pos = (t.float() for t in normal(2, (2, 8, 16), (2, 8, 16)))
    low, plain = gen.bfloat16(), dr.drift_loss(gen, pos, perturb=False)[0]
    expected = dr.drift_field(low.float(), pos, low.float(), 0.1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dr.drift_loss(gen, pos, perturb=False)[0], plain)
        assert torch.equal(dr.drift_field(low, pos, low, 0.1, 5), expected)


def windows(x, w):
    """tokens(), cut by hand."""
    return torch.stack([x[:, :, i:i + w, j:j + w].reshape(len(x), -1)
                        for i in range(0, x.shape[2], w) for j in range(0, x.shape[3], w)])


def test_tokens_are_windows():
    x = torch.arange(2 * 3 * 36.0).view(2, 3, 6, 6)
    assert dr.tokens(x).shape == (36, 2, 3) and torch.equal(dr.tokens(x)[7], x[:, :, 1, 1])
    assert all(torch.equal(dr.tokens(x, w), windows(x, w)) for w in (1, 2, 3))
    with pytest.raises(ValueError, match="window of 4 does not divide"):
        dr.tokens(x, 4)


class Optimizer(torch.optim.SGD):
    """Notes the gradients; its step adds 1 to each weight."""
    @torch.no_grad()
    def step(self):
        params = self.param_groups[0]["params"]
        self.gradient = torch.cat([p.grad.flatten() for p in params])
        for p in params:
            p.add_(1)


def test_a_step_is_the_gradient_of_naive_loops():
    """Two classes, two windows: from z, the step's own, to clipped gradient and average, in float64."""
    cfg = dr.Config(device="cpu", seed=4, steps=10, n_class=2, n_pos=4, n_neg=3, n_extra_neg=2,
                    windows=(1, 2), temperatures=(0.05, 0.2), ema=0.9, ema_warmup=4)
    model, step = tiny(), 2
    batch = [(c, pos.float()) for c, pos in zip((1, 0), normal(1, (4, 3, 2, 2), (4, 3, 2, 2)))]
    exact = copy.deepcopy(model).double()
    for c, pos in batch:
        g = rng(int(np.random.default_rng([4, step, c + 1, 0]).integers(2**63)))
        z = torch.randn(5, 3, 2, 2, generator=g).double()
        gen, extra = (z - exact(z, torch.ones(5), torch.tensor([c] * 5))).split([3, 2])
        loss = 0
        for w in (1, 2):
            x = windows(gen, w)
            _, S, _, drift = naive_loss(x.detach(), windows(pos.double(), w), windows(extra.detach(), w),
                                        cfg.temperatures, dr.laplace_noise(x.detach().float(), g).double())
            unit = S / x.shape[-1] ** 0.5
            loss = loss + (x / unit - (x / unit + drift).detach()).square().mean()
        (loss / 2).backward()                                               # of 2 classes
    ema, optimizer = copy.deepcopy(model).requires_grad_(False), Optimizer(model.parameters())
    before, seen = flat(model), []
    model.register_forward_pre_hook(lambda m, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    log, norm = dr.train_step(model, ema, optimizer, batch, step, cfg)
    assert seen == [(3, True), (2, False)] * 2                              # modification 3
    expected = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert abs(norm / expected.norm() - 1) < 1e-4 and norm > 1.1
    assert relative(optimizer.gradient, expected / norm) < 1e-4             # clipped at 1
    decay = 0.5 * (0.9 / 0.5) ** (step / 4)
    assert close(flat(ema), decay * before + (1 - decay) * (before + 1), 1e-6)      # after the step
    assert all(p.grad is None for p in model.parameters())
    assert set(log) == {"scale", "drift_0.05", "drift_0.2", "loss"}         # sums over the classes
    with pytest.raises(ValueError, match="NaN or infinite at step 2"):
        dr.train_step(model, ema, optimizer, [(0, torch.full((4, 3, 2, 2), torch.nan))], step, cfg)
    assert close(flat(model), before + 1, 1e-6)                             # the weights did not move again


IMAGENET = dr.Config(**dr.PRESETS["imagenet256"], device="cpu")


@pytest.mark.parametrize("step,lr,decay", [(0, 3e-5, 0.5), (500, 2.8515e-5, math.sqrt(0.5 * 0.9995)),
                                           (1000, 2.703e-5, 0.9995), (9999, 3.0297e-7, 0.9995)])
def test_schedules_are_table_8(step, lr, decay):
    model = tiny()
    nn.utils.vector_to_parameters(torch.zeros_like(flat(model)), model.parameters())
    ema, optimizer = copy.deepcopy(model).requires_grad_(False), Optimizer(model.parameters())
    cfg = dataclasses.replace(IMAGENET, dtype="fp32", n_class=1, n_neg=4, n_extra_neg=0)
    dr.train_step(model, ema, optimizer, [(0, torch.ones(4, 3, 2, 2))], step, cfg)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-6)
    assert flat(ema).numpy() == pytest.approx(1 - decay, rel=1e-5)          # the weights went from 0 to 1


def test_imagenet_preset_is_table_8():
    c = IMAGENET
    assert (c.n_class, c.n_pos, c.n_neg, c.n_extra_neg, c.steps) == (32, 256, 64, 192, 10_000)
    assert (c.lr, c.ema, c.ema_warmup, c.temperatures) == (3e-5, 0.9995, 1000, (0.02, 0.05, 0.2))
    assert c.windows == (1,) and c.perturb and not c.y_softmax and c.flip and c.dtype == "bf16"


def test_flow_matching_loss_is_eq_4():
    """With y_t = (1−t)·y + t·ε the exact velocity of a point mass at y is (y_t − y)/t: no loss is left."""
    latents = torch.randn(64, 3, 2, 2, generator=rng(0))
    exact = lambda x, t, y: (x - latents) / t.view(-1, 1, 1, 1)
    assert dr.flow_matching_loss(exact, latents, None, generator=rng(1)) < 1e-6
    zero = dr.flow_matching_loss(lambda x, t, y: torch.zeros_like(x), latents, None, generator=rng(1))
    assert zero.item() == pytest.approx(1 + latents.square().mean().item(), rel=0.1)
    times, u = [], torch.linspace(0, 1, 20001)[:-1]
    note = lambda x, t, y: times.append(t) or x
    dr.flow_matching_loss(note, torch.zeros(20000, 1, 1, 1), None, 3.0, rng(2))
    assert abs(times[0].mean() - (3 * u / (1 + 2 * u)).mean()) < 0.01


def test_one_step_is_eq_8():
    z, seen = torch.randn(3, 2, 2, 2), []
    assert torch.equal(dr.one_step(lambda *args: seen.extend(args) or 0.25 * z, z, "y"), 0.75 * z)
    assert seen[0] is z and torch.equal(seen[1], torch.ones(3)) and seen[2] == "y"


def test_teacher_and_student_learn_two_points(tmp_path):
    centre, noise, z = (t.float() for t in normal(0, (3, 2, 2), (128, 3, 2, 2), (128, 3, 2, 2)))
    labels = torch.arange(2).repeat_interleave(64)
    sign = (1 - 2 * labels).view(-1, 1, 1, 1)
    latents = sign * centre + 0.1 * noise
    away = lambda samples: ((samples - sign * centre).flatten(1).norm(dim=1) / centre.norm()).mean()
    train = lambda model, steps, **how: dr.train_flow(model, latents, labels, steps, **how)
    torch.manual_seed(0)
    model = dr.DiTDH(2, 3, (32, 32), (1, 1), (2, 2), 2)
    nn.init.normal_(model.y_embedder["embedding_table"].weight)             # classes that differ at once
    teacher = train(model, 100, batch_size=32, lr=2e-2, decay=0.9)
    assert not teacher.training and away(dr.ode_sample(teacher, z, labels, 20)) < 0.5
    assert dr.flow_matching_loss(teacher, latents, labels, generator=rng(1)) < 0.5      # at first 2.1
    cfg = dr.Config(device="cpu", out=str(tmp_path), steps=25, n_class=2, n_pos=16, n_neg=16, n_extra_neg=16,
                    lr=5e-3, ema=0.8, ema_warmup=10)
    student = dr.distil(copy.deepcopy(teacher).requires_grad_().train(), latents, labels.numpy(), cfg)
    with torch.no_grad():
        assert away(dr.one_step(student, z, labels)) < 0.8 * away(dr.one_step(teacher, z, labels))
    assert not student.training and not any(p.requires_grad for p in student.parameters())
    a, b, c = (flat(train(tiny(), 3, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    for decay in (0.0, 0.9):    # the average, taken after the step
        assert torch.equal(flat(train(model := tiny(), 3, decay=decay)), flat(model)) == (decay == 0)


@torch.no_grad()
def test_ditdh_and_sampler_match_the_official_ones():
    g = golden("ditdh")
    model, c = dr.DiTDH.from_state_dict(g["state_dict"]).eval(), g["config"]
    assert close(model(g["x"], g["t"], g["y"]), g["out"])
    names = ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    fresh = dr.DiTDH(*(c[name] for name in names)).state_dict()
    for key in ("pos_embed", "enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_sin"):
        assert close(fresh[key], g["state_dict"][key], 1e-6)
    seen, ode = [], golden("ode")   # guidance acts inside its interval only
    model.register_forward_pre_hook(lambda m, args: seen.append((args[1][0].item(), args[2][0].item())))
    dr.ode_sample(model, g["x"][:1], g["y"][:1], 6, cfg_scale=2.0, cfg_interval=(0.3, 0.7))
    assert [t for t, y in seen if y == 7] == [t for t, y in seen if y != 7 and 0.3 <= t <= 0.7] != []
    model = dr.DiTDH.from_state_dict(ode["state_dict"]).eval()
    for steps in (10, 50):
        assert close(dr.ode_sample(model, ode["z"], ode["y"], steps, ode["shift"]), ode[f"samples_{steps}"])
    guided = dr.ode_sample(model, ode["z"], ode["y"], 10, ode["shift"], ode["cfg_scale"], ode["cfg_interval"])
    assert close(guided, ode["samples_10_cfg"])


@torch.no_grad()
def test_autoencoder_matches_the_official_one():
    g = golden("dinov2_reg_native")
    vit = dr.ViT(*(g["config"][k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")))
    vit.load_state_dict(g["state_dict"])
    assert close(vit(g["pixel_values"]), g["tokens"])                       # 98 -> 56: interpolated
    assert close(vit(g["pixel_values_full"]), g["tokens_full"])
    g = golden("decoder")
    decoder = dr.Decoder.from_official(g["state_dict"], num_heads=4)
    assert close(decoder(g["latents"]), g["image"])
    assert close(dr.Decoder(32, 48, 3, 4, 96, 4, 4).pos_embed, decoder.pos_embed, 1e-6)
    g = golden("rae")
    encoder = dr.ViT(98, 14, 32, 3, 4)
    encoder.load_state_dict(g["encoder_state_dict_native"])
    decoder = dr.Decoder.from_official(g["decoder_state_dict"], 4)
    args = encoder, decoder, g["stats"]["mean"], g["stats"]["var"], g["config"]["encoder_input_size"]
    rae = dr.RAE(*args)
    for image, latent in (("image", "latent"), ("image_noresize", "latent_noresize")):
        error = (rae.encode(g[image]) - g[latent]).abs().amax((0, 2, 3))
        assert (error / g[latent].abs().amax((0, 2, 3))).max() < 1e-3
    assert close(rae.decode(g["latent"]), g["reconstruction"])
    assert close(rae.decode(g["latent_random"]), g["decoded_random"])
    assert not any(p.requires_grad for p in rae.parameters())
    logistic = 1 / (1 + torch.exp(3 - 6 * g["reconstruction"]))
    assert close(dr.RAE(*args, sigmoid=True).decode(g["latent"]), logistic)


@pytest.mark.parametrize("hidden,depth,heads,ratio", [
    ((32, 64), (3, 1), (4, 2), 4.0), ((64, 32), (1, 4), (2, 4), 8 / 3), ((48, 48), (3, 2), (4, 4), 2.5),
    ((24, 40), (2, 2), (2, 5), 3.3)])
def test_sizes_are_read_off_the_tensors(hidden, depth, heads, ratio):
    model = tiny(11, hidden, depth, heads, mlp_ratio=ratio)
    x, t, y = torch.randn(2, 3, 2, 2), torch.rand(2), torch.tensor([3, 11])
    again = dr.DiTDH.from_state_dict(model.state_dict()).eval()
    assert again.depth == depth and again.num_classes == 11 and torch.equal(model(x, t, y), again(x, t, y))


def test_labels_are_dropped_in_training_only_and_guide_extrapolates_them():
    model, x, t = tiny(4, class_dropout_prob=1.0), torch.randn(2, 3, 2, 2), torch.rand(2)
    y, null = torch.tensor([0, 1]), torch.tensor([4, 4])
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, null))
    assert not close(model(x, t, y), model(x, t, null))
    table = lambda model: model.y_embedder["embedding_table"].weight.detach()
    before, after = table(model).clone(), table(dr.guide(model, 0.3))
    assert close(after[:4], 1.3 * before[:4] - 0.3 * before[4], 1e-6) and torch.equal(after[4], before[4])
    assert torch.equal(table(model), before) and torch.equal(flat(dr.guide(model, 0.0)), flat(model))
