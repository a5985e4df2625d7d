"""eval_fid.py against the official tools' numbers (tests/golden), naive float64 loops and closed forms."""
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval_fid as ev  # noqa: E402

GOLDEN = {name: torch.load(ROOT / f"tests/golden/{name}.pt", weights_only=True)
          for name in ("inception", "metrics")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other are slow where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def statistics(x):
    return np.asarray(x, np.float64).mean(0), np.cov(np.asarray(x, np.float64), rowvar=False)


def cross_nuclear(a, b):
    """The exact distance from samples: tr (Σa Σb)^½ is the nuclear norm of the thin centred cross product."""
    (mu_a, cov_a), (mu_b, cov_b) = statistics(a), statistics(b)
    cross = ((a - mu_a) @ (b - mu_b).T) / np.sqrt((len(a) - 1) * (len(b) - 1))
    return np.square(mu_a - mu_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.linalg.norm(cross, "nuc")


def call(capsys, *argv):
    """main() in this process -> (exit code, stdout, stderr)."""
    return (ev.main([str(a) for a in argv]), *capsys.readouterr())


def images(n, size=8, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (n, size, size, 3), dtype=np.uint8)


def save_folder(path, arrays):
    for i, array in enumerate(arrays):
        file = path / f"{i % 3}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)
    return path


@pytest.fixture(scope="module")
def inception():
    """The network filled as golden/inception.pt says, in place of the released weights."""
    model, g = ev.FIDInception(), torch.Generator().manual_seed(GOLDEN["inception"]["fill_seed"])
    state = model.state_dict()
    for key in sorted(key for key in state if not key.endswith("num_batches_tracked")):
        shape = state[key].shape
        if key.endswith("bn.running_var"):
            state[key] = 0.5 + torch.rand(shape, generator=g)
            continue
        r = torch.randn(shape, generator=g)
        if key.endswith(("conv.weight", "fc.weight")):
            state[key] = r * (2 / (r.numel() / shape[0])) ** 0.5
        else:
            state[key] = 1 + 0.1 * r if key.endswith("bn.weight") else 0.1 * r
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def weights(inception, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception.state_dict(), path)
    return path


# ------------------------------------------------------------------ Fréchet distance

def test_frechet_golden():
    m = GOLDEN["metrics"]
    a, b = statistics(m["A"]), statistics(m["B"])
    assert ev.frechet_distance(*a, *b) == pytest.approx(m["fid"], rel=1e-9)
    assert 0 <= ev.frechet_distance(*a, *a) < 1e-10
    m = m["rank_deficient"]
    a, b = statistics(m["A"]), statistics(m["B"])
    assert ev.frechet_distance(*a, *b) == pytest.approx(m["fid_exact_svd"], rel=1e-9)
    assert ev.frechet_distance(*b, *a) == pytest.approx(m["fid_exact_svd"], rel=1e-9)


def test_frechet_commuting_covariances():
    # Σ1 = Q diag(p) Qᵀ, Σ2 = Q diag(q) Qᵀ: d² = |μ1 − μ2|² + Σ (√p − √q)², some p and q zero
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    p1, p2 = 10.0 ** rng.uniform(-6, 2, (2, 40))
    p1[:5], p2[3:15] = 0, 0
    mu1, mu2 = rng.standard_normal((2, 40))
    exact = np.square(mu1 - mu2).sum() + np.square(np.sqrt(p1) - np.sqrt(p2)).sum()
    got = ev.frechet_distance(mu1, (q * p1) @ q.T, mu2, (q * p2) @ q.T)
    assert got == pytest.approx(exact, rel=1e-9)
    zero = np.zeros((40, 40))
    assert ev.frechet_distance(mu1, zero, mu2, (q * p2) @ q.T) == pytest.approx(
        np.square(mu1 - mu2).sum() + p2.sum(), rel=1e-12)


@pytest.mark.parametrize("n, m", [(60, 45), (60, 700), (700, 700)])
def test_frechet_ill_conditioned_and_few_samples(n, m):
    rng = np.random.default_rng(n + m)
    scale = 10.0 ** np.linspace(1, -5, 300)                                  # variances over 12 orders
    mix = np.linalg.qr(rng.standard_normal((300, 300)))[0]
    a, b = (rng.standard_normal((k, 300)) * scale @ mix for k in (n, m))
    exact = cross_nuclear(a, b)
    got = ev.frechet_distance(*statistics(a), *statistics(b))
    assert got == pytest.approx(exact, rel=1e-8)
    assert ev.frechet_distance(*statistics(b), *statistics(a)) == pytest.approx(got, rel=1e-10)


def test_frechet_float32_statistics_are_no_error():
    # a file that keeps float32 makes null eigenvalues slightly negative
    m = GOLDEN["metrics"]["rank_deficient"]
    a, b = statistics(m["A"]), statistics(m["B"])
    got = ev.frechet_distance(*(x.astype(np.float32) for x in a), *b)
    assert got == pytest.approx(m["fid_exact_svd"], rel=1e-3)


def test_frechet_leaves_the_thread_count():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ev.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("change, message", [
    (lambda mu, s: (mu, s * np.nan), "second covariance holds NaN"),
    (lambda mu, s: (mu + np.inf, s), "second mean holds NaN"),
    (lambda mu, s: (mu, -s), "not positive semi-definite"),
    (lambda mu, s: (mu, s - 0.5 * np.eye(4)), "not positive semi-definite"),
    (lambda mu, s: (mu, np.fliplr(np.diag([1.0, 0, 0, 1]))), "not positive semi-definite"),
    (lambda mu, s: (mu, s + np.triu(np.ones((4, 4)), 1)), "not symmetric"),
    (lambda mu, s: (mu[:3], s[:3, :3]), "same dimensions"),
    (lambda mu, s: (mu, s[:3]), "same dimensions"),
])
def test_frechet_refuses(change, message):
    mu, sigma = np.arange(4.0), np.diag([3.0, 2, 1, 0.1])
    with pytest.raises(ev.UserError, match=message):
        ev.frechet_distance(mu, sigma, *change(mu, sigma))


def test_mean_and_covariance():
    x = np.random.default_rng(0).standard_normal((5000, 7)).astype(np.float32)
    x = x * 0.01 + 100                                                       # E x² − (E x)² would cancel
    mu, sigma = ev.mean_and_covariance(x)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, statistics(x)[0], rtol=1e-14)
    np.testing.assert_allclose(sigma, statistics(x)[1], rtol=0, atol=1e-15)


# ------------------------------------------------------------------ precision, recall, Inception Score

def naive_precision_recall(real, fake, k):
    def inside(points, centres):
        hits = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = np.delete(centres, i, 0)
                radius = np.sort(np.sqrt(np.square(others - centre).sum(1)))[k - 1]
                if np.sqrt(np.square(point - centre).sum()) <= radius:
                    hits += 1
                    break
        return hits / len(points)
    return inside(fake, real), inside(real, fake)


def test_precision_recall_golden():
    m = GOLDEN["metrics"]
    assert ev.precision_recall(m["A"], m["B"], m["k"]) == (m["precision"], m["recall"])
    assert ev.precision_recall(m["A"].numpy(), m["B"].numpy(), 5) == (m["k5"]["precision"], m["k5"]["recall"])


def test_precision_recall_naive(monkeypatch):
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((70, 3)) + 1e8, rng.standard_normal((55, 3)) * 0.7 + 1e8 + 0.4
    want = naive_precision_recall(real, fake, 3)
    assert 0.2 < want[1] < want[0] < 1
    assert ev.precision_recall(real, fake) == want
    blocks = ev._blocks
    monkeypatch.setattr(ev, "_blocks", lambda x: blocks(x, 16))              # tiles that do not divide n or m
    assert ev.precision_recall(real, fake) == want


def test_precision_recall_of_copies():
    # copies are neighbours at distance 0: radii are 0 and a ball holds its own centre's copies only
    real = np.repeat(np.random.default_rng(0).standard_normal((6, 500)), 4, 0) * 50
    fake = np.concatenate([real[::4], real[::4] + 0.01])
    assert ev.precision_recall(real, fake) == (0.5, 1.0)
    d2 = ev._squared_distances(torch.from_numpy(real), torch.from_numpy(real[::4]))
    assert (d2 == 0).sum(0).tolist() == [4] * 6                              # exactly 0, not rounding noise


def test_precision_recall_refuses():
    x = np.zeros((4, 2))
    for bad in (x[:3], np.zeros((4, 3)), x[:, 0], x + np.nan):
        with pytest.raises(ev.UserError):
            ev.precision_recall(x, bad)


def test_inception_score_golden():
    logits, want = GOLDEN["metrics"]["is_logits"], GOLDEN["metrics"]["inception_score"]
    order = np.random.RandomState(2020).permutation(len(logits))
    for rows, splits, key in ((logits, 10, "unshuffled"), (logits[order], 10, "shuffled"),
                              (logits, 1, "splits_1")):
        expected = want[key]["mean"], want[key]["std"]
        assert ev.inception_score(rows, splits) == pytest.approx(expected, abs=1e-9)


def test_inception_score_naive_and_extremes():
    logits = np.random.default_rng(0).standard_normal((57, 6)) * 3           # 57 rows do not divide by 10
    scores = []
    for i in range(10):
        rows = logits[i * 57 // 10:(i + 1) * 57 // 10]
        p = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
        scores.append(np.exp(np.mean([(q * np.log(q / p.mean(0))).sum() for q in p])))
    assert ev.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    certain = torch.eye(5).repeat(20, 1) * 1e4                               # p underflows to 0: no NaN
    assert ev.inception_score(certain) == pytest.approx((5.0, 0.0), abs=1e-9)
    with pytest.raises(ev.UserError, match="at least 10"):
        ev.inception_score(logits[:9])


# ------------------------------------------------------------------ networks

def golden_images(size):
    g = GOLDEN["inception"]
    if size == 64:
        return g["images"], ""
    cells, repeat = (23, 13) if size == 299 else (32, 8)
    generator = torch.Generator().manual_seed(g[f"images_{size}_seed"])
    x = torch.randint(0, 256, (2, 3, cells, cells), generator=generator, dtype=torch.uint8)
    return x.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3), f"_{size}"


@pytest.mark.parametrize("size", [64, 256, 299])
def test_inception_golden(inception, size):
    x, key = golden_images(size)
    g = GOLDEN["inception"]
    features, logits = inception(x)
    for got, want in ((features, g[f"features_torch_fidelity{key}"]),
                      (logits, g[f"logits_unbiased_torch_fidelity{key}"]),
                      (inception(x, resize="pytorch")[0], g[f"features_pytorch_fid{key}"])):
        assert got.shape == want.shape
        assert (got - want).norm() / want.norm() < 1e-5                      # the conventions differ by 5e-4


def test_tf1_resize():
    x = GOLDEN["inception"]["images"].float()
    want = GOLDEN["inception"]["resized_check"]["torch_fidelity_row150"]     # [3, 299], after (x − 128) / 128
    torch.testing.assert_close((ev.tf1_resize(x)[0, :, 150] - 128) / 128, want, rtol=0, atol=1e-6)
    x = torch.rand(1, 1, 3, 7)
    got = ev.tf1_resize(x, 5)
    for i in range(5):
        for j in range(5):
            y, z = i * 3 / 5, j * 7 / 5
            a, b = int(y), int(z)
            c, d = min(a + 1, 2), min(b + 1, 6)
            top = x[0, 0, a, b] * (1 - z + b) + x[0, 0, a, d] * (z - b)
            bottom = x[0, 0, c, b] * (1 - z + b) + x[0, 0, c, d] * (z - b)
            assert abs(got[0, 0, i, j] - (top * (1 - y + a) + bottom * (y - a))) < 1e-6


def test_inception_refuses_floats(inception):
    with pytest.raises(ValueError, match="uint8"):
        inception(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="resize"):
        inception(golden_images(64)[0], resize="tf2")


def dinov2_state(dim=128, depth=2, grid=5):
    """Random weights under the key names of dinov2_vitl14_pretrain.pth, smaller."""
    g = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + grid * grid, dim), "mask_token": (1, dim),
              "patch_embed.proj.weight": (dim, 3, 14, 14), "patch_embed.proj.bias": (dim,),
              "norm.weight": (dim,), "norm.bias": (dim,)}
    for i in range(depth):
        for key, shape in {"norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim),
                           "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim),
                           "attn.proj.bias": (dim,),
                           "ls1.gamma": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
                           "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
                           "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,),
                           "ls2.gamma": (dim,)}.items():
            shapes[f"blocks.{i}.{key}"] = shape
    return {key: torch.randn(shape, generator=g) * 0.2 for key, shape in shapes.items()}


def naive_dinov2(w, array):
    """Class token of one uint8 [H, W, 3], in float64 from the state dict alone."""
    w = {key: value.double() for key, value in w.items()}
    dim, image = w["norm.bias"].shape[0], Image.fromarray(array).resize((224, 224), Image.BICUBIC)
    x = torch.from_numpy(np.asarray(image).copy()).double() / 255
    x = ((x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(2, 0, 1)
    tokens = [w["cls_token"][0, 0] + w["pos_embed"][0, 0]]
    grid = int((w["pos_embed"].shape[1] - 1) ** 0.5)
    pos = w["pos_embed"][0, 1:].reshape(1, grid, grid, dim).permute(0, 3, 1, 2)
    pos = F.interpolate(pos, scale_factor=((16 + 0.1) / grid,) * 2, mode="bicubic")[0]
    for i in range(16):
        for j in range(16):
            patch = x[:, 14 * i:14 * i + 14, 14 * j:14 * j + 14]
            token = (w["patch_embed.proj.weight"] * patch).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
            tokens.append(token + pos[:, i, j])
    x = torch.stack(tokens)                                                  # [257, D]

    def norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]
    for b in (f"blocks.{i}" for i in range(2)):
        qkv = norm(x, f"{b}.norm1") @ w[f"{b}.attn.qkv.weight"].T + w[f"{b}.attn.qkv.bias"]
        q, k, v = (part.reshape(257, dim // 64, 64).transpose(0, 1) for part in qkv.chunk(3, 1))
        out = ((q @ k.mT / 8).softmax(2) @ v).transpose(0, 1).reshape(257, dim)
        x = x + w[f"{b}.ls1.gamma"] * (out @ w[f"{b}.attn.proj.weight"].T + w[f"{b}.attn.proj.bias"])
        h = F.gelu(norm(x, f"{b}.norm2") @ w[f"{b}.mlp.fc1.weight"].T + w[f"{b}.mlp.fc1.bias"])
        x = x + w[f"{b}.ls2.gamma"] * (h @ w[f"{b}.mlp.fc2.weight"].T + w[f"{b}.mlp.fc2.bias"])
    return norm(x, "norm")[0]


def test_dinov2_naive():
    state, x = dinov2_state(), images(2, 40)
    got = ev.DINOv2(state)(torch.from_numpy(x).permute(0, 3, 1, 2))
    want = torch.stack([naive_dinov2(state, image) for image in x])
    assert (want[0] - want[1]).norm() > 1e-2 * want.norm()                   # the two images differ
    assert (got - want).norm() / want.norm() < 1e-5


# ------------------------------------------------------------------ reading

def test_read_images(tmp_path):
    x = images(7)
    save_folder(tmp_path / "folder", x)
    np.savez(tmp_path / "a.npz", arr_0=x, arr_1=np.arange(7))
    np.savez_compressed(tmp_path / "f.npz", arr_0=(x / 255).astype(np.float32))
    in_order = np.concatenate([x[i::3] for i in range(3)])                   # sorted by path
    for name, want in (("folder", in_order), ("a.npz", x), ("f.npz", x)):
        batches = list(ev.read_images(tmp_path / name, 3))
        assert [len(b) for b in batches] == [3, 3, 1]
        assert torch.equal(torch.cat(batches), torch.from_numpy(want).permute(0, 3, 1, 2))
    np.savez(tmp_path / "grey.npz", arr_0=x[..., :1])
    assert torch.equal(*(torch.cat(list(ev.read_images(tmp_path / "grey.npz", 4)))[:, c] for c in (0, 2)))


def test_read_formats_and_size(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "a.JPEG")
    Image.fromarray(rng.integers(0, 256, (20, 64), dtype=np.uint8)).save(tmp_path / "b.bmp")
    Image.fromarray(rng.integers(0, 256, (33, 33, 4), dtype=np.uint8)).save(tmp_path / "c.webp")
    Image.fromarray(rng.random((18, 18)).astype(np.float32)).save(tmp_path / "d.tiff")
    (tmp_path / "labels.txt").write_text("not an image")
    with pytest.raises(ev.UserError, match="differ in size, 30x40 and 64x20: pass --size"):
        list(ev.read_images(tmp_path, 2))
    (batch,) = ev.read_images(tmp_path, 8, size=16)
    assert batch.shape == (4, 3, 16, 16) and batch.dtype == torch.uint8
    assert 60 < batch.float().mean() < 190 and batch.float().std() > 10


def test_npz_is_streamed(tmp_path):
    # an endless member: reading all of it first would not return. The header promises 10^9 images.
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 8, 8, 3)}
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header)
            member.write(bytes(8 * 8 * 3 * 5))
    batches = ev.read_images(tmp_path / "x.npz", 2)
    assert next(batches).shape == next(batches).shape == (2, 3, 8, 8)
    with pytest.raises(ev.UserError, match="truncated: 5 of its 1000000000 images"):
        next(batches)


# ------------------------------------------------------------------ command

def test_command_as_a_user(tmp_path):
    real, fake = images(40, seed=1), images(30, seed=2, high=200)
    save_folder(tmp_path / "real", real)
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    run = [sys.executable, str(ROOT / "eval_fid.py"), "fake.npz", "real", "--features", "pixels",
           "--json", "out.json"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "FD (pixels)" in done.stdout and "singular" in done.stdout and "50,000" in done.stdout
    out = json.loads((tmp_path / "out.json").read_text())
    a, b = ((x.transpose(0, 3, 1, 2).reshape(len(x), -1) / 255) for x in (fake, real))
    assert out["frechet_distance"] == pytest.approx(cross_nuclear(a, b), rel=1e-6)
    assert (out["precision"], out["recall"]) == naive_precision_recall(b, a, 3)
    rest = {"features": "pixels", "resize": None, "n_samples": 30, "n_reference": 40, "inception_score": None}
    assert {key: out[key] for key in rest} == rest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fake.npz", "out.json", "real"]  # no temporary file
    done = subprocess.run(run[:3] + ["nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "eval_fid.py: nowhere does not exist\n")


def test_command_inception(tmp_path, capsys, inception, weights):
    x = images(12, 32)
    np.savez(tmp_path / "fake.npz", arr_0=x)
    np.savez(tmp_path / "real.npz", arr_0=images(5, 32, seed=3, low=60))
    results = []
    for extra in ((), ("--batch-size", 5), ("--resize", "pytorch")):
        code, out, _ = call(capsys, tmp_path / "fake.npz", tmp_path / "real.npz", "--weights", weights,
                            "--json", tmp_path / "o.json", "--device", "cpu", *extra)
        assert code == 0 and f"with the {'pytorch' if '--resize' in extra else 'tf'} resize" in out
        results.append(json.loads((tmp_path / "o.json").read_text()))
    tf, batched, pytorch = results
    assert (tf["features"], tf["resize"], pytorch["resize"]) == ("inception", "tf", "pytorch")
    for key in ("frechet_distance", "precision", "recall", "inception_score"):
        assert batched[key] == pytest.approx(tf[key], rel=1e-6)              # the batch size changes nothing
    assert abs(pytorch["frechet_distance"] / tf["frechet_distance"] - 1) > 1e-5
    with torch.no_grad():
        logits = inception(torch.from_numpy(x).permute(0, 3, 1, 2))[1]
    assert tf["inception_score"] == pytest.approx(ev.inception_score(logits)[0], rel=1e-5)


def test_command_dinov2(tmp_path, capsys):
    torch.save(dinov2_state(), tmp_path / "w.pth")
    x, y = images(8, 20), images(9, 20, seed=1, low=100)
    save_folder(tmp_path / "fake", x)
    np.savez(tmp_path / "real.npz", arr_0=y, mu=np.zeros(2048), sigma=np.eye(2048))      # as ADM's files
    code, out, _ = call(capsys, tmp_path / "fake", tmp_path / "real.npz", "--features", "dinov2", "--weights",
                        tmp_path / "w.pth", "--json", tmp_path / "o.json", "--device", "cpu")
    assert code == 0 and "FD-DINOv2" in out and "not ViT-L/14's" in out
    model = ev.DINOv2(dinov2_state())
    a, b = (model(torch.from_numpy(z).permute(0, 3, 1, 2)).double().numpy() for z in (x, y))
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["frechet_distance"] == pytest.approx(cross_nuclear(a, b), rel=1e-5)
    assert result["inception_score"] is None and result["n_reference"] == 9


def test_saved_statistics(tmp_path, capsys):
    np.savez(tmp_path / "fake.npz", arr_0=images(300, 4))
    save_folder(tmp_path / "real", images(200, 4, seed=1, low=50))
    fake, stats = tmp_path / "fake.npz", tmp_path / "s.npz"
    common = ["--features", "pixels", "--json", tmp_path / "o.json"]
    assert call(capsys, fake, tmp_path / "real", *common, "--save-stats", stats)[0] == 0
    first = json.loads((tmp_path / "o.json").read_text())
    code, out, _ = call(capsys, fake, stats, *common)
    second = json.loads((tmp_path / "o.json").read_text())
    assert code == 0 and "precision and recall need images" in out
    assert second["frechet_distance"] == first["frechet_distance"] and second["n_reference"] == 200
    assert first["precision"] is not None and second["precision"] is None and second["recall"] is None
    code, _, err = call(capsys, fake, stats)                                 # of pixels, asked for inception
    assert code == 2 and "are of raw pixels" in err
    code, _, err = call(capsys, fake, stats, *common, "--save-stats", tmp_path / "t")
    assert code == 2 and "statistics already" in err and not (tmp_path / "t").exists()


def test_statistics_alone_need_no_weights(tmp_path, capsys):
    m = GOLDEN["metrics"]
    for name in "AB":
        mu, sigma = statistics(m[name])
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=sigma)
    code, out, _ = call(capsys, tmp_path / "A.npz", tmp_path / "B.npz", "--json", tmp_path / "o.json")
    result = json.loads((tmp_path / "o.json").read_text())
    assert code == 0 and "N not stated" in out and "does not say of which features" in out
    assert "precision and recall need images" in out and "Inception Score needs" in out
    assert result["frechet_distance"] == pytest.approx(m["fid"], rel=1e-9)
    assert result["n_samples"] is None and result["n_reference"] is None


def test_adm_reference(tmp_path, capsys, weights):
    # ADM's files: statistics of the whole training set for the FID, 10,000 images for precision and recall
    x = images(6, 16)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "fake.npz", arr_0=x)
    np.savez(tmp_path / "adm.npz", arr_0=x, mu=rng.standard_normal(2048), sigma=np.eye(2048))
    code, out, _ = call(capsys, tmp_path / "fake.npz", tmp_path / "adm.npz", "--weights", weights, "--json",
                        tmp_path / "o.json", "--device", "cpu")
    result = json.loads((tmp_path / "o.json").read_text())
    assert code == 0 and "precision and recall take the 6 images" in out
    assert (result["precision"], result["recall"], result["n_reference"]) == (1, 1, None)
    assert result["frechet_distance"] > 1000                                 # of mu, sigma, not of images
    assert result["inception_score"] is None                                 # 6 samples, 10 splits


def bad_inputs(folder):
    """name -> (arguments, words of the one sentence on stderr)."""
    good, pixels = folder / "good.npz", ["--features", "pixels"]
    x, mu, sigma = images(6), np.zeros(192), np.eye(192)
    np.savez(good, arr_0=x)
    (folder / "empty").mkdir()
    save_folder(folder / "one", x[:1])
    save_folder(folder / "broken", x)
    file = next((folder / "broken").rglob("*.png"))
    file.write_bytes(file.read_bytes()[:60])
    (folder / "deep").mkdir()
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(folder / "deep/a.png")
    for name, arrays in {"nan": dict(mu=mu, sigma=sigma * np.nan), "negative": dict(mu=mu, sigma=-sigma),
                         "dims": dict(mu=mu[:5], sigma=sigma[:5, :5]), "neither": dict(labels=mu),
                         "floats": dict(arr_0=x.astype(np.float32)), "nans": dict(arr_0=x / 255 * np.nan),
                         "signed": dict(arr_0=x / 127.5 - 1), "ints": dict(arr_0=x.astype(np.int64)),
                         "nchw": dict(arr_0=x.transpose(0, 3, 1, 2)), "single": dict(arr_0=x[:1]),
                         "none": dict(arr_0=x[:0]), "big": dict(arr_0=images(5, 70)),
                         "small": dict(arr_0=images(5, 4))}.items():
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "cut.npz").write_bytes(good.read_bytes()[:600])
    damaged = bytearray(good.read_bytes())
    damaged[400] ^= 255                                                      # the checksum no longer holds
    (folder / "damaged.npz").write_bytes(damaged)
    (folder / "text.npz").write_text("not a zip")
    torch.save({"fc.weight": torch.zeros(3)}, folder / "wrong.pth")
    (folder / "text.pth").write_text("not a checkpoint")
    cases = {name: ([good, folder / f"{name}.npz", *pixels], words) for name, words in {
        "nan": "second covariance holds NaN", "negative": "not positive semi-definite",
        "dims": "same dimensions", "small": "same dimensions", "ints": "int64",
        "neither": "neither images (arr_0) nor statistics", "floats": "outside [0, 1]",
        "nans": "outside [0, 1]", "signed": "outside [0, 1], from -1",
        "nchw": "images [N, H, W, 3] are needed", "single": "fewer than two images", "none": "fewer than two",
        "big": "pass --size 64 or less", "cut": "truncated", "damaged": "truncated or damaged",
        "text": "neither a folder nor an .npz"}.items()}
    cases |= {name: ([good, folder / name, *pixels], words) for name, words in {
        "empty": "no image that Pillow reads", "one": "fewer than two", "broken": "cannot read the image",
        "deep": "uint16", "absent": "does not exist"}.items()}
    cases |= {"samples absent": ([folder / "absent", folder / "broken", *pixels], "absent does not exist"),
              "weights absent": ([good, good, "--weights", folder / "no.pth"], "cannot read"),
              "weights wrong": ([good, good, "--weights", folder / "wrong.pth"], "does not hold the incep"),
              "weights text": ([good, good, "--weights", folder / "text.pth"], "does not hold the inception"),
              "weights other": ([good, good, "--features", "dinov2", "--weights", folder / "wrong.pth"],
                                "does not hold the dinov2"),
              "unknown": ([good, good, "--featurs", "pixels"], "--help"),
              "batch": ([good, good, *pixels, "--batch-size", "0"], "at least 1"),
              "resize": ([good, good, *pixels, "--resize", "tf"], "--resize belongs to"),
              "device": ([good, good, *pixels, "--device", "abacus"], "cannot be used"),
              "json": ([good, good, *pixels, "--json", folder / "no/o.json"], "does not exist")}
    return cases


def test_bad_input_is_one_sentence(tmp_path, capsys):
    for name, (argv, words) in bad_inputs(tmp_path).items():
        code, out, err = call(capsys, *argv)
        assert code == 2 and out == "", (name, out)
        assert err.startswith("eval_fid.py: ") and err.count("\n") == 1 and words in err, (name, err)


def test_weights_that_cannot_be_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))                          # an empty cache
    np.savez(tmp_path / "x.npz", arr_0=images(4))
    for name, url in ev.WEIGHTS.items():
        missing = (tmp_path / "missing.pth").as_uri()                        # fails as a download does
        monkeypatch.setitem(ev.WEIGHTS, name, missing)
        code, _, err = call(capsys, tmp_path / "x.npz", tmp_path / "x.npz", "--features", name)
        assert code == 2 and missing in err and "--weights" in err and url.startswith("https://")
        assert err.splitlines()[-1].startswith(f"eval_fid.py: the {name} weights are not in {tmp_path}")
