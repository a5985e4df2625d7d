"""Files as people have them: teachers, released files, folders of images; and all refusals."""
import io
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drift_rae as dr
from helpers import (DECODER, ENCODER, SCRIPT, STATISTICS, TEACHER, distance, names, read, refusal,
                     run, tiny_network)
from toy import digits

pytestmark = pytest.mark.usefixtures("tiny_sizes")
FEW = ["--steps", 2]
PICTURE = Image.new("RGB", (20, 20))
DEEP, FLOAT = Image.new("I;16", (20, 20)), Image.new("F", (20, 20))


def write(path, content):
    """None makes a folder, bytes and images a file; all else is a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Image.Image):
        content.save(path)
    else:
        torch.save(content, path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- What is refused. A row: flags, what the sentence must name, files. The content of a file
# may be a function of the content of the tiny teacher.

def with_tensor(part, key, value):
    return lambda saved: saved | {part: saved[part] | {key: value}}


def without(part, key):
    return lambda saved: saved | {part: {k: x for k, x in saved[part].items() if k != key}}


def cut(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()[:5000]


def student(saved):
    return {"ema": saved["ema"], "rae": saved["rae"], "classes": list(range(10))}


def pictures(*classes, **more):
    return {f"data/{name}/a.png": PICTURE for name in classes} | more


NUMBERS = """steps 0; steps many; n-class 0; n-pos 0; n-pos 2.5; n-neg 1; n-extra-neg -1;
temperatures 0; temperatures 0.1 -0.1; temperatures nan; temperatures inf; windows 0; windows 1 3;
lr -1; lr nan; lr inf; lr high; lr-final -0.1; weight-decay -1; weight-decay nan; clip -1; clip nan;
ema 0.4; ema 1.1; ema-warmup 0; save-every 0; seed -1; workers -1; batch-size 0; sample -1;
guidance nan; betas 1.5 0.9; betas 0.9; unknown; preset no; field no; device no; dtype no;
n-class 11; device cuda; device mps; sample 4; to a.npz"""
SAMPLE = "--sample 4 --to {tmp}/x.npz"
RESUME = "--resume --out {tmp}/out"
NORM = "blocks.0.norm1.weight"
TEACHERS = [                                                 # content of bad.pt, what is named
    (b"", "damaged"), (b"hello", "damaged"), ([1], "list"), (None, "irectory"),
    ({"ema": 3}, "int"), ({"w": torch.zeros(3)}, "s_embedder.proj.weight"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "LFS"),
    (b"<!DOCTYPE html><html>", "web page"), (b"\n<HTML>404", "web page"),
    (lambda saved: saved | {"args": Namespace(lr=1)}, "argparse.Namespace"),
    ({"ema": sys.exit}, "sys.exit"),
    (with_tensor("ema", NORM, torch.ones(5)), NORM), (without("ema", NORM), NORM),
    (with_tensor("ema", "foreign.weight", torch.ones(5)), "foreign.weight"),
    (without("ema", "final_layer.linear.bias"), "final_layer.linear.bias"),
    (with_tensor("ema", "final_layer.linear.bias", torch.full([64], torch.nan)),
     "final_layer.linear.bias"),
    (with_tensor("ema", NORM, torch.full([32], torch.inf)), NORM),
    ({"ema": {"decay": 0.9, "shadow_params": [torch.ones(2)]}}, "diffusers"),
    (without("rae", "mean"), "mean"), (without("rae", "decoder"), "decoder"),
    (lambda saved: saved | {"ema": tiny_network(channels=7).state_dict()}, "[7, 2, 2]"),
    (lambda saved: {k: x for k, x in saved.items() if k != "latents"}, "--data")]

REFUSALS = [
    *((f"--{number}", number.split()[0], {}) for number in re.split(r";\s+", NUMBERS)),
    *((f"{flags} --out {{tmp}}/file/out --teacher {{tmp}}/none.pt", "file/out", {"file": b""})
      for flags in ("", SAMPLE.replace("x.npz", "file/out/x.npz"))),
    ("--out /proc/out", "/proc/out", {}),
    # Sampling
    ("--sample 4 --to a.jpg", "--to", {}),
    ("--sample 4 --to {tmp}/folder.npz", "folder.npz", {"folder.npz": None}),
    (SAMPLE, "out/student.pt", {}),
    *((f"{SAMPLE} {flags}", named, {"out/student.pt": student}) for flags, named in [
        ("--classes 1,12", "--classes"), ("--classes=-1", "--classes"),
        ("--classes one", "--classes"), ("--classes 1,", "--classes"),
        (f"--classes {10**20}", "--classes"),
        ("--classes 3,7 --sample 5", "a multiple of 2"), ("--sample 23", "a multiple of 10"),
        ("--classes 3,7 --sample 5 --to {tmp}/x.png", "a multiple of 2")]),
    # Resuming
    (RESUME, "state.pt", {}), (f"{RESUME} --lr 0.5", "lr", {}), (f"{RESUME} --seed 1", "seed", {}),
    (f"{RESUME} --preset imagenet256", "preset", {}),
    *((flags, "state.pt", {"out/state.pt": content})
      for flags in ("", RESUME) for content in (b"", b"PK\3\4", cut)),
    ("", "/out |3 steps", {"out/state.pt": {"config": {"steps": 9}, "log": [{}] * 6}}),
    (RESUME, "state.pt|student", {"out/state.pt": {"config": {}, "log": []}}),
    (RESUME, "state.pt|shift", {"out/state.pt": dict(
        config={"shift": 3}, log=[], student={}, ema={}, optimizer={})}),
    (SAMPLE, "student.pt|classes", {
        "out/student.pt": lambda saved: {key: saved[key] for key in ("ema", "rae")}}),
    # Teachers
    ("--teacher {tmp}/none.pt", "none.pt|No such file", {}),
    ("--teacher {tmp}/bad.safetensors", "bad.safetensors|safetensors files", {
        "bad.safetensors": b"\x40\0\0\0\0\0\0\0{}"}),
    *(("--teacher {tmp}/bad.pt", f"bad.pt|{named}", {"bad.pt": content})
      for content, named in TEACHERS),
    ("--teacher {tmp}/bad.pt --models {tmp}", f"{ENCODER}|No such file", {
        "bad.pt": lambda saved: saved["ema"]}),
    ("--teacher {tmp}/bad.pt", "bad.pt|damaged", {"bad.pt": cut}),
    ("--teacher {tmp}/bad.pt", "bad.pt", {"bad.pt": {"ema": {0: torch.ones(2)}}}),
    ("--teacher {tmp}/bad.pt", "bad.pt|encoder_args", {"bad.pt": without("rae", "encoder_args")}),
    # Folders of images
    *(("--data {tmp}/data", named, files) for named, files in [
        ("data", {}), ("data", {"data": None}), ("data", {"data/a.png": PICTURE}),
        ("data", {"data": b""}),
        ("goldfish", pictures("tench", "goldfish", "shark")), ("cat", pictures("0", "1", "cat")),
        ("270", pictures("0", "270")), ("3", pictures("1", "2", "3")),
        ("n00000001", pictures("n00000001", "n00000002")),
        ("n00000001", pictures("n00000001", "n00000002", "n00000003", "n00000004")),
        ("n00000001", pictures("0", "1", "n00000001")),
        ("classes 2", pictures("0", "1") | {"data/2": None}),
        ("classes 2", pictures("0", "1") | {"data/2/._a.png": PICTURE, "data/2/a.gif": PICTURE})]),
    ("--data {tmp}/data --n-class 3", "--n-class", pictures("0", "2")),
    *((f"--data {{tmp}}/data --n-class 1 --workers {workers}", name, {f"data/{name}": content})
      for workers in (0, 1) for name, content in [
          ("0/a.png", b""), ("0/a.JPEG", b"\xff\xd8\xff\xe0 cut"), ("0/a.png", DEEP),
          ("0/a.tiff", FLOAT)]),
    ("--data {tmp}/data", "val", pictures("n00000001", "n00000002", "n00000003", "val")),
    ("--data {tmp}/data", "data", {"data/.ipynb_checkpoints/a.png": PICTURE}),
]


@pytest.mark.parametrize("flags,fragments,files", REFUSALS)
def test_what_cannot_work_is_refused_by_name(
        flags, fragments, files, commands, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name, content in files.items():
        write(tmp_path / name, content(read(teacher)) if callable(content) else content)
    before = contents(tmp_path)
    given = [word.format(tmp=tmp_path) for word in flags.split()]
    if "--resume" not in given:
        kind = "images" if "--data" in given else "digits"
        given = [*commands[kind], *FEW, "--out", tmp_path / "out", *given]
    said = refusal(*given)
    for fragment in fragments.split("|"):
        assert fragment in said.replace("_", "-") or fragment in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [STATISTICS, DECODER, ENCODER])
def test_released_files_that_are_missing_or_foreign_are_named(commands, released, tmp_path, name):
    models = shutil.copytree(released / "models", tmp_path / "models")
    flags = [*commands["images"], "--models", models, "--out", tmp_path / "out"]
    torch.save({"a": torch.zeros(3)}, models / name)
    assert str(models / name) in refusal(*flags)
    (models / name).unlink()
    assert f"{models / name}: No such file" in refusal(*flags)


def test_readers_do_not_outlive_an_unreadable_image(commands, released, tmp_path, launch):
    path = shutil.copytree(released / "train", tmp_path / "data") / "1" / "3.png"
    path.write_bytes(path.read_bytes()[:300])
    flags = ["--data", tmp_path / "data", "--n-pos", 7, "--workers", 2, "--out", tmp_path / "out"]
    process = launch(*commands["images"], *flags)
    _, err = process.communicate(timeout=120)                # until all have closed stderr
    assert process.returncode == 1
    assert "Traceback" not in err
    assert str(path) in err.splitlines()[-1]


# ---- Teachers that are read

def prefixed(prefix):
    return lambda sd: {prefix + key: x for key, x in sd.items()}


@pytest.mark.parametrize("form", [
    lambda sd: sd, lambda sd: {"ema": sd, "model": {}}, lambda sd: {"model": sd},
    prefixed("module."), prefixed("_orig_mod."), prefixed("module._orig_mod."),
    lambda sd: {"ema": prefixed("_orig_mod.module.")(sd)},
    lambda sd: {key: x.bfloat16() for key, x in sd.items()},
    lambda sd: {key: x.half() for key, x in sd.items()}])
@pytest.mark.parametrize("zipped", [True, False])
def test_teachers_are_read_in_the_forms_that_people_have(released, tmp_path, form, zipped):
    """Coarse weights become float32, and a file may be of the kind before torch 1.6."""
    weights = read(released / "models" / TEACHER)
    content = form(weights)
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    model = dr.load_teacher(tmp_path / "a.pt")
    assert not model.training
    dtype = next(iter(content.values())).dtype if "pos_embed" in content else torch.float32
    rounded = {key: x.to(dtype).float() for key, x in weights.items()}
    loaded = model.state_dict()
    assert all(x.dtype == torch.float32 for x in loaded.values())
    assert distance(loaded, rounded) == 0


def test_a_mean_that_is_missing_is_zero(commands, released, tmp_path):
    """The released stat.pt holds None."""
    models = shutil.copytree(released / "models", tmp_path / "models")
    var = read(models / STATISTICS)["var"]
    students = []
    for mean in ({"mean": torch.zeros_like(var)}, {"mean": None}, {}):
        torch.save({"var": var} | mean, models / STATISTICS)
        run(*commands["images"], *FEW, "--workers", 0, "--models", models,
            "--out", tmp_path / "out")
        students.append(read(tmp_path / "out" / "student.pt")["ema"])
    assert distance(students[0], students[1]) == distance(students[0], students[2]) == 0


def check_digits(path):
    """The file holds latents in place of images, and all that a run needs; -> its content."""
    saved = dr.load(path)
    assert saved.keys() == {"rae", "ema", "latents", "labels", "judge", "recipe"}
    assert saved["latents"].dtype == torch.float16
    assert saved["latents"].shape[1:] == (64, 2, 2)
    rae = dr.load_autoencoder(saved, path, "")
    dr.require_same_latents(dr.read_network(saved, path), rae, path)
    return saved


def test_a_digits_teacher_holds_latents_and_its_recipe(teacher):
    saved = check_digits(teacher)
    assert saved["recipe"]["seed"] == 0
    assert saved["recipe"]["steps"] == [11, 11, 11]
    assert "--steps" in refusal("--steps", 11, 10, 11, main=digits.main)


BOX = SCRIPT.parent / "toy" / "teacher.pt"


@pytest.mark.skipif(not BOX.exists(), reason="toy/teacher.pt is not there")
def test_the_teacher_in_the_box_is_small_and_fits():
    saved = check_digits(BOX)
    assert len(saved["latents"]) == len(saved["labels"]) == 5000
    assert BOX.stat().st_size <= 10e6
    assert Path(dr.Config.teacher) == BOX


# ---- Folders that are read

def test_hidden_entries_do_not_count_and_other_files_are_named(released, tmp_path, capsys):
    """Links to folders are followed."""
    plain = shutil.copytree(released / "train" / "0", tmp_path / "elsewhere")
    data = tmp_path / "my.data"
    for label in "012":
        shutil.copytree(plain, data / label)
    shutil.rmtree(data / "1")
    (data / "1").symlink_to(plain)
    (data / "2" / "more").symlink_to(plain)
    for name in ("0/._1.JPEG", "0/.DS_Store", ".ipynb_checkpoints/a.png", ".git/0/a.png",
                 "2/.ipynb_checkpoints/1.png"):
        write(data / name, b"")
    dataset = dr.open_images(data, 3, 16)
    assert np.bincount(dataset.targets).tolist() == [7, 7, 14]
    assert len([dataset[i] for i in range(28)]) == 28
    assert capsys.readouterr().out == ""
    for name in ("0/x.gif", "2/x.jfif"):
        write(data / name, b"")
    assert len(dr.open_images(str(data) + "/", 3, 16)) == 28
    said = capsys.readouterr().out
    assert said.startswith("2 files")
    assert "0/x.gif" in said


@pytest.mark.parametrize("folders,classes", [
    (["n00000005", "n00000009", "n00000040"], [0, 1, 2]), (["0", "1", "2"], [0, 1, 2]),
    (["0", "2"], [0, 2]), (["002", "10"], [2, 10])])
def test_folders_are_numbered(tmp_path, folders, classes):
    """The WordNet ids of all classes are, in alphabetical order; a number is a class."""
    for name in folders:
        write(tmp_path / name / "a.PNG", PICTURE)
    dataset = dr.open_images(tmp_path, 11 if "10" in folders else 3, 16)
    assert [Path(path).parent.name for path, _ in dataset.samples] == folders
    assert dataset.targets == classes


def test_readme_names_the_folders_of_imagenette_by_their_classes(tmp_path):
    wordnet = "01440764 02102040 02979186 03000684 03028079 03394916 03417042 03425413 03445777"
    for name in [*wordnet.split(), "03888257"]:
        write(tmp_path / f"n{name}" / f"{name}.png", PICTURE)
    readme = (SCRIPT.parent / "README.md").read_text()
    loop, = re.findall(r"for pair in .*?done", readme, re.DOTALL)
    subprocess.run(["bash", "-c", loop], cwd=tmp_path, check=True)
    assert names(tmp_path / "217") == {"02102040.png"}       # English springer
    assert names(tmp_path / "701") == {"03888257.png"}       # parachute
    assert len(dr.open_images(tmp_path, 1000, 16).classes) == 10


# ---- Images, and the positives among them

def test_images_are_cropped_to_the_middle_and_stay_as_they_are_stored(tmp_path):
    """EXIF's orientation 6 would turn the image by 90 degrees."""
    pixels = np.zeros((40, 100), np.uint8)
    pixels[:, 50:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = dr.read_image(tmp_path / "a.png", 8)
    assert image.shape == (8, 8, 3)
    assert image[:, :3].max() == 0
    assert image[:, 5:].min() == 255


def test_small_images_are_enlarged():
    assert dr.center_crop(Image.new("RGB", (5, 9)), 8).size == (8, 8)


@pytest.fixture(scope="module")
def folder(released):
    """The training images, 16 × 16."""
    return dr.open_images(released / "train", 3, 16)


def drawn(folder, **flags):
    """The positives of four steps -> (class, index, whether mirrored), [12,n_pos,3].

    The autoencoder passes images on as they are, so that each can be recognised.
    """
    cfg = dr.Config(device="cpu", n_class=3, steps=4, data="folder", **{"workers": 0} | flags)
    sampler = dr.ClassSampler(folder.targets, cfg)
    known = {}
    for i, (image, _) in enumerate(folder):
        known |= {image.flip(1).numpy().tobytes(): (i, True), image.numpy().tobytes(): (i, False)}
    rows = []
    for label, latents in dr.load_positives(folder, sampler, Namespace(encode=torch.clone), cfg):
        images = (latents * 255).round().byte().permute(0, 2, 3, 1)
        rows.append([(label, *known[image.numpy().tobytes()]) for image in images])
    rows = np.array(rows)
    assert rows[..., 1].tolist() == list(sampler)
    return rows


@pytest.mark.parametrize("n_pos", [5, 9])
def test_positives_are_of_the_class_asked_for(folder, n_pos):
    """Of 7 images 9 are drawn with replacement, 5 without."""
    rows = drawn(folder, n_pos=n_pos)
    classes, indices = rows[..., 0], rows[..., 1]
    assert rows.shape == (12, n_pos, 3)
    assert np.bincount(classes[:, 0]).tolist() == [4, 4, 4]
    assert np.array_equal(np.array(folder.targets)[indices], classes)
    assert len(np.unique(indices)) > 15                      # of 21
    if n_pos == 5:
        assert all(len(set(row)) == 5 for row in indices)


def test_half_of_the_positives_are_mirrored_and_readers_change_nothing(folder):
    plain = drawn(folder, n_pos=5)
    mirrored = drawn(folder, n_pos=5, flip=True)
    assert plain[..., 2].sum() == 0
    assert 15 < mirrored[..., 2].sum() < 45                  # of 60
    assert np.array_equal(plain[..., :2], mirrored[..., :2])
    assert np.array_equal(mirrored, drawn(folder, n_pos=5, flip=True, workers=2, batch_size=2))
