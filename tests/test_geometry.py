"""toy/geometry.py: statistics against closed forms and a naive loop, Theorem 1's directions, the command itself."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import toy.geometry as gm
from toy.digits import load_digits, make_teacher
from drift_rae import to_float


def poles(d, rho=1.0):
    eye = torch.eye(d, dtype=torch.float64) * rho
    return torch.cat([eye, -eye]).unsqueeze(0)                              # [1,2d,d]


def values(x):
    return [statistic(x).item() for statistic in gm.STATISTICS.values()]


def test_isotropic_gaussian_and_rank_one():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20000, 8, generator=g, dtype=torch.float64) * 3 + 5
    assert gm.participation_ratio(x).item() == pytest.approx(1, abs=0.002)
    assert gm.spectral_entropy(x).item() == pytest.approx(1, abs=0.002)
    line = torch.randn(1, 50, 1, generator=g, dtype=torch.float64) * torch.arange(1.0, 9.0) + 5
    assert gm.participation_ratio(line).item() == pytest.approx(1 / 8, abs=1e-9)
    assert gm.spectral_entropy(line).item() == pytest.approx(1 / 8, abs=1e-9)
    # n samples of an isotropic Gaussian look less isotropic than it is: PR -> 1/(1 + d/n)
    x = torch.randn(20, 174, 128, generator=g, dtype=torch.float64)
    assert gm.participation_ratio(x).mean().item() == pytest.approx(1 / (1 + 128 / 174), abs=0.01)


def test_points_on_a_sphere():
    """The poles themselves, wherever their centre is: isotropic, √2 apart, and no MMD from the poles."""
    for d, rho, centre in ((3, 1.0, 0.0), (7, 2.5, -4.0)):
        pr, se, nn, mmd = values(poles(d, rho) + centre)
        assert (pr, se) == (pytest.approx(1), pytest.approx(1))
        assert nn == pytest.approx(rho * math.sqrt(2 / d)) and mmd == pytest.approx(0, abs=1e-12)


def test_an_ellipse_and_two_points():
    x = poles(2) * torch.tensor([2.0, 1.0])                                 # covariance eigenvalues 4 : 1
    assert gm.participation_ratio(x).item() == pytest.approx(25 / (2 * 17))
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert gm.spectral_entropy(x).item() == pytest.approx(math.exp(entropy) / 2)
    rho = 1.7                                                               # ±ρ·e_1 in the plane
    x = torch.tensor([[[rho, 0], [-rho, 0]]], dtype=torch.float64)
    expected = (1 + math.exp(-math.sqrt(2) * rho) - 2 * math.exp(-rho)) / 4
    assert gm.pole_mmd(x).item() == pytest.approx(expected)


def test_statistics_against_a_naive_loop():
    g = torch.Generator().manual_seed(1)
    latents, labels = torch.randn(24, 5, 3, 4, generator=g), torch.arange(24) % 2     # 12 tokens: more than one chunk
    latents[:, 0] *= 3
    rows = []
    for c in range(2):
        for i in range(3):
            for j in range(4):
                x = latents[labels == c][:, :, i, j].double().numpy()
                n, d = x.shape
                mu = np.linalg.eigvalsh(np.cov(x.T))
                p = mu / mu.sum()
                nearest = [min(np.linalg.norm(x[a] - x[b]) for b in range(n) if b != a) for a in range(n)]
                x = x - x.mean(0)
                rho = np.mean([np.linalg.norm(a) for a in x])
                y = [s * rho * np.eye(d)[k] for s in (1, -1) for k in range(d)]
                k = [[np.mean([math.exp(-np.linalg.norm(u - v) / d**0.5) for u in a for v in b]) for a in (x, y)]
                     for b in (x, y)]
                rows.append((mu.sum()**2 / (d * (mu**2).sum()), math.exp(-(p * np.log(p)).sum()) / d,
                             np.mean(nearest) / math.sqrt(d), k[0][0] + k[1][1] - 2 * k[0][1]))
    got = gm.token_statistics(latents, labels)
    assert list(got.values()) == pytest.approx(np.mean(rows, 0).tolist(), abs=1e-9)


def test_curvature_of_known_curves():
    t = torch.linspace(0, 1, 400, dtype=torch.float64)
    turn, still = 2 * math.pi * t, torch.zeros_like(t)
    circle = torch.stack([3 * turn.cos(), still, 3 * turn.sin()], -1)
    helix = torch.stack([2 * turn.cos(), 2 * turn.sin(), 1.5 * turn], -1)   # κ = a/(a² + b²)
    line = torch.stack([t**2 + t, 2 * (t**2 + t), still], -1)               # at a changing speed
    kappa, angle = gm.curvature(torch.stack([circle, helix, line], 1))
    assert kappa.shape == (398, 3)
    assert kappa[:, 0].numpy() == pytest.approx(1 / 3, rel=1e-3)
    assert kappa[:, 1].numpy() == pytest.approx(2 / (4 + 2.25), rel=1e-3)
    assert kappa[:, 2].numpy() == pytest.approx(0, abs=1e-6)
    assert angle[0].item() == pytest.approx(2 * math.pi, rel=0.01)


def test_theorem1_against_a_naive_loop():
    d, r, tau = 6, 0.8, 0.3
    got = gm.theorem1(d, r, tau, True, seed=3)
    g = torch.Generator().manual_seed(3)
    y = torch.nn.functional.normalize(torch.randn(1, d, d, generator=g), dim=-1)[0].double().numpy()
    x = ((2 * torch.rand(1, d, d, generator=g) - 1) * r)[0].double().numpy()
    tau *= np.mean([np.linalg.norm(a - b) for a in x for b in (*x, *y)])    # mean distance, to oneself included
    rows = []
    for j in range(d):
        pos = np.array([math.exp(-np.linalg.norm(x[j] - b) / tau) for b in y])
        neg = np.array([math.exp(-np.linalg.norm(x[j] - b) / tau) if k != j else 0 for k, b in enumerate(x)])
        pos, neg = pos / pos.sum(), neg / neg.sum()
        rows.append((np.sum((pos @ y)**2), np.linalg.norm(neg @ x), 1 / (d * (pos**2).sum()),
                     1 / ((d - 1) * (neg**2).sum())))
    names = ("v_pos2", "v_neg", "share_positives", "share_negatives")
    assert [got[k] for k in names] == pytest.approx(np.mean(rows, 0).tolist(), abs=2e-4)


def test_theorem1_directions():
    def at(setting, d):
        return gm.theorem1(d, *gm.SETTINGS[setting], draws=max(1, 256 // d))

    for d in (16, 64, 256):  # where τ is long against the spread of the distances, the theorem holds
        row = at("r = 1, tau = 4", d)
        assert row["v_pos2_times_d"] == pytest.approx(1, abs=0.12)
        assert row["v_neg_over_limit"] == pytest.approx(1, abs=0.12)
        assert row["share_positives"] > 0.99 and row["share_negatives"] > 0.97
    small, large = at("r = 1, tau = 1", 4), at("r = 1, tau = 1", 256)
    assert large["share_positives"] > 0.99 > small["share_positives"]
    # distances among the generated spread by a constant share of r: at τ = r the weights never become uniform
    assert 0.75 < large["share_negatives"] < 0.88 and large["v_neg_over_limit"] > 1.08
    # at the paper's τ the theorem needs many dimensions, the more the shorter τ
    shares = [at(f"|x| = |y|, tau = {t} S", 64)["share_positives"] for t in (0.2, 0.05, 0.02)]
    assert shares[0] > 0.8 > 0.4 > shares[1] > 0.15 > shares[2]
    assert at("|x| = |y|, tau = 0.02 S", 512)["share_positives"] > 3 * shares[2]


def test_vae_latents_are_normalised_and_repeat():
    images, labels = load_digits()
    images, labels = to_float(images)[::5], labels[::5]

    def space(width, kl):
        torch.manual_seed(0)
        return gm.make_vae(images, labels, width, kl, 40, seed=0)

    one, again, loud = space(16, 1e-2), space(16, 1e-2), space(16, 10.0)
    assert torch.equal(one.mean, again.mean) and torch.equal(one.sigma, again.sigma)
    x = torch.cat([one.draw() for _ in range(8)])
    assert x.mean(0).abs().max() < 0.15 and (x.var(0) - 1).abs().max() < 0.2
    assert one.mean.shape == (348, 16, 2, 2) and one.rae.decode(one.draw()).shape == images.shape
    # the KL term makes the posterior wide, and the sampled latents scattered
    assert loud.sigma.mean() > 1.3 * one.sigma.mean()
    pr = [gm.token_statistics(s.draw(), labels)["PR"] for s in (one, loud)]
    assert pr[1] > pr[0]


def test_the_command(tmp_path, capsys, monkeypatch):
    """Tiny, but all of it, in its own processes."""
    make_teacher(tmp_path / "teacher.pt", steps=(11, 11, 11))
    ck = torch.load(tmp_path / "teacher.pt", weights_only=True)
    few = (torch.arange(0, 1740, 174).view(10, 1) + torch.arange(64)).flatten()     # 64 of each class
    torch.save(ck | {"images": ck["images"][few], "labels": ck["labels"][few]}, tmp_path / "teacher.pt")
    simulate = gm.simulate
    monkeypatch.setattr(gm, "simulate", lambda largest: simulate(16))
    flags = ["--out", str(tmp_path), "--widths", "4", "--seeds", "1", "--steps", "11", "11", "11"]
    assert gm.main(flags) == 0
    said = capsys.readouterr().out
    for words in ("Theorem 1", "Tables 1, 2", "Figure 1", "Table 9", "RAE-48 distilled", "VAE-4 scratch", "4, mean"):
        assert words in said
    result = json.loads((tmp_path / "geometry.json").read_text())
    assert [r["space"] for r in result["runs"]] == ["RAE-48", "VAE-4"] and len(result["theorem1"]) == 15
    for run in result["runs"]:
        assert np.shape(run["kappa"]) == (48, 32) and np.all(np.array(run["kappa"]) > 0)
        assert set(run["results"]) == set(gm.METHODS)
        # G(z) = z before training: noise of the data's variance over all classes, so at least that of one class
        assert run["results"]["untrained"]["spread"] > 1
    for name in ("theorem1.png", "curvature.png"):
        assert min(Image.open(tmp_path / name).size) > 300
    job = ("VAE-4", 4, 0, tmp_path / "teacher.pt", 1e-2, (11, 11, 11))
    assert gm.study(job) == result["runs"][1]  # bit for bit, wherever it runs


def test_latents_of_a_file(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    file = {"latents": torch.randn(40, 3, 2, 2, generator=g), "labels": torch.arange(40) % 4}
    torch.save(file, tmp_path / "ours.pt")
    assert gm.main(["--latents", str(tmp_path / "ours.pt")]) == 0
    out = capsys.readouterr().out.split()
    assert out[::2] == ["PR", "SE", "NN-d", "S-MMD"]
    assert [float(v) for v in out[1::2]] == pytest.approx(list(gm.token_statistics(**file).values()), abs=1e-6)


@pytest.mark.parametrize("change, saying", [
    ({"latents": torch.randn(40, 3, 2)}, "must be a dict"), ({"labels": torch.zeros(39)}, "must be a dict"),
    ({"labels": None}, "must be a dict"), ({"latents": torch.zeros(40, 3, 2, 2).long()}, "finite"),
    ({"latents": torch.full((40, 3, 2, 2), torch.nan)}, "finite"), ({"labels": torch.arange(40)}, "at least two")])
def test_bad_latents(tmp_path, capsys, change, saying):
    torch.save({"latents": torch.randn(40, 3, 2, 2), "labels": torch.arange(40) % 4} | change, tmp_path / "bad.pt")
    fails(capsys, "--latents", tmp_path / "bad.pt", saying=saying)


def fails(capsys, *args, saying):
    assert gm.main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and saying in err


def test_bad_flags_and_files(tmp_path, capsys):
    fails(capsys, "--latents", tmp_path / "nothing.pt", saying="there is no checkpoint")
    (tmp_path / "text.pt").write_text("no tensors")
    fails(capsys, "--latents", tmp_path / "text.pt", saying="damaged")
    fails(capsys, "--what", saying="unrecognized")
    fails(capsys, "--widths", "0", saying="at least 1")
    fails(capsys, "--steps", "5", "5", "5", saying="at least 11")
    torch.save({"ema": {}}, tmp_path / "teacher.pt")
    fails(capsys, "--out", tmp_path, saying="no autoencoder of the digits")
