"""eval_fid.py against the official tools' numbers (tests/golden), naive loops, closed forms."""
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

import drift_rae as dr
import eval_fid as ev

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "eval_fid.py"
METRICS = torch.load(ROOT / "tests/golden/metrics.pt", weights_only=True)
INCEPTION = torch.load(ROOT / "tests/golden/inception.pt", weights_only=True)


def images(n, size=8, seed=0, low=0, high=256):
    shape = n, size, size, 3
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)


def save_folder(path, arrays):
    """PNGs in three subfolders."""
    for i, array in enumerate(arrays):
        file = path / f"{i % 3}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)


def run(folder, *flags):
    """The command in this process -> what it writes to --json."""
    file = folder / "out.json"
    flags = [*flags, "--device", "cpu", "--json", file]
    ev.main([str(flag) for flag in flags])
    return json.loads(file.read_text())


# ---- Fréchet distance

def statistics(x):
    x = np.asarray(x, np.float64)
    return x.mean(0), np.cov(x, rowvar=False)


def exact_distance(a, b):
    """tr (Σa Σb)^½ is the sum of the singular values of the thin product of the centred samples."""
    mu_a, sigma_a = statistics(a)
    mu_b, sigma_b = statistics(b)
    centred_a = (a - mu_a) / np.sqrt(len(a) - 1)
    centred_b = (b - mu_b) / np.sqrt(len(b) - 1)
    product = torch.from_numpy(centred_a @ centred_b.T)
    trace_root = torch.linalg.svdvals(product).sum().item()
    means = np.square(mu_a - mu_b).sum()
    return means + np.trace(sigma_a) + np.trace(sigma_b) - 2 * trace_root


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
    # as a file of float32 has it, null eigenvalues are a little below zero
    distance = ev.frechet_distance(np.float32(mu), np.float32(sigma), *b)
    assert distance == pytest.approx(exact, rel=1e-3)


def test_covariances_with_negative_eigenvalues_are_refused():
    mu, sigma = statistics(METRICS["rank_deficient"]["A"])
    with pytest.raises(ValueError, match="negative eigenvalues"):
        ev.frechet_distance(mu, sigma, mu, sigma - 0.1 * np.eye(64))


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
    assert distance == pytest.approx(exact_distance(a, b), rel=1e-8)


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


# ---- networks

def filling(key, shape, generator):
    """Weights in place of the released ones, by the recipe of golden/inception.pt."""
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
    # the conventions differ by 5e-4
    assert relative_error(features, INCEPTION[f"features_torch_fidelity{suffix}"]) < 1e-5
    assert relative_error(logits, INCEPTION[f"logits_unbiased_torch_fidelity{suffix}"]) < 1e-5
    features, _ = inception(x, resize="pytorch")
    assert relative_error(features, INCEPTION[f"features_pytorch_fid{suffix}"]) < 1e-5


def test_inception_refuses_images_that_are_not_uint8(inception):
    with pytest.raises(ValueError, match="uint8 images are needed, not torch.float32"):
        inception(torch.rand(1, 3, 64, 64))


class NaiveDINOv2:
    """Class token of one image in float64, from the state dict alone; 2 blocks, 2 heads of 64."""
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
    """A random state dict of the released form: 5x5 positions, no registers."""
    generator = torch.Generator().manual_seed(0)
    state = dr.ViT(70, 14, 128, 2, 2, num_registers=0).state_dict()
    del state["register_tokens"]
    for key, value in state.items():
        state[key] = 0.2 * torch.randn(value.shape, generator=generator)
    return state


# ---- command

def test_command_equals_naive_metrics_of_its_pixels(tmp_path):
    real = images(40, 1, seed=1, high=230)    # 3 dimensions
    fake = images(30, 1, seed=2, low=70)
    save_folder(tmp_path / "real", real)
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    command = [sys.executable, str(SCRIPT), "fake.npz", "real", "--json", "out.json"]
    command += ["--features", "pixels", "--batch-size", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
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
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["fake.npz", "out.json", "real"]    # no temporary file


def test_command_ends_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_fid.py", "nowhere", "real"])
    with pytest.raises(SystemExit, match="^eval_fid.py: cannot read nowhere: "):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_command_takes_statistics_and_images_of_a_file_as_adm_has_it(tmp_path, inception):
    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    mu = np.arange(2048) / 2048
    arr_0 = images(12, 16)
    np.savez(tmp_path / "fake.npz", arr_0=arr_0)
    np.savez(tmp_path / "adm.npz", arr_0=arr_0, mu=mu, sigma=np.eye(2048))
    flags = ["--weights", tmp_path / "weights.pth", "--batch-size", 5, "--resize", "pytorch"]
    out = run(tmp_path, tmp_path / "fake.npz", tmp_path / "adm.npz", *flags)
    assert (out["features"], out["resize"]) == ("inception", "pytorch")
    assert (out["n_samples"], out["n_reference"]) == (12, None)

    features, logits = inception(torch.from_numpy(arr_0).permute(0, 3, 1, 2), "pytorch")
    features = features.double().numpy()
    mean = features.mean(0)
    roots = np.linalg.svd(features - mean, compute_uv=False) / 11 ** 0.5    # of Σ's eigenvalues
    traces = np.square(roots).sum() + 2048 - 2 * roots.sum()                # the reference's is I
    closed_form = np.square(mean - mu).sum() + traces
    assert out["frechet_distance"] == pytest.approx(closed_form, rel=1e-6)
    assert (out["precision"], out["recall"]) == (1, 1)                      # the same images
    score, std = ev.inception_score(logits)
    assert out["inception_score"] == pytest.approx(score, rel=1e-6)
    assert out["inception_score_std"] == pytest.approx(std, rel=1e-4)
    order = np.random.RandomState(2020).permutation(12)                     # torch-fidelity's
    score, _ = ev.inception_score(logits[order])
    assert out["inception_score_shuffled"] == pytest.approx(score, rel=1e-6)


def test_command_equals_naive_dinov2_and_leaves_statistics_of_inception(tmp_path, monkeypatch):
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
    assert len(out["warnings"]) == 4    # two are singular, few samples, sizes differ


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
    with pytest.raises(ValueError, match="differ in size: pass --size"):
        list(ev.read_images(tmp_path, 1))
    (batch,) = ev.read_images(tmp_path, 8, size=16)
    assert batch.shape == (3, 3, 16, 16)
    grey = Image.open(tmp_path / "b.bmp").resize((51, 16), Image.BICUBIC)
    middle = np.asarray(grey.crop((17, 0, 33, 16)))
    assert np.array_equal(batch[1, 0].numpy(), middle)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of good.npz and of much that is not."""
    folder = tmp_path_factory.mktemp("bad")
    x = images(12)
    np.savez(folder / "good", arr_0=x)
    np.savez(folder / "floats", arr_0=x / 255)
    np.savez(folder / "fortran", arr_0=np.asfortranarray(x))
    np.savez(folder / "small", arr_0=x[:, :4])
    np.savez(folder / "big", arr_0=images(12, 70))
    np.savez(folder / "neither", labels=x)
    np.savez(folder / "five", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(folder / "six", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(folder / "five_six", mu=np.zeros(5), sigma=np.eye(6))
    np.savez(folder / "nan", mu=np.zeros(5), sigma=np.full((5, 5), np.nan))
    np.savez(folder / "half", mu=np.zeros(5))
    data = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(data[:600])
    (folder / "damaged.npz").write_bytes(data[:400] + bytes(2) + data[402:])
    (folder / "text.npz").write_text("not a zip")
    (folder / "empty").mkdir()
    save_folder(folder / "deep", [np.full((8, 8), 4000, np.uint16)])
    save_folder(folder / "broken", x)
    data = (folder / "broken/0/0000.png").read_bytes()
    (folder / "broken/1/0001.png").write_bytes(data[:60])
    (folder / "text.pth").write_text("not a checkpoint")
    torch.save({"fc.weight": torch.zeros(3)}, folder / "other.pth")
    torch.save(functools.partial(print), folder / "code.pth")
    return folder


def refuses(words, *flags):
    """The command says so in one sentence and writes nothing."""
    folder = flags[0].parent
    with pytest.raises(ValueError, match=words) as caught:
        run(folder, *flags)
    assert "\n" not in str(caught.value)
    assert not (folder / "out.json").exists()


@pytest.mark.parametrize("name, words", [
    ("absent", "cannot read .*absent"),
    ("empty", "holds 0 images"),
    ("broken", "cannot read .*0001.png"),
    ("deep", "cannot read .*0000.png: images of 8 bits"),
    ("cut.npz", "cannot read .*cut.npz"),
    ("damaged.npz", "cannot read .*damaged.npz: .*CRC"),
    ("text.npz", "cannot read .*text.npz"),
    ("floats.npz", "cannot read .*floats.npz: .*float64"),
    ("fortran.npz", "cannot read .*fortran.npz: .*C-ordered"),
    ("neither.npz", "cannot read .*neither.npz: .*neither images .arr_0. nor statistics"),
    ("small.npz", "same dimensions: 192 and 96"),
    ("big.npz", "pass --size 64"),
    ("five.npz", "five.npz holds Inception's statistics alone, none of pixels"),
])
def test_bad_images_end_in_one_sentence(bad, name, words):
    refuses(words, bad / "good.npz", bad / name, "--features", "pixels")


@pytest.mark.parametrize("name, words", [
    ("six.npz", "same dimensions: 5 and 6"),
    ("five_six.npz", r"mu \[5\] and sigma \[6, 6\]"),
    ("nan.npz", "NaN"),
    ("half.npz", "cannot read .*half.npz: .*sigma"),
])
def test_bad_statistics_end_in_one_sentence(bad, name, words):
    refuses(words, bad / "five.npz", bad / name)


@pytest.mark.parametrize("name, words", [
    ("none.pth", "cannot read .*none.pth: .*No such file"),
    ("text.pth", "cannot read .*text.pth"),
    ("code.pth", "cannot read .*code.pth: Weights only"),
    ("other.pth", "cannot read .*other.pth: .*loading state_dict"),
])
def test_bad_weights_end_in_one_sentence(bad, name, words):
    refuses(words, bad / "good.npz", bad / "good.npz", "--weights", bad / name)


def test_weights_that_cannot_be_fetched_are_asked_for(bad, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))    # an empty cache, and no network:
    monkeypatch.setitem(ev.WEIGHTS, "inception", (tmp_path / "none.pth").as_uri())
    words = "cannot read file://.* pass it with --weights"
    refuses(words, bad / "good.npz", bad / "good.npz")


@pytest.mark.parametrize("flags", [
    ["--featurs", "pixels"], ["--batch-size", "0"], ["--size", "x"], ["--size", "0"],
    ["--device", "abacus"], ["--json", "no/such/folder.json"]])
def test_wrong_flags_are_named(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        ev.main(["a.npz", "b.npz", *flags])
    assert flags[-1] in capsys.readouterr().err
