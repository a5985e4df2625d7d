"""A rehearsal of ImageNet on a CPU: the released files' formats, folders of images, processes.

Tiny random weights under the released files' own keys (as in golden/rae.pt), generated PNGs and
JPEGs, and the commands of the README's section on ImageNet-256.
"""
import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder

import drift_rae as dr
import eval_fid
from conftest import (SCRIPT, assert_same_run, difference, interrupted, names, run, sentence,
                      steps_saved, table, wait_until)

DECODER = "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
ENCODER = "dinov2_vitb14_reg4_pretrain.pth"
STATISTICS = "stats/dinov2/wReg_base/imagenet1k/stat.pt"
TEACHER = "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"
TINY_VIT = (98, 14, 32, 3, 4)       # that of golden/rae.pt, in place of ViT-B/14
TINY = "--n-class 2 --n-pos 6 --n-neg 3 --n-extra-neg 3 --workers 1 --batch-size 4".split()
CLASSES = 3
STEPS = 30
LAUNCHER = """
import sys
sys.path.insert(0, {folder!r})
import drift_rae
drift_rae.released_rae.__defaults__ = ({vit},)
if __name__ == "__main__":
    drift_rae.command(drift_rae.main)
"""


@pytest.fixture(scope="module", autouse=True)
def tiny_vit():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dr.released_rae, "__defaults__", (TINY_VIT,))
        yield


@pytest.fixture
def launch(start, tmp_path):
    """As `start`, with the tiny encoder."""
    path = tmp_path / "launcher.py"
    path.write_text(LAUNCHER.format(folder=str(SCRIPT.parent), vit=TINY_VIT))
    return partial(start, script=path)


def save_images(folder, seed):
    """Seven noisy images of several sizes, modes and formats."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(7):
        shape = (20 + 9 * i, 60 - 5 * seed, 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        mode = ["RGB", "L", "CMYK"][i % 3]
        ending = "JPEG" if i % 3 else "png"
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{ending}")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folder with models/ and train/ as the README's download commands leave them, but tiny."""
    root = tmp_path_factory.mktemp("released ä")
    golden = torch.load(Path(__file__).parent / "golden" / "rae.pt", weights_only=True)
    torch.manual_seed(0)
    teacher = dr.DiTDH(4, 32, (32, 48), (2, 1), (4, 4), CLASSES)
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.1)
    contents = {DECODER: golden["decoder_state_dict"], STATISTICS: golden["stats"],
                ENCODER: golden["encoder_state_dict_native"], TEACHER: teacher.state_dict()}
    for name, content in contents.items():
        path = root / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    for c in range(CLASSES):
        save_images(root / "train" / f"n0{c}", seed=c)
    return root


def command(root, out, *more):
    """Flags of the paper's run, but small; those in `more` go before."""
    models = root / "models"
    return ["--preset", "imagenet256", "--teacher", models / TEACHER, "--models", models,
            "--data", root / "train", "--out", out, "--steps", STEPS, *TINY, *more]


@pytest.fixture(scope="module")
def whole(released, tmp_path_factory):
    """OUT of an unbroken run of one process."""
    out = tmp_path_factory.mktemp("whole")
    run(*command(released, out))
    return out


# ---- Train, sample, evaluate

def test_a_run_draws_a_row_of_each_class(whole):
    """16 pixels and a line."""
    width, height = Image.open(whole / "samples.png").size
    assert width == 8 * 17 + 1
    assert height == 3 * 17 + 1


def test_samples_are_drawn_and_evaluated(released, whole, tmp_path):
    samples, report = tmp_path / "samples.npz", tmp_path / "fid.json"
    run("--sample", 12, "--out", whole, "--models", released / "models", "--to", samples)
    drawn = np.load(samples)
    assert drawn["arr_0"].shape == (12, 16, 16, 3)
    assert drawn["arr_1"].tolist() == 4 * [0, 1, 2]
    flags = [samples, released / "train", "--json", report, "--size", 16, "--features", "pixels"]
    eval_fid.main([str(flag) for flag in flags])
    assert np.isfinite(json.loads(report.read_text())["frechet_distance"])


# ---- A break, and on

def test_ctrl_c_reaches_the_readers_and_the_run_goes_on_as_if_unbroken(
        released, whole, tmp_path, launch):
    """As a terminal sends it, to all processes; the rest is read without readers."""
    out = tmp_path / "out"
    process = launch(*command(released, out, "--save-every", 1, "--workers", 2))
    wait_until((out / "state.pt").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted; ")
    assert 0 < steps_saved(out) < STEPS
    run("--resume", "--out", out, "--workers", 0)
    assert_same_run(whole, out)


def test_sigterm_to_the_group_ends_all_processes(released, tmp_path, launch):
    """As schedulers send it: torchrun, two ranks and their readers, which hold stderr open."""
    out = tmp_path / "out"
    process = launch(*command(released, out, "--steps", 3000, "--save-every", 1), ranks=2)
    wait_until((out / "state.pt").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert steps_saved(out) > 0


# ---- Several processes

def finish(process):
    _, err = process.communicate()
    assert process.returncode == 0, err


def assert_close(a, b):
    """Two OUTs, whose gradients were summed in another order."""
    assert difference(a / "state.pt", b / "state.pt") < 1e-5
    one = np.loadtxt(table(a)[1:], delimiter=",")
    two = np.loadtxt(table(b)[1:], delimiter=",")
    assert np.allclose(one, two, rtol=1e-3)


def test_two_processes_train_as_one(released, tmp_path, launch):
    a, b = tmp_path / "a", tmp_path / "b"
    few = ["--steps", 3, "--dtype", "fp32"]
    run(*command(released, a, *few))
    finish(launch(*command(released, b, *few), ranks=2))
    assert_close(a, b)
    teacher = torch.load(released / "models" / TEACHER, weights_only=True)
    student = torch.load(a / "state.pt", weights_only=True)["student"]
    assert max((student[name] - teacher[name]).abs().max() for name in teacher) > 2e-5


def test_a_run_goes_on_with_another_number_of_processes(released, tmp_path, launch):
    """Of three classes a rank has two."""
    a, b = tmp_path / "a", tmp_path / "b"
    few = ["--steps", 4, "--dtype", "fp32", "--n-class", 3]
    run(*command(released, a, *few))
    interrupted(1, *command(released, b, *few, "--save-every", 1))
    assert steps_saved(b) == 1
    finish(launch("--resume", "--out", b, ranks=2))
    assert_close(a, b)


# ---- The released files

@pytest.mark.parametrize("form", ["raw", "ema"])
def test_teachers_of_both_released_forms_are_read(released, tmp_path, form):
    state_dict = torch.load(released / "models" / TEACHER, weights_only=True)
    contents = {"raw": state_dict, "ema": {"ema": state_dict, "model": {}}}
    torch.save(contents[form], tmp_path / "teacher.pt")
    model = dr.load_teacher(tmp_path / "teacher.pt")
    assert not model.training
    loaded = model.state_dict()
    assert loaded.keys() == state_dict.keys()
    assert all(torch.equal(loaded[name], state_dict[name]) for name in loaded)


@pytest.mark.parametrize("name", [STATISTICS, DECODER, ENCODER])
def test_released_files_that_are_missing_or_foreign_are_named(released, tmp_path, name):
    models = shutil.copytree(released / "models", tmp_path / "models")
    flags = command(released, tmp_path / "out", "--models", models)
    torch.save({"a": torch.zeros(3)}, models / name)
    assert f"cannot read {models / name}: " in sentence(*flags)
    (models / name).unlink()
    assert f"cannot read {models / name}: FileNotFoundError" in sentence(*flags)


# ---- Folders of images

@pytest.fixture
def refused(released, tmp_path):
    """refused(*flags): the sentence about a run on tmp_path/data."""
    return partial(sentence, *command(released, tmp_path / "out", "--data", tmp_path / "data"))


def test_a_folder_without_classes_is_named(refused, tmp_path):
    data = tmp_path / "data"
    assert str(data) in refused()
    data.mkdir()
    assert str(data) in refused()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_folder_must_hold_the_classes(refused, released, tmp_path, count):
    for c in range(count):
        shutil.copytree(released / "train" / "n00", tmp_path / "data" / f"n0{c}")
    assert "data must hold 3 folders, one per class of the teacher, or some named by" in refused()


@pytest.mark.parametrize("classes", [(1, 2, 3), (0, 3)])
def test_folders_that_are_numbers_must_be_classes(refused, released, tmp_path, classes):
    for c in classes:
        shutil.copytree(released / "train" / "n00", tmp_path / "data" / str(c))
    assert "data must hold 3 folders" in refused()


# ---- A few of the classes

@pytest.fixture(scope="module")
def few(released, tmp_path_factory):
    """OUT of a run on the classes 0 and 2, whose folders are their numbers."""
    root = tmp_path_factory.mktemp("few")
    for c, name in enumerate(["n00", "n01", "n02"]):
        if c != 1:
            shutil.copytree(released / "train" / name, root / "data" / str(c))
    run(*command(released, root / "out", "--data", root / "data", "--n-class", 2))
    return root / "out"


def test_a_few_classes_are_drawn_by_their_numbers(few, released):
    saved = torch.load(few / "student.pt", weights_only=True)
    assert saved["classes"] == [0, 2]
    width, height = Image.open(few / "samples.png").size
    assert height == 2 * 17 + 1


def test_positives_of_a_few_classes_have_the_numbers_of_their_folders(few, released, monkeypatch):
    data = Mock(side_effect=ValueError("seen"))
    monkeypatch.setattr(dr, "distil", data)
    flags = command(released, few.parent / "o", "--data", few.parent / "data", "--n-class", 2)
    with pytest.raises(ValueError, match="seen"):
        run(*flags)
    positives = data.call_args.args[1]
    for (path, _), label in zip(positives.source.samples, positives.labels, strict=True):
        assert Path(path).parent.name == str(label)
    assert positives.classes == [0, 2]


def test_samples_are_of_the_classes_that_were_distilled(few, released, tmp_path):
    flags = ["--out", few, "--models", released / "models", "--to", tmp_path / "x.npz"]
    run(*flags, "--sample", 4)
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [0, 2, 0, 2]
    assert "was distilled on [0, 2]" in sentence(*flags, "--sample", 4, "--classes", "1")


def readme_scripts():
    """The two that README's section on ten classes gives to python."""
    text = (SCRIPT.parent / "README.md").read_text()
    return re.findall(r"python - <<'?END'?\n(.*?)END", text, re.DOTALL)


def test_readme_names_the_folders_of_imagenette_by_their_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "Imagenette", Mock())
    wordnet = "01440764 02102040 02979186 03000684 03028079 03394916 03417042 03425413 03445777"
    for name in [*wordnet.split(), "03888257"]:
        (tmp_path / "imagenette2" / "train" / f"n{name}").mkdir(parents=True)
        (tmp_path / "imagenette2" / "train" / f"n{name}" / name).touch()
    exec(readme_scripts()[0], {})
    train = tmp_path / "imagenette2" / "train"
    assert names(train / "217") == {"02102040"}              # English springer
    assert names(train / "701") == {"03888257"}              # parachute
    assert len(names(train)) == 10


def test_readme_draws_the_teacher_in_50_points(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = readme_scripts()[1]
    models = str(released / "models")
    small = {"$T": f"{models}/{TEACHER}", ".repeat(500)": ".repeat(2)",
             "[0, 217, 482, 491, 497, 566, 569, 571, 574, 701]": "[0, 2]",
             'device="cuda", dtype="bf16"': f'device="cpu", models="{models}"'}
    for text, replacement in small.items():
        assert script.count(text) == 1
        script = script.replace(text, replacement)
    exec(script, {})
    drawn = np.load("teacher.npz")
    assert drawn["arr_0"].shape == (4, 16, 16, 3)
    assert drawn["arr_1"].tolist() == [0, 2, 0, 2]


def test_a_step_takes_no_more_classes_than_have_images(few, released, tmp_path):
    flags = command(released, tmp_path, "--data", few.parent / "data", "--n-class", 3)
    assert "--n-class 3 <= classes of the images 2" in sentence(*flags)


def test_a_class_without_images_is_named(refused, released, tmp_path):
    data = shutil.copytree(released / "train", tmp_path / "data")
    (data / "empty").mkdir()
    assert "empty" in refused()


@pytest.mark.parametrize("bad", ["n00/1.JPEG", "n01/3.png"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_run_and_is_named(refused, released, tmp_path, bad, workers):
    path = shutil.copytree(released / "train", tmp_path / "data") / bad
    path.write_bytes(path.read_bytes()[:300])
    said = refused("--n-pos", 7, "--workers", workers)
    assert f"{path} cannot be read, mend or remove it: " in said


def test_readers_do_not_outlive_an_unreadable_image(released, tmp_path, launch):
    path = shutil.copytree(released / "train", tmp_path / "data") / "n01/3.png"
    path.write_bytes(b"")
    flags = ["--data", tmp_path / "data", "--n-pos", 7, "--workers", 2]
    process = launch(*command(released, tmp_path / "out", *flags))
    _, err = process.communicate(timeout=120)       # until all have closed stderr
    assert process.returncode == 1
    assert "Traceback" not in err
    assert f"{path} cannot be read" in err.splitlines()[-1]


def test_images_are_cropped_to_the_middle(tmp_path):
    pixels = np.zeros((40, 100), np.uint8)
    pixels[:, 50:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = dr.read_image(tmp_path / "a.png", 8)
    assert image.shape == (8, 8, 3)
    assert image[:, :3].max() == 0
    assert image[:, 5:].min() == 255


def test_small_images_are_enlarged():
    assert dr.center_crop(Image.new("RGB", (5, 9)), 8).size == (8, 8)


# ---- Positives

@pytest.fixture(scope="module")
def folder(released):
    """The training images, 16 × 16."""
    return ImageFolder(str(released / "train"), loader=partial(dr.read_image, size=16))


def positives(folder, **flags):
    labels = np.array(folder.targets)
    cfg = dr.Config(device="cpu", n_class=CLASSES, steps=4, **flags)
    return dr.Positives(folder, labels, cfg)


def identify(image, folder):
    """-> (index of the image, whether it is mirrored)."""
    for i, (original, _) in enumerate(folder):
        if torch.equal(image, original):
            return i, False
        if torch.equal(image, original.flip(1)):
            return i, True
    raise AssertionError("none of the training images")


def drawn(folder, **flags):
    """Per class and step: (class, index, whether mirrored) of each positive."""
    data = positives(folder, **flags)
    rows = []
    for step in range(4):
        for c in range(CLASSES):
            label, images = data[step, c]
            assert label == c
            rows.append([(c, *identify(image, folder)) for image in images])
    return np.array(rows)           # [12,n_pos,3]


@pytest.mark.parametrize("n_pos", [5, 9])
def test_positives_are_of_the_class_asked_for(folder, n_pos):
    """Of 7 images 9 are drawn with replacement, 5 without."""
    rows = drawn(folder, n_pos=n_pos)
    classes, indices = rows[..., 0], rows[..., 1]
    assert rows.shape == (12, n_pos, 3)
    assert np.array_equal(np.array(folder.targets)[indices], classes)
    assert len(np.unique(indices)) > 15             # of 21
    if n_pos == 5:
        assert all(len(set(row)) == 5 for row in indices)


def test_half_of_the_positives_are_mirrored(folder):
    plain = drawn(folder, n_pos=5)
    mirrored = drawn(folder, n_pos=5, flip=True)
    assert plain[..., 2].sum() == 0
    assert 15 < mirrored[..., 2].sum() < 45         # of 60
    assert np.array_equal(plain[..., :2], mirrored[..., :2])


def test_positives_in_memory_are_those_of_the_folder(folder):
    data = positives(folder, n_pos=5)
    rows = drawn(folder, n_pos=5)
    latents = dr.Positives(torch.arange(21), data.labels, data.cfg)
    _, chosen = latents[3, 1]
    assert chosen.tolist() == rows[3 * CLASSES + 1, :, 1].tolist()


def read(folder, workers):
    """The classes and positives of four steps; the latents are the images."""
    data = positives(folder, n_pos=5, flip=True, workers=workers)
    rae = SimpleNamespace(encode=torch.clone)
    classes, latents = [], []
    for step, batch in dr.batches(data, 0, data.cfg, rae):
        for c, x in batch:
            classes.append((step, c))
            latents.append(x)
    return classes, latents


def test_readers_change_nothing(folder):
    classes, images = read(folder, workers=0)
    same_classes, same_images = read(folder, workers=2)
    assert len(classes) == 4 * CLASSES
    assert classes == same_classes
    assert torch.equal(torch.stack(images), torch.stack(same_images))


def test_what_is_read_are_the_positives_as_pixels(folder):
    data = positives(folder, n_pos=5, flip=True)
    classes, latents = read(folder, workers=0)
    for item, x in zip(classes, latents):
        _, images = data[item]
        assert torch.equal(x, images.permute(0, 3, 1, 2) / 255)
