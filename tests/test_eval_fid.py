"""eval_fid.py against the official tools' numbers (tests/golden), naive float64 loops and closed forms."""
import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval_fid as ev
from drift_rae import ViT

ROOT = Path(__file__).resolve().parent.parent
METRICS = torch.load(ROOT / "tests/golden/metrics.pt", weights_only=True)
INCEPTION = torch.load(ROOT / "tests/golden/inception.pt", weights_only=True)
torch.set_num_threads(1)                   # where cores are shared, eigh in two threads takes a minute


def statistics(x):
    return np.asarray(x, np.float64).mean(0), np.cov(np.asarray(x, np.float64), rowvar=False)


def exact_distance(a, b):
    """From samples: tr (Σa Σb)^½ is the sum of the singular values of the thin centred cross product."""
    (mu_a, cov_a), (mu_b, cov_b) = statistics(a), statistics(b)
    cross = ((a - mu_a) @ (b - mu_b).T) / np.sqrt((len(a) - 1) * (len(b) - 1))
    trace_root = torch.linalg.svdvals(torch.from_numpy(cross)).sum().item()
    return np.square(mu_a - mu_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root


def images(n, size=8, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (n, size, size, 3), dtype=np.uint8)


def save_folder(path, arrays):
    for i, array in enumerate(arrays):
        file = path / f"{i % 3}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)


def run(tmp_path, *argv):
    """The command in this process -> what it writes to --json."""
    ev.main([str(a) for a in argv] + ["--device", "cpu", "--json", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


@pytest.fixture(scope="module")
def inception():
    """The network filled as golden/inception.pt says, in place of the released weights."""
    model, g = ev.FIDInception(), torch.Generator().manual_seed(INCEPTION["fill_seed"])
    state = model.state_dict()
    for key in sorted(key for key in state if not key.endswith("num_batches_tracked")):
        random = torch.rand if key.endswith("bn.running_var") else torch.randn
        r = random(state[key].shape, generator=g)
        if key.endswith("bn.running_var"):
            state[key] = 0.5 + r
        elif key.endswith(("conv.weight", "fc.weight")):
            state[key] = r * (2 / r[0].numel()) ** 0.5
        else:
            state[key] = 1 + 0.1 * r if key.endswith("bn.weight") else 0.1 * r
    model.load_state_dict(state)
    return model


def test_frechet_golden():
    a, b = statistics(METRICS["A"]), statistics(METRICS["B"])
    assert ev.frechet_distance(*a, *b) == pytest.approx(METRICS["fid"], rel=1e-9)
    assert 0 <= ev.frechet_distance(*a, *a) < 1e-10
    collapsed = ev.frechet_distance(a[0] - 1, np.zeros((24, 24)), *a)
    assert collapsed == pytest.approx(24 + np.trace(a[1]), rel=1e-12)
    m = METRICS["rank_deficient"]                                            # 20 and 23 samples in 64
    a, b = statistics(m["A"]), statistics(m["B"])
    assert ev.frechet_distance(*a, *b) == pytest.approx(m["fid_exact_svd"], rel=1e-9)
    single = [x.astype(np.float32) for x in a]                               # null eigenvalues below zero
    assert ev.frechet_distance(*single, *b) == pytest.approx(m["fid_exact_svd"], rel=1e-3)
    with pytest.raises(ValueError, match="negative eigenvalues"):
        ev.frechet_distance(*a, b[0], b[1] - 0.1 * np.eye(64))


def test_frechet_commuting_covariances():
    # Σ1 = Q diag(p1) Qᵀ, Σ2 = Q diag(p2) Qᵀ: d² = |μ1 − μ2|² + Σ (√p1 − √p2)², some of them zero
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    p1, p2 = 10.0 ** rng.uniform(-6, 2, (2, 40))
    p1[:5], p2[3:15] = 0, 0
    exact = 4 * 40 + np.square(np.sqrt(p1) - np.sqrt(p2)).sum()
    got = ev.frechet_distance(np.ones(40), (q * p1) @ q.T, -np.ones(40), (q * p2) @ q.T)
    assert got == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("n, m", [(60, 45), (60, 700), (2100, 320)])
def test_frechet_ill_conditioned_and_few_samples(n, m):
    rng = np.random.default_rng(n + m)
    scale = 10.0 ** np.linspace(1, -5, 300)                                  # variances over 12 orders
    mix = np.linalg.qr(rng.standard_normal((300, 300)))[0]
    a, b = (rng.standard_normal((k, 300)) * scale @ mix for k in (n, m))
    got = ev.frechet_distance(*ev.mean_and_covariance(a), *statistics(b))
    assert got == pytest.approx(exact_distance(a, b), rel=1e-8)


def test_precision_recall():
    a, b, k5 = METRICS["A"], METRICS["B"], METRICS["k5"]                     # 400 and 350: two blocks each
    assert ev.precision_recall(a, b, METRICS["k"]) == (METRICS["precision"], METRICS["recall"])
    assert ev.precision_recall(a.numpy(), b.numpy(), 5) == (k5["precision"], k5["recall"])


def test_inception_score():
    logits, want = METRICS["is_logits"], METRICS["inception_score"]
    mixed = logits[np.random.RandomState(2020).permutation(len(logits))]
    for key, rows, splits in (("unshuffled", logits, 10), ("shuffled", mixed, 10), ("splits_1", logits, 1)):
        mean, std = ev.inception_score(rows, splits)
        assert (mean, std) == pytest.approx((want[key]["mean"], want[key]["std"]), abs=1e-9)
    certain = torch.eye(5).repeat(20, 1) * 1e4                               # p underflows to 0: no NaN
    assert ev.inception_score(certain) == pytest.approx((5.0, 0.0), abs=1e-9)


@pytest.mark.parametrize("size, cells", [(64, None), (256, 32), (299, 23)])
def test_inception_golden(inception, size, cells):
    key, x = "", INCEPTION["images"]
    if cells:
        key, g = f"_{size}", torch.Generator().manual_seed(INCEPTION[f"images_{size}_seed"])
        x = torch.randint(0, 256, (2, 3, cells, cells), generator=g, dtype=torch.uint8)
        x = x.repeat_interleave(size // cells, 2).repeat_interleave(size // cells, 3)
    features, logits = inception(x)
    for got, want in ((features, INCEPTION[f"features_torch_fidelity{key}"]),
                      (logits, INCEPTION[f"logits_unbiased_torch_fidelity{key}"]),
                      (inception(x, resize="pytorch")[0], INCEPTION[f"features_pytorch_fid{key}"])):
        assert got.shape == want.shape
        assert (got - want).norm() / want.norm() < 1e-5                      # the conventions differ by 5e-4


def naive_dinov2(w, array):
    """Class token of one uint8 [H, W, 3], in float64 from the state dict alone."""
    w = {key: value.double() for key, value in w.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    x = np.array(Image.fromarray(array).resize((224, 224), Image.BICUBIC)) / 255
    x = torch.from_numpy((x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1)
    x = F.conv2d(x[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    pos = w["pos_embed"][0, 1:].reshape(1, 5, 5, -1).permute(0, 3, 1, 2)
    x = x + F.interpolate(pos, scale_factor=(16.1 / 5, 16.1 / 5), mode="bicubic")          # [1, D, 16, 16]
    x = torch.cat([w["cls_token"][0] + w["pos_embed"][0, :1], x[0].flatten(1).T])          # [257, D]
    for b in ("blocks.0", "blocks.1"):
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv")
        q, k, v = qkv.reshape(257, 3, 2, 64).permute(1, 2, 0, 3)             # [heads, 257, 64]
        out = ((q @ k.mT / 8).softmax(2) @ v).transpose(0, 1).reshape(257, 128)
        x = x + w[f"{b}.ls1.gamma"] * linear(out, f"{b}.attn.proj")
        h = F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1"))
        x = x + w[f"{b}.ls2.gamma"] * linear(h, f"{b}.mlp.fc2")
    return norm(x, "norm")[0]


def naive_precision_recall(real, fake, k):
    def inside(point, centres):
        for i, centre in enumerate(centres):
            others = np.delete(centres, i, 0)
            radius = np.sort(np.sqrt(np.square(others - centre).sum(1)))[k - 1]
            if np.sqrt(np.square(point - centre).sum()) <= radius:
                return True
        return False
    return np.mean([inside(x, real) for x in fake]), np.mean([inside(x, fake) for x in real])


def test_command_as_a_user(tmp_path, monkeypatch):
    x, y = images(40, 1, seed=1, high=230), images(30, 1, seed=2, low=70)    # 3 dimensions
    save_folder(tmp_path / "real", x)
    np.savez(tmp_path / "fake.npz", arr_0=y)
    command = [sys.executable, str(ROOT / "eval_fid.py"), "fake.npz", "real", "--features", "pixels",
               "--batch-size", "7", "--json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "50,000" in done.stdout
    out = json.loads((tmp_path / "out.json").read_text())
    assert f"{out['frechet_distance']:.4f}" in done.stdout
    real, fake = x.reshape(40, -1) / 255, y.reshape(30, -1) / 255
    assert out["frechet_distance"] == pytest.approx(exact_distance(real, fake), rel=1e-6)
    precision, recall = naive_precision_recall(real, fake, 3)
    assert 0.2 < recall < precision < 1
    assert (out["precision"], out["recall"]) == (precision, recall)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fake.npz", "out.json", "real"]  # no temporary file
    monkeypatch.setattr(sys, "argv", ["eval_fid.py", "nowhere", "real"])
    with pytest.raises(SystemExit, match="^eval_fid.py: cannot read nowhere: "):
        runpy.run_path(command[1], run_name="__main__")


def test_command_inception(tmp_path, inception):
    # ADM's references hold statistics of the whole training set, and images for precision and recall
    torch.save(inception.state_dict(), tmp_path / "w.pth")
    x, mu = images(12, 16), np.arange(2048) / 2048
    np.savez(tmp_path / "fake.npz", arr_0=x)
    np.savez(tmp_path / "adm.npz", arr_0=x, mu=mu, sigma=np.eye(2048))
    out = run(tmp_path, tmp_path / "fake.npz", tmp_path / "adm.npz", "--weights", tmp_path / "w.pth",
              "--batch-size", 5, "--resize", "pytorch")
    assert (out["features"], out["resize"], out["n_reference"]) == ("inception", "pytorch", None)
    features, logits = inception(torch.from_numpy(x).permute(0, 3, 1, 2), "pytorch")
    x = features.double().numpy()
    roots = np.linalg.svd(x - x.mean(0), compute_uv=False) / 11 ** 0.5       # of Σ1; Σ2 is the identity
    want = np.square(x.mean(0) - mu).sum() + np.square(roots).sum() + 2048 - 2 * roots.sum()
    assert out["frechet_distance"] == pytest.approx(want, rel=1e-6)
    assert (out["precision"], out["recall"]) == (1, 1)                       # the same images
    assert out["inception_score"] == pytest.approx(ev.inception_score(logits)[0], rel=1e-6)


def test_command_dinov2(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "DINOv2", functools.partial(ev.DINOv2, dim=128, depth=2, num_heads=2))
    g, keys = torch.Generator().manual_seed(0), ViT(70, 14, 128, 2, 2).state_dict()
    state = {key: 0.2 * torch.randn(keys[key].shape, generator=g) for key in keys if key != "register_tokens"}
    torch.save(state, tmp_path / "w.pth")
    x, y = images(10, 40), images(11, 20, seed=1, low=100)
    save_folder(tmp_path / "fake", x)
    # the reference's statistics are Inception's, as in ADM's files, and must not be taken
    np.savez(tmp_path / "real.npz", arr_0=y, mu=np.zeros(2048), sigma=np.eye(2048))
    out = run(tmp_path, tmp_path / "fake", tmp_path / "real.npz", "--features", "dinov2", "--weights",
              tmp_path / "w.pth")
    a, b = (torch.stack([naive_dinov2(state, image) for image in z]).numpy() for z in (x, y))
    assert out["frechet_distance"] == pytest.approx(exact_distance(a, b), rel=1e-5)
    assert (out["n_samples"], out["n_reference"], len(out["warnings"])) == (10, 11, 4)   # sizes differ


def test_saved_statistics(tmp_path):
    fake, real, stats = tmp_path / "fake.npz", tmp_path / "real", tmp_path / "stats.npz"
    save_folder(real, images(50, 4))
    np.savez(fake, arr_0=images(60, 4, seed=1, low=50))
    first = run(tmp_path, fake, real, "--features", "pixels", "--save-stats", stats)
    second = run(tmp_path, fake, stats, "--features", "pixels")
    assert first["precision"] is not None and first["n_reference"] == 50
    assert second == first | {"reference": str(stats), "precision": None, "recall": None}
    with pytest.raises(ValueError, match="statistics are of pixels, not of inception with the tf resize"):
        run(tmp_path, stats, stats)


def test_formats_and_size(tmp_path):
    for name, shape in {"a.JPEG": (40, 30, 3), "b.bmp": (20, 64), "c.webp": (33, 33, 4)}.items():
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "labels.txt").write_text("not an image")
    with pytest.raises(ValueError, match="differ in size: pass --size"):
        list(ev.read_images(tmp_path, 1))
    (batch,) = ev.read_images(tmp_path, 8, size=16)
    grey = Image.open(tmp_path / "b.bmp").resize((51, 16), Image.BICUBIC).crop((17, 0, 33, 16))
    assert np.array_equal(batch[1, 0].numpy(), np.asarray(grey))


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    x, good = images(12), tmp_path / "good.npz"
    np.savez(good, arr_0=x)
    data = good.read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:600])
    (tmp_path / "damaged.npz").write_bytes(data[:400] + bytes(2) + data[402:])
    (tmp_path / "text.npz").write_text("not a zip")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    nan = dict(mu=np.zeros(192), sigma=np.full((192, 192), np.nan), made="pixels")
    for name, arrays in {"floats": dict(arr_0=x / 255), "neither": dict(labels=x), "nan": nan,
                         "small": dict(arr_0=x[:, :4]), "big": dict(arr_0=images(12, 70))}.items():
        np.savez(tmp_path / name, **arrays)
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "deep", [np.full((8, 8), 4000, np.uint16)])
    save_folder(tmp_path / "broken", x)
    (tmp_path / "broken/1/0001.png").write_bytes((tmp_path / "broken/0/0000.png").read_bytes()[:60])
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(functools.partial(print), tmp_path / "code.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))                # empty, and no network:
    monkeypatch.setitem(ev.WEIGHTS, "inception", (tmp_path / "none.pth").as_uri())
    cases = {"absent": "cannot read .*absent", "cut.npz": "cannot read .*cut.npz", "damaged.npz": "CRC",
             "text.npz": "cannot read .*text.npz", "floats.npz": "float64", "nan.npz": "NaN",
             "neither.npz": "neither images .arr_0. nor statistics", "small.npz": "same dimensions",
             "big.npz": "pass --size 64", "empty": "holds 0 images", "broken": "cannot read .*0001.png",
             "deep": "8 bits", "none.pth": "none.pth: .*No such file", "code.pth": "code.pth: Weights only",
             "other.pth": "other.pth: .*loading state_dict", "text.pth": "cannot read .*text.pth"}
    for name, words in cases.items():
        argv = [good, tmp_path / name, "--features", "pixels"]
        if name.endswith(".pth"):
            argv = [good, good, "--weights", tmp_path / name]
        with pytest.raises(ValueError, match=words) as caught:
            run(tmp_path, *argv)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot read file://.* pass it with --weights"):
        run(tmp_path, good, good)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("flags", [["--featurs", "pixels"], ["--batch-size", "0"], ["--size", "x"],
                                   ["--device", "abacus"], ["--json", "no/such/folder.json"]])
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        ev.main(["a.npz", "b.npz", *flags])
    assert flags[-1] in capsys.readouterr().err
