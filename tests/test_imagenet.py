"""A rehearsal of ImageNet on a CPU: the released files' formats, folders of images, several processes.

Tiny random weights under the released files' own keys (as in golden/rae.pt), generated PNGs and JPEGs,
and the commands of the README's section on ImageNet-256.
"""
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import drift_rae as dr
import eval_fid
from conftest import run, same, sentence, table, wait_until, weights

DECODER = "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
ENCODER = "dinov2_vitb14_reg4_pretrain.pth"
STATISTICS = "stats/dinov2/wReg_base/imagenet1k/stat.pt"
TEACHER = "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"
TINY = "--n-class 2 --n-pos 6 --n-neg 3 --n-extra-neg 3 --workers 1 --batch-size 4".split()
CLASSES, PER_CLASS = 3, 7


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folder with models/ and train/ as the README's download commands leave them, but tiny."""
    root = tmp_path_factory.mktemp("released ä")
    golden = torch.load(Path(__file__).parent / "golden" / "rae.pt", weights_only=True)
    torch.manual_seed(0)
    teacher = dr.DiTDH(4, 32, (32, 48), (2, 1), (4, 4), CLASSES)
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.1)
    for name, content in {DECODER: golden["decoder_state_dict"], ENCODER: golden["encoder_state_dict_native"],
                          STATISTICS: golden["stats"], TEACHER: teacher.state_dict()}.items():
        (root / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, root / "models" / name)
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        (root / "train" / f"n0{c}").mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = rng.integers(0, 256, (20 + 9 * i, 60 - 5 * c, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(("RGB", "L", "CMYK")[i % 3])
            image.save(root / "train" / f"n0{c}" / f"{i}{'.JPEG' if i % 3 else '.png'}")
    return root


def command(root, out, steps, *more):
    return ["--preset", "imagenet256", "--teacher", root / "models" / TEACHER, "--models", root / "models",
            "--data", root / "train", "--out", out, "--steps", steps, *TINY, *more]


def test_rehearsal_train_kill_resume_sample_evaluate(released, tmp_path, start):
    whole, out, samples, fid = (tmp_path / name for name in ("whole", "out", "samples.npz", "fid.json"))
    run(*command(released, whole, 60))
    process = start(*command(released, out, 60, "--save-every", 1))
    wait_until((out / "state.pt").exists, process)
    process.kill()
    process.wait()
    assert 0 < torch.load(out / "state.pt", weights_only=True)["step"] < 60
    run("--resume", "--out", out, "--workers", 0)
    assert all(same(whole / name, out / name) for name in ("state.pt", "student.pt"))
    assert table(whole / "log.csv") == table(out / "log.csv")
    assert Image.open(out / "samples.png").size == (8 * 17 + 1, 3 * 17 + 1)
    run("--sample", 12, "--out", out, "--models", released / "models", "--to", samples, "--batch-size", 5)
    drawn = np.load(samples)
    assert drawn["arr_0"].shape == (12, 16, 16, 3) and np.bincount(drawn["arr_1"]).tolist() == [4, 4, 4]
    flags = samples, released / "train", "--json", fid, "--size", 16, "--features", "pixels"
    eval_fid.main([str(flag) for flag in flags])
    assert np.isfinite(json.loads(fid.read_text())["frechet_distance"])


def test_teachers_of_every_released_form(released, tmp_path):
    sd, path = torch.load(released / "models" / TEACHER, weights_only=True), tmp_path / "teacher.pt"
    torch.save({"ema": sd, "model": {}}, path)
    for prefix in (None, "", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        if prefix is not None:
            torch.save({prefix + key: value for key, value in sd.items()}, path)
        model = dr.load_teacher(path)
        assert model.state_dict().keys() == sd.keys() and not model.training
        assert all(torch.equal(value, sd[key]) for key, value in model.state_dict().items())


def test_released_files_that_are_missing_or_foreign_are_named(released, tmp_path):
    models = shutil.copytree(released / "models", tmp_path / "models")
    for name in (STATISTICS, DECODER, ENCODER):
        torch.save({"a": torch.zeros(3)}, models / name)
        flags = command(released, tmp_path / "out", 3, "--models", models)
        assert f"{models / name} is damaged or not what belongs there" in sentence(*flags)
        (models / name).unlink()
        assert str(models / name) in sentence(*flags)


def test_folders_that_do_not_hold_the_classes_are_refused(released, tmp_path):
    data = tmp_path / "data"
    says = lambda: sentence(*command(released, tmp_path / "out", 3, "--data", data))
    assert str(data) in says()
    data.mkdir()
    assert str(data) in says()
    for name, count in (("n00", 1), ("n01", 2), ("n02", 3), ("n03", 4)):
        shutil.copytree(released / "train" / "n00", data / name)
        assert count == 3 or f"classes of the teacher 3 = classes of images {count}" in says()
    (data / "empty").mkdir()
    assert "empty" in says()


def test_positives_are_of_the_class_asked_for_and_mirrored_half_of_the_time(released):
    pairs = [(step, c) for step in range(4) for c in range(CLASSES)]
    source = ImageFolder(str(released / "train"), loader=partial(dr.read_image, size=16))
    images, labels = np.stack([image.numpy() for image, _ in source]), np.array(source.targets)
    rae = SimpleNamespace(encode=lambda images: images)                     # latents are the images

    def drawn(n_pos=5, **flags):
        """Class, index and whether mirrored of each positive, [3,n]."""
        cfg, found = dr.Config(device="cpu", n_pos=n_pos, **flags), []
        for (_, c), batch in zip(pairs, dr.positives(source, labels, pairs, cfg, rae), strict=True):
            for x in (batch.permute(0, 2, 3, 1) * 255).round().byte().numpy():
                found += [(c, i, mirrored) for i in range(len(images)) for mirrored in (0, 1)
                          if (x == images[i, :, ::1 - 2 * mirrored]).all()]
        assert len(found) == n_pos * len(pairs)
        return np.array(found).T
    classes, indices, mirrored = drawn(workers=2, flip=True)
    assert (drawn(workers=0, flip=True) == (classes, indices, mirrored)).all()
    assert (labels[indices] == classes).all() and 15 < mirrored.sum() < 45  # of 60
    assert all(len(set(row)) == 5 for row in indices.reshape(-1, 5))        # without replacement
    assert (drawn(workers=0) == (classes, indices, 0 * mirrored)).all()
    classes, small, _ = drawn(9, workers=0)                                 # of 7 images, with replacement
    assert (labels[small] == classes).all() and len(set(small)) > 15
    digits = dr.positives(torch.arange(21), labels, pairs, dr.Config(device="cpu", n_pos=5))
    assert torch.cat([*digits]).tolist() == indices.tolist()                # whose latents are in memory


def test_images_are_cropped_to_the_middle(tmp_path):
    Image.fromarray(np.tile(np.arange(100) // 50 * 255, (40, 1)).astype(np.uint8)).save(tmp_path / "a.png")
    image = dr.read_image(tmp_path / "a.png", 8)
    assert image.shape == (8, 8, 3) and image[:, :3].max() == 0 and image[:, 5:].min() == 255
    assert dr.center_crop(Image.new("RGB", (5, 9)), 8).size == (8, 8)


@pytest.mark.parametrize("bad,workers", [("n00/1.JPEG", 0), ("n01/3.png", 2)])
def test_an_unreadable_image_stops_the_run_and_is_named(released, tmp_path, start, bad, workers):
    data = shutil.copytree(released / "train", tmp_path / "train")
    (data / bad).write_bytes((data / bad).read_bytes()[:300])
    flags = command(released, tmp_path / "out", 30, "--data", data, "--n-pos", 7, "--workers", workers)
    assert f"{data / bad} cannot be read, mend or remove it: " in sentence(*flags)
    if workers:     # they must not keep the process alive
        process = start(*flags)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1 and str(data / bad) in err.splitlines()[-1] and "Traceback" not in err


def together(process):
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_one_and_two_processes_train_and_sample_alike(released, tmp_path, start):
    """Three classes: one rank has two of them. Two classes: one each."""
    for n in (2, 3):
        a, b = ([*command(released, tmp_path / name, 3), "--dtype", "fp32", "--n-class", n] for name in "ab")
        run(*a)
        together(start(*b, ranks=2))
        one, two = (weights(tmp_path / name / "state.pt") for name in "ab")
        assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-5
        one, two = (np.loadtxt(table(tmp_path / name / "log.csv")[1:], delimiter=",") for name in "ab")
        assert len(one) == 3 and np.allclose(one, two, rtol=1e-3)
    teacher, student = (torch.load(path, weights_only=True) for path in (a[3], tmp_path / "a" / "state.pt"))
    assert max((student["student"][k] - v).abs().max() for k, v in teacher.items()) > 2e-5     # it did move
    models = released / "models"
    sample = "--out", tmp_path / "a", "--models", models, "--sample", 11, "--batch-size", 2, "--to"
    run(*sample, tmp_path / "a.npz")
    together(start(*sample, tmp_path / "b.npz", ranks=2))
    one, two = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and (one["arr_1"] == two["arr_1"]).all()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "a.npz", "b.npz"}


def test_sigterm_to_the_whole_group_saves_the_step(released, tmp_path, start):
    """As schedulers and torchrun send it: to both ranks and to their readers, which must outlive the step."""
    process = start(*command(released, tmp_path, 100_000, "--save-every", 1), ranks=2, start_new_session=True)
    wait_until((tmp_path / "state.pt").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert process.returncode and f"step {saved['step']} is saved, go on with --resume" in err
    assert saved["step"] == len(saved["log"]) > 1 and len(table(tmp_path / "log.csv")) == saved["step"] + 1
