"""Tests of eval_fid.py.

Its numbers are compared with those of the official tools (tests/golden), with naive loops and with
closed forms. Its command is run on good and on bad files.
"""
import errno
import functools
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import drift_rae as dr  # noqa: E402
import eval_fid as ev  # noqa: E402

SCRIPT = ROOT / "eval_fid.py"
METRICS = torch.load(ROOT / "tests/golden/metrics.pt", weights_only=True)
INCEPTION = torch.load(ROOT / "tests/golden/inception.pt", weights_only=True)


def images(n, size=8, seed=0, low=0, high=256):
    """n random images, uint8 [n, size, size, 3]."""
    shape = n, size, size, 3
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)


def save_folder(path, arrays):
    """Writes the images as PNGs into three subfolders of path."""
    for i, array in enumerate(arrays):
        file = path / f"{i % 3}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)


def run(folder, *flags):
    """Runs the command in this process and returns what it writes to --json."""
    file = folder / "out.json"
    flags = [*flags, "--device", "cpu", "--json", file]
    ev.main([str(flag) for flag in flags])
    return json.loads(file.read_text())


# ---- Fréchet distance

def statistics(x):
    x = np.asarray(x, np.float64)
    return x.mean(0), np.cov(x, rowvar=False)


def exact_distance(a, b):
    """The Fréchet distance of two sets of samples from their product, without any covariance.

    tr (Σa Σb)^½ is the sum of the singular values of the product of the centred samples.
    """
    centred_a = (a - a.mean(0)) / np.sqrt(len(a) - 1)
    centred_b = (b - b.mean(0)) / np.sqrt(len(b) - 1)
    product = torch.from_numpy(centred_a @ centred_b.T)
    trace_root = torch.linalg.svdvals(product).sum().item()
    means = np.square(a.mean(0) - b.mean(0)).sum()
    traces = np.square(centred_a).sum() + np.square(centred_b).sum()
    return means + traces - 2 * trace_root


def test_frechet_distance_equals_the_official_one():
    a = statistics(METRICS["A"])
    b = statistics(METRICS["B"])
    assert ev.frechet_distance(*a, *b) == pytest.approx(METRICS["fid"], rel=1e-9)


def test_frechet_distance_to_itself_is_zero():
    a = statistics(METRICS["A"])
    assert 0 <= ev.frechet_distance(*a, *a) < 1e-10


def test_frechet_distance_to_a_point_is_trace_and_shift():
    mu, sigma = statistics(METRICS["A"])
    distance = ev.frechet_distance(mu - 1, np.zeros((24, 24)), mu, sigma)
    assert distance == pytest.approx(24 + np.trace(sigma), rel=1e-12)


def test_frechet_distance_is_exact_for_20_and_23_samples_in_64_dimensions():
    golden = METRICS["rank_deficient"]
    mu, sigma = statistics(golden["A"])
    b = statistics(golden["B"])
    exact = golden["fid_exact_svd"]
    assert ev.frechet_distance(mu, sigma, *b) == pytest.approx(exact, rel=1e-9)
    # In float32, eigenvalues that should be zero lie a little below zero.
    distance = ev.frechet_distance(np.float32(mu), np.float32(sigma), *b)
    assert distance == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("mu, sigma, words", [
    (np.zeros(4), np.eye(4) - 2, "negative"),
    (np.zeros(4), np.eye(5), r"\[5, 5\]"),
    (np.zeros(5), np.eye(5), "dimensions, 4 and 5"),
    (np.zeros(4), np.full((4, 4), np.inf), "infinite"),
])
def test_frechet_distance_refuses_wrong_arguments(mu, sigma, words):
    with pytest.raises(ValueError, match=words):
        ev.frechet_distance(np.zeros(4), np.eye(4), mu, sigma)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    # Σ1 = Q diag(v1) Qᵀ, Σ2 = Q diag(v2) Qᵀ: d² = |μ1 − μ2|² + Σ (√v1 − √v2)², some of them zero
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    v1, v2 = 10.0 ** rng.uniform(-6, 2, (2, 40))
    v1[:5] = 0
    v2[3:15] = 0
    sigma1 = (q * v1) @ q.T
    sigma2 = (q * v2) @ q.T
    mu = np.ones(40)
    closed_form = 4 * 40 + np.square(np.sqrt(v1) - np.sqrt(v2)).sum()
    distance = ev.frechet_distance(mu, sigma1, -mu, sigma2)
    assert distance == pytest.approx(closed_form, rel=1e-9)


@pytest.mark.parametrize("n, m", [(60, 45), (60, 700), (2100, 320)])
def test_frechet_distance_holds_over_12_orders_of_variance_and_few_samples(n, m):
    rng = np.random.default_rng(n + m)
    scale = 10.0 ** np.linspace(1, -5, 300)
    rotation, _ = np.linalg.qr(rng.standard_normal((300, 300)))
    a = rng.standard_normal((n, 300)) * scale @ rotation
    b = rng.standard_normal((m, 300)) * scale @ rotation
    distance = ev.frechet_distance(*ev.mean_and_covariance(a), *statistics(b))
    exact = pytest.approx(exact_distance(a, b), rel=1e-8)
    assert distance == exact
    roots = ev.mean_and_root(torch.from_numpy(a)), ev.mean_and_root(torch.from_numpy(b))
    assert ev.distance_from_roots(*roots[0], *roots[1]) == exact


# ---- precision, recall, Inception Score

def test_precision_and_recall_equal_the_official_ones():
    real, fake = METRICS["A"], METRICS["B"]    # 400 and 350: two blocks each
    assert METRICS["k"] == 3
    assert ev.precision_recall(real, fake) == (METRICS["precision"], METRICS["recall"])
    k5 = METRICS["k5"]
    real, fake = real.numpy(), fake.numpy()
    assert ev.precision_recall(real, fake, 5) == (k5["precision"], k5["recall"])


@pytest.mark.parametrize("order, splits", [("unshuffled", 10), ("shuffled", 10), ("splits_1", 1)])
def test_inception_score_equals_the_official_one(order, splits):
    logits = METRICS["is_logits"]
    if order == "shuffled":
        logits = logits[np.random.RandomState(2020).permutation(len(logits))]
    mean, std = ev.inception_score(logits, splits)
    golden = METRICS["inception_score"][order]
    assert mean == pytest.approx(golden["mean"], abs=1e-9)
    assert std == pytest.approx(golden["std"], abs=1e-9)


def test_inception_score_of_certain_logits_is_the_number_of_classes():
    logits = torch.eye(5).repeat(20, 1) * 1e4    # p underflows to 0: no NaN
    assert ev.inception_score(logits) == pytest.approx((5.0, 0.0), abs=1e-9)


def distance_to(points, point):
    return np.sqrt(np.square(points - point).sum(1))


def is_inside(point, centres, k):
    for i, centre in enumerate(centres):
        others = np.delete(centres, i, 0)
        radius = np.sort(distance_to(others, centre))[k - 1]
        if distance_to(point[None], centre) <= radius:
            return True
    return False


def naive_precision_recall(real, fake, k):
    precision = np.mean([is_inside(point, real, k) for point in fake])
    recall = np.mean([is_inside(point, fake, k) for point in real])
    return precision, recall


@pytest.mark.parametrize("dim", [2, 2048])
def test_equal_points_are_inside_balls_of_radius_zero(dim):
    rng = np.random.default_rng(0)
    rows = 100 * rng.standard_normal((15, dim)).astype(np.float32)
    real = np.repeat(rows[:3], 5, 0)              # each row 5 times: every radius is zero
    fake = np.concatenate([rows, real])           # 12 of the 30 rows are not among the real ones
    precision, recall = naive_precision_recall(real, fake, 3)
    assert (precision, recall) == (0.6, 1)
    assert ev.precision_recall(real, fake) == (precision, recall)
    # Points that differ from the centres in the sixth digit are outside.
    precision, _ = ev.precision_recall(real, fake * np.float32(1 + 1e-5))
    assert precision == 0


@pytest.mark.parametrize("seed", [2, 3, 5])    # rounding errors once made this 0.80 to 0.87
def test_memorised_images_have_full_precision_and_recall(seed):
    rng = np.random.default_rng(seed)
    rows = np.maximum(100 * rng.standard_normal((3, 2048)), 0).astype(np.float32)
    real = np.repeat(rows, 5, 0)
    assert ev.precision_recall(real, real[rng.permutation(15)]) == (1, 1)
    assert ev.precision_recall(real, np.repeat(rows, 20, 0)) == (1, 1)


# ---- networks

def filling(key, shape, generator):
    """Random weights, made as those that golden/inception.pt was computed with."""
    if key.endswith("bn.running_var"):
        return 0.5 + torch.rand(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    if key.endswith("bn.weight"):
        return 1 + 0.1 * values
    if key.endswith(("conv.weight", "fc.weight")):
        return values * (2 / values[0].numel()) ** 0.5
    return 0.1 * values


@pytest.fixture(scope="module")
def inception():
    model = ev.FIDInception()
    generator = torch.Generator().manual_seed(INCEPTION["fill_seed"])
    state = model.state_dict()
    keys = [key for key in state if not key.endswith("num_batches_tracked")]
    assert len(keys) == INCEPTION["n_keys"]
    for key in sorted(keys):
        state[key] = filling(key, state[key].shape, generator)
    model.load_state_dict(state)
    return model


def golden_images(size):
    if size == 64:
        return INCEPTION["images"]
    cell = {256: 8, 299: 13}[size]
    cells = size // cell
    generator = torch.Generator().manual_seed(INCEPTION[f"images_{size}_seed"])
    x = torch.randint(0, 256, (2, 3, cells, cells), generator=generator, dtype=torch.uint8)
    return x.repeat_interleave(cell, 2).repeat_interleave(cell, 3)


def relative_error(x, golden):
    assert x.shape == golden.shape
    return (x - golden).norm() / golden.norm()


@pytest.mark.parametrize("size, suffix", [(64, ""), (256, "_256"), (299, "_299")])
def test_inception_equals_torch_fidelity_and_pytorch_fid(inception, size, suffix):
    x = golden_images(size)
    features, logits = inception(x)
    # the two ways of resizing differ by 5e-4
    assert relative_error(features, INCEPTION[f"features_torch_fidelity{suffix}"]) < 1e-5
    assert relative_error(logits, INCEPTION[f"logits_unbiased_torch_fidelity{suffix}"]) < 1e-5
    features, _ = inception(x, resize="pytorch")
    assert relative_error(features, INCEPTION[f"features_pytorch_fid{suffix}"]) < 1e-5


def test_inception_refuses_images_that_are_not_uint8(inception):
    with pytest.raises(ValueError, match="float32"):
        inception(torch.rand(1, 3, 64, 64))


class NaiveDINOv2:
    """Computes the class token of one image in float64, with 2 blocks of 2 heads of width 64."""
    def __init__(self, state):
        self.weights = {key: value.double() for key, value in state.items()}

    def norm(self, x, name):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[1:], weight, bias, 1e-6)

    def linear(self, x, name):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.linear(x, weight, bias)

    def tokens(self, image):
        """uint8 [H, W, 3] -> [257, D]; 5x5 positions become 16x16."""
        resized = Image.fromarray(image).resize((224, 224), Image.BICUBIC)
        x = (np.array(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        x = torch.from_numpy(x).permute(2, 0, 1)[None]
        kernel = self.weights["patch_embed.proj.weight"]
        bias = self.weights["patch_embed.proj.bias"]
        patches = F.conv2d(x, kernel, bias, stride=14)[0]      # [D, 16, 16]
        positions = self.weights["pos_embed"][0]               # [1 + 25, D]
        grid = positions[1:].T.reshape(1, -1, 5, 5)
        grid = F.interpolate(grid, scale_factor=(16.1 / 5, 16.1 / 5), mode="bicubic")[0]
        class_token = self.weights["cls_token"][0] + positions[:1]
        return torch.cat([class_token, (patches + grid).flatten(1).T])

    def attention(self, x, name):
        qkv = self.linear(x, f"{name}.qkv").reshape(257, 3, 2, 64)
        q, k, v = qkv.permute(1, 2, 0, 3)                      # [heads, 257, 64]
        mixed = (q @ k.mT / 8).softmax(2) @ v
        mixed = mixed.transpose(0, 1).reshape(257, 128)
        return self.linear(mixed, f"{name}.proj")

    def mlp(self, x, name):
        hidden = F.gelu(self.linear(x, f"{name}.fc1"))
        return self.linear(hidden, f"{name}.fc2")

    def __call__(self, image):
        x = self.tokens(image)
        for block in ("blocks.0", "blocks.1"):
            change = self.attention(self.norm(x, f"{block}.norm1"), f"{block}.attn")
            x = x + self.weights[f"{block}.ls1.gamma"] * change
            change = self.mlp(self.norm(x, f"{block}.norm2"), f"{block}.mlp")
            x = x + self.weights[f"{block}.ls2.gamma"] * change
        return self.norm(x, "norm")[0]

    def features(self, images):
        return torch.stack([self(image) for image in images]).numpy()


def tiny_dinov2():
    """A random state dict with the keys of the released one, but a grid of 5x5 positions."""
    generator = torch.Generator().manual_seed(0)
    state = dr.ViT(70, 14, 128, 2, 2, num_registers=0).state_dict()
    del state["register_tokens"]
    for key, value in state.items():
        state[key] = 0.2 * torch.randn(value.shape, generator=generator)
    return state


def test_dinov2_refuses_a_file_with_registers():
    state = tiny_dinov2() | {"register_tokens": torch.zeros(1, 4, 128)}
    with pytest.raises(RuntimeError, match="register_tokens"):
        ev.DINOv2(state, dim=128, depth=2, num_heads=2)


# ---- command

def test_command_equals_naive_metrics_of_its_pixels(tmp_path):
    real = images(40, 1, seed=1, high=230)    # 3 dimensions
    fake = images(30, 1, seed=2, low=70)
    save_folder(tmp_path / "real_雪", real)
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    command = [sys.executable, str(SCRIPT), "fake.npz", "real_雪", "--json", "out.json"]
    command += ["--features", "pixels", "--batch-size", "7"]
    # The output can show few letters, and standard error is no terminal: no progress bar.
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    out = json.loads((tmp_path / "out.json").read_text())
    real = real.reshape(40, 3) / 255
    fake = fake.reshape(30, 3) / 255
    assert out["frechet_distance"] == pytest.approx(exact_distance(real, fake), rel=1e-6)
    precision, recall = naive_precision_recall(real, fake, 3)
    assert 0.2 < recall < precision < 1
    assert (out["precision"], out["recall"]) == (precision, recall)
    assert f"{out['frechet_distance']:.4f}" in done.stdout
    assert "50,000" in done.stdout
    assert "real_?" in done.stdout
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["fake.npz", "out.json", "real_雪"]    # no temporary file


def run_script(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval_fid.py", *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_what_a_user_can_mend_ends_in_one_sentence(monkeypatch):
    with pytest.raises(SystemExit, match="^eval_fid.py: cannot read nowhere: "):
        run_script(monkeypatch, "nowhere", "real")


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError, KeyError])
def test_any_other_error_keeps_its_traceback(tmp_path, monkeypatch, error):
    def broken(x):
        raise error("a bug")

    np.savez(tmp_path / "a.npz", mu=np.zeros(5), sigma=np.eye(5))
    monkeypatch.setattr(torch.linalg, "svdvals", broken)
    with pytest.raises(error, match="a bug"):
        run_script(monkeypatch, tmp_path / "a.npz", tmp_path / "a.npz")


def test_help_can_be_printed_in_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit, match="^0$"):
        run_script(monkeypatch, "--help")
    stream.flush()
    assert b"Fr?chet" in stream.buffer.getvalue()


def test_command_takes_statistics_and_images_of_a_file_as_adm_has_it(tmp_path, inception):
    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    mu = np.arange(2048) / 2048
    arr_0 = images(11, 16)
    np.savez(tmp_path / "fake.npz", arr_0=arr_0)
    np.savez(tmp_path / "adm.npz", arr_0=arr_0, mu=mu, sigma=np.eye(2048))
    flags = ["--weights", tmp_path / "weights.pth", "--batch-size", 5, "--resize", "pytorch"]
    out = run(tmp_path, tmp_path / "fake.npz", tmp_path / "adm.npz", *flags)
    assert (out["features"], out["resize"]) == ("inception", "pytorch")
    assert (out["n_samples"], out["n_reference"]) == (11, None)

    features, logits = inception(torch.from_numpy(arr_0).permute(0, 3, 1, 2), "pytorch")
    features = features.double().numpy()
    mean = features.mean(0)
    roots = np.linalg.svd(features - mean, compute_uv=False) / 10 ** 0.5    # of Σ's eigenvalues
    traces = np.square(roots).sum() + 2048 - 2 * roots.sum()                # the reference's is I
    closed_form = np.square(mean - mu).sum() + traces
    assert out["frechet_distance"] == pytest.approx(closed_form, rel=1e-6)
    assert (out["precision"], out["recall"]) == (1, 1)                      # the same images
    score, std = ev.inception_score(logits)
    assert out["inception_score"] == pytest.approx(score, rel=1e-6)
    assert out["inception_score_std"] == pytest.approx(std, rel=1e-4)
    order = np.random.RandomState(2020).permutation(11)                     # torch-fidelity's
    score, _ = ev.inception_score(logits[order])
    assert out["inception_score_shuffled"] == pytest.approx(score, rel=1e-6)


def test_command_equals_naive_dinov2_and_ignores_statistics_of_inception(tmp_path, monkeypatch):
    tiny = functools.partial(ev.DINOv2, dim=128, depth=2, num_heads=2)
    monkeypatch.setattr(ev, "DINOv2", tiny)
    state = tiny_dinov2()
    torch.save(state, tmp_path / "weights.pth")
    fake = images(10, 40)
    real = images(11, 20, seed=1, low=100)
    save_folder(tmp_path / "fake", fake)
    np.savez(tmp_path / "real.npz", arr_0=real, mu=np.zeros(2048), sigma=np.eye(2048))
    flags = ["--features", "dinov2", "--weights", tmp_path / "weights.pth"]
    out = run(tmp_path, tmp_path / "fake", tmp_path / "real.npz", *flags)
    naive = NaiveDINOv2(state)
    distance = exact_distance(naive.features(fake), naive.features(real))
    assert out["frechet_distance"] == pytest.approx(distance, rel=1e-5)
    assert (out["n_samples"], out["n_reference"]) == (10, 11)
    assert len(out["warnings"]) == 4    # two singular covariances, few samples, two sizes


def test_statistics_give_the_distance_alone_and_need_no_weights(tmp_path):
    samples, reference = tmp_path / "samples.npz", tmp_path / "reference.npz"
    np.savez(samples, mu=np.ones(5), sigma=np.eye(5))
    np.savez(reference, mu=np.zeros(5), sigma=4 * np.eye(5))
    out = run(tmp_path, samples, reference)
    assert out.pop("frechet_distance") == pytest.approx(10)    # 5 of the means, 5 · (2 − 1)²
    assert out.pop("samples") == str(samples)
    assert out.pop("reference") == str(reference)
    assert (out.pop("features"), out.pop("resize")) == ("inception", "tf")
    assert out.pop("warnings") == []
    assert set(out) == {"n_samples", "n_reference", "precision", "recall", "inception_score",
                        "inception_score_std", "inception_score_shuffled"}
    assert set(out.values()) == {None}


def brightness(batch):
    """A network of two features, in place of Inception."""
    x = batch.double().flatten(1)
    return torch.stack([x.mean(1), x.std(1)], 1), None


def test_size_replaces_the_statistics_of_a_file_with_images(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "load_network", lambda args: brightness)
    fake, adm, plain = [tmp_path / f"{name}.npz" for name in ("fake", "adm", "plain")]
    np.savez(fake, arr_0=images(12))
    np.savez(plain, arr_0=images(11, seed=1))
    np.savez(adm, arr_0=images(11, seed=1), mu=np.zeros(2), sigma=np.eye(2))
    stored = run(tmp_path, fake, adm)
    assert stored["n_reference"] is None
    out = run(tmp_path, fake, adm, "--size", 4)
    assert out["n_reference"] == 11
    assert out["frechet_distance"] != pytest.approx(stored["frechet_distance"], rel=0.1)
    expected = run(tmp_path, fake, plain, "--size", 4)
    assert out["frechet_distance"] == expected["frechet_distance"]
    assert any("adm.npz" in sentence for sentence in out["warnings"])


def test_size_cannot_change_statistics_without_images(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(5), sigma=np.eye(5))
    out = run(tmp_path, tmp_path / "a.npz", tmp_path / "a.npz", "--size", 4)
    assert len(out["warnings"]) == 2    # one for each input
    assert "--size" in out["warnings"][0]


def test_few_images_of_many_pixels_need_no_decomposition_of_their_covariance(tmp_path, monkeypatch):
    def refuse(x):
        raise AssertionError("64x64 pixels would take minutes")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    fake, real = images(12, 64), images(11, 64, seed=1, low=100)
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    np.savez(tmp_path / "real.npz", arr_0=real)
    out = run(tmp_path, tmp_path / "fake.npz", tmp_path / "real.npz", "--features", "pixels")
    distance = exact_distance(fake.reshape(12, -1) / 255, real.reshape(11, -1) / 255)
    assert out["frechet_distance"] == pytest.approx(distance, rel=1e-6)


OUT_OF_MEMORY = [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError()]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_names_the_flags(tmp_path, monkeypatch, error):
    def greedy(batch):
        raise error

    monkeypatch.setattr(ev, "pixels", greedy)
    np.savez(tmp_path / "a.npz", arr_0=images(12))
    with pytest.raises(ev.UserError, match="--batch-size .*--size"):
        run(tmp_path, tmp_path / "a.npz", tmp_path / "a.npz", "--features", "pixels")


# ---- --json

@pytest.mark.parametrize("name", ["no/such/folder.json", "folder", "x" * 300, "readonly/out.json"])
def test_json_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "readonly").mkdir(mode=0o500)
    if name.startswith("readonly") and os.access(tmp_path / "readonly", os.W_OK):
        pytest.skip("this user may write everywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "evaluate", None)
    with pytest.raises(ev.UserError, match=f"cannot write {name}"):
        ev.main(["a.npz", "b.npz", "--json", name])


def test_json_is_written_before_anything_is_printed(tmp_path, monkeypatch):
    def refuse(result):
        assert json.loads((tmp_path / "out.json").read_text()) == result
        raise OSError("the terminal is gone")

    np.savez(tmp_path / "a.npz", mu=np.zeros(5), sigma=np.eye(5))
    monkeypatch.setattr(ev, "print_result", refuse)
    with pytest.raises(OSError, match="gone"):
        run(tmp_path, tmp_path / "a.npz", tmp_path / "a.npz")


def test_a_full_disk_leaves_the_old_json_and_prints_the_numbers(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    np.savez(tmp_path / "a.npz", mu=np.zeros(5), sigma=np.eye(5))
    (tmp_path / "out.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ev.UserError, match="out.json: No space left .* MB"):
        run(tmp_path, tmp_path / "a.npz", tmp_path / "a.npz")
    assert (tmp_path / "out.json").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "out.json"]
    assert "frechet_distance         0.0000" in capsys.readouterr().out


# ---- input

@pytest.mark.parametrize("width, height, size", [
    (5, 9, 8), (9, 5, 8), (16, 16, 16), (33, 33, 16), (64, 20, 16), (101, 67, 33), (300, 451, 64)])
def test_both_scripts_crop_alike(width, height, size):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    cropped = np.asarray(ev.center_crop(image, size))
    assert cropped.shape == (size, size, 3)
    assert np.array_equal(cropped, np.asarray(dr.center_crop(image, size)))


def test_a_folder_may_mix_formats_and_sizes(tmp_path):
    shapes = {"a.JPEG": (40, 30, 3), "b.bmp": (20, 64), "c.webp": (33, 33, 4)}
    for name, shape in shapes.items():
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "labels.txt").write_text("not an image")
    with pytest.raises(ev.UserError, match="--size"):
        list(ev.read_images(tmp_path, 1))
    (batch,) = ev.read_images(tmp_path, 8, size=16)
    assert batch.shape == (3, 3, 16, 16)
    grey = Image.open(tmp_path / "b.bmp").resize((51, 16), Image.BICUBIC)
    middle = np.asarray(grey.crop((17, 0, 33, 16)))
    assert np.array_equal(batch[1, 0].numpy(), middle)


def test_hidden_files_are_no_images_and_links_are_followed(tmp_path):
    folder, elsewhere = tmp_path / ".hidden" / "folder", tmp_path / "elsewhere"
    save_folder(folder, images(10))
    save_folder(elsewhere, images(2))
    for name in ("._0000.JPEG", ".DS_Store", ".ipynb_checkpoints/0000.png", "0/._0000.png",
                 "a.gif", "0/b.jfif", "readme.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not an image")
    (folder / "link").symlink_to(elsewhere, target_is_directory=True)
    out = run(tmp_path, folder, folder, "--features", "pixels")
    assert out["n_samples"] == 12
    skipped = [sentence for sentence in out["warnings"] if "skipped" in sentence]
    assert len(skipped) == 2 and skipped[0] == skipped[1]    # the two inputs are one folder
    assert "3 files" in skipped[0] and "b.jfif" in skipped[0]    # 0/b.jfif is the first by path


def test_the_orientation_in_exif_is_ignored(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6    # "rotate by 90 degrees"
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert image.getexif()[0x0112] == 6
    assert np.array_equal(ev.read_image(tmp_path / "a.png"), array)


# ---- refusals

@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of good.npz and of many files that are not good."""
    folder = tmp_path_factory.mktemp("bad")
    x = images(12)
    np.savez(folder / "good", arr_0=x)
    np.savez(folder / "floats", arr_0=x / 255)
    np.savez(folder / "fortran", arr_0=np.asfortranarray(x))
    np.savez(folder / "pickled", arr_0=np.array([x, None], object))
    np.savez(folder / "small", arr_0=x[:, :4])
    np.savez(folder / "big", arr_0=images(12, 70))
    np.savez(folder / "nine", arr_0=x[:9])
    np.savez(folder / "neither", labels=x)
    np.savez(folder / "five", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(folder / "six", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(folder / "five_six", mu=np.zeros(5), sigma=np.eye(6))
    np.savez(folder / "nan", mu=np.zeros(5), sigma=np.full((5, 5), np.nan))
    np.savez(folder / "negative", mu=np.zeros(5), sigma=-np.eye(5))
    np.savez(folder / "words", mu=np.array(["a"] * 5), sigma=np.eye(5))
    np.savez(folder / "half", mu=np.zeros(5))
    data = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(data[:600])
    (folder / "damaged.npz").write_bytes(data[:400] + bytes(2) + data[402:])
    (folder / "empty").mkdir()
    save_folder(folder / "mixed", [x[0], x[0, :4]])
    save_folder(folder / "deep", [np.full((8, 8), 4000, np.uint16)])
    (folder / "float").mkdir()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "float/a.tiff")
    save_folder(folder / "broken", x)
    data = (folder / "broken/0/0000.png").read_bytes()
    (folder / "broken/1/0001.png").write_bytes(data[:60])
    torch.save({"fc.weight": torch.zeros(3)}, folder / "other.pth")
    torch.save([torch.zeros(3)], folder / "list.pth")
    torch.save(functools.partial(print), folder / "code.pth")
    torch.save(functools.partial(print), folder / "old.pth", _use_new_zipfile_serialization=False)
    data = (folder / "other.pth").read_bytes()
    (folder / "cut.pth").write_bytes(data[:300])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 95628359\n"
    for name in ("lfs.pth", "lfs.npz", "pointer/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(pointer)
    (folder / "page.pth").write_text("\n<!DOCTYPE html>\n<html>404</html>")
    (folder / "text.pth").write_text("not a checkpoint")
    (folder / "text.npz").write_text("not a zip")
    (folder / "tensors.pth").write_bytes(b"\x40" + bytes(7) + b'{"x":{"dtype":"F32"}}')
    return folder


def refuses(words, *flags):
    """The command ends in one sentence and writes nothing."""
    with pytest.raises(ev.UserError, match=words) as caught:
        run(Path(), *flags)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not Path("out.json").exists()


@pytest.mark.parametrize("flags, words", [
    ("good.npz absent --features pixels", "absent"),
    ("good.npz empty --features pixels", "empty holds 0 images"),
    ("good.npz nine.npz --features pixels", "nine.npz holds 9 images"),
    ("good.npz broken --features pixels", "0001.png"),
    ("good.npz mixed --features pixels", "--size"),
    ("good.npz deep --features pixels", "0000.png.*8 bits"),
    ("good.npz float --features pixels", "a.tiff.*8 bits"),
    ("good.npz pointer --features pixels", "a.png.*Git-LFS"),
    ("good.npz lfs.npz --features pixels", "lfs.npz.*Git-LFS"),
    ("good.npz cut.npz --features pixels", "cut.npz"),
    ("good.npz damaged.npz --features pixels", "damaged.npz.*CRC"),
    ("good.npz text.npz --features pixels", "text.npz"),
    ("good.npz floats.npz --features pixels", "floats.npz.*float64"),
    ("good.npz fortran.npz --features pixels", "fortran.npz.*Fortran"),
    ("good.npz pickled.npz --features pixels", "pickled.npz.*object"),
    ("good.npz neither.npz --features pixels", "neither.npz.*arr_0"),
    ("good.npz small.npz --features pixels", "192.*small.npz.*96"),
    ("good.npz big.npz --features pixels", "--size 64"),
    ("good.npz five.npz --features pixels", "five.npz.*pixels"),
    ("five.npz six.npz", "five.npz.*six.npz"),
    ("five.npz five_six.npz", r"five_six.npz.*\[6, 6\]"),
    ("five.npz nan.npz", "nan.npz.*NaN"),
    ("five.npz negative.npz", "negative.npz.*eigenvalue"),
    ("five.npz words.npz", "words.npz"),
    ("five.npz half.npz", "half.npz.*sigma"),
    ("good.npz good.npz --weights none.pth", "none.pth.*No such file"),
    ("good.npz good.npz --weights empty", "empty.*directory"),
    ("good.npz good.npz --weights text.pth", "text.pth"),
    ("good.npz good.npz --weights cut.pth", "cut.pth"),
    ("good.npz good.npz --weights good.npz", "good.npz"),
    ("good.npz good.npz --weights code.pth", "code.pth.*functools.partial"),
    ("good.npz good.npz --weights old.pth", "old.pth.*functools.partial"),
    ("good.npz good.npz --weights list.pth", "list.pth.*list"),
    ("good.npz good.npz --weights other.pth", "other.pth.*Missing key"),
    ("good.npz good.npz --weights other.pth --features dinov2", "other.pth.*pos_embed"),
    ("good.npz good.npz --weights lfs.pth", "lfs.pth.*Git-LFS"),
    ("good.npz good.npz --weights page.pth", "page.pth.*HTML"),
    ("good.npz good.npz --weights tensors.pth", "tensors.pth.*safetensors"),
])
def test_bad_files_end_in_one_sentence(bad, monkeypatch, flags, words):
    monkeypatch.chdir(bad)
    refuses(words, *flags.split())


def test_features_that_are_not_finite_are_refused(bad, monkeypatch):
    monkeypatch.chdir(bad)
    monkeypatch.setattr(ev, "pixels", lambda batch: (torch.full((len(batch), 3), np.nan), None))
    refuses("good.npz.*--weights", "good.npz", "good.npz", "--features", "pixels")


def test_missing_weights_are_downloaded_or_asked_for(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(ev.WEIGHTS, "inception", (tmp_path / "none.pth").as_uri())
    refuses("file://.*none.pth.*--weights", "good.npz", "good.npz")
    file = ev.download((bad / "other.pth").as_uri())
    assert file.is_relative_to(tmp_path / "cache")
    assert file.read_bytes() == (bad / "other.pth").read_bytes()


@pytest.mark.parametrize("flags", [
    ["--featurs", "pixels"], ["--batch-size", "0"], ["--size", "x"], ["--size", "0"],
    ["--device", "abacus"]])
def test_wrong_flags_are_named(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        ev.main(["a.npz", "b.npz", *flags])
    assert flags[-1] in capsys.readouterr().err
