"""The command as its user meets it, on tiny digits: break and resume, samples, every bad input."""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parameters_to_vector

import drift_rae as dr
from conftest import (SCRIPT, assert_same_run, difference, interrupted, names, run, sentence,
                      steps_saved, wait_until)
from toy import digits
from toy.runs import Metrics

STEPS = 60
TINY = "--n-class 2 --n-pos 8 --n-neg 4 --n-extra-neg 4".split()
FEW = [*TINY, "--steps", 2]
TABLE = ["real", "reconstruction", "teacher_1step", "teacher_50step", "student_1step",
         "student_guided"]


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """OUT of an unbroken run."""
    out = tmp_path_factory.mktemp("whole")
    run("--teacher", teacher, "--out", out, "--steps", STEPS, *TINY)
    return out


@pytest.fixture
def no_report(monkeypatch):
    """Without the digits' table, which takes longer than a tiny run."""
    monkeypatch.setattr(digits, "report", Mock())


# ---- What a run leaves

def test_a_run_leaves_its_files(whole):
    assert names(whole) == {"student.pt", "state.pt", "samples.png", "log.csv", "metrics.json"}
    assert min(Image.open(whole / "samples.png").size) > 8 * 28


@pytest.fixture
def metrics(whole):
    return json.loads((whole / "metrics.json").read_text())


@pytest.mark.parametrize("row", TABLE)
def test_metrics_are_finite_and_what_generates_is_timed(metrics, row):
    assert {"fd", "precision", "recall", "label_accuracy"} <= metrics[row].keys()
    assert np.isfinite(list(metrics[row].values())).all()
    generates = row.startswith(("teacher", "student"))
    assert ("seconds_per_image" in metrics[row]) == generates


def test_metrics_say_of_which_run_they_are(metrics):
    assert metrics["config"]["n_pos"] == 8
    assert metrics["seed"] == 0
    assert "torch" in metrics["versions"]
    assert metrics["seconds"]["total"] > metrics["seconds"]["distil"] > 0


def test_the_log_has_a_row_a_step(whole):
    header, *rows = (whole / "log.csv").read_text().splitlines()
    assert header == "step,scale,drift_0.02,drift_0.05,drift_0.2,loss,grad_norm,seconds"
    numbers = np.loadtxt(rows, delimiter=",")
    assert np.isfinite(numbers).all()
    assert numbers[:, 0].tolist() == list(range(STEPS))


def test_the_student_leaves_its_teacher(whole, teacher):
    student = torch.load(whole / "student.pt", weights_only=True)["ema"]
    before = torch.load(teacher, weights_only=True)["ema"]
    moved = [name for name in before if not torch.equal(student[name], before[name])]
    assert {"blocks.0.mlp.w3.weight", "final_layer.linear.bias"} <= set(moved)


def test_metrics_tell_digits_from_their_negatives(teacher):
    measure = Metrics(torch.load(teacher, weights_only=True))
    itself = measure(measure.images, measure.labels)
    assert abs(itself["fd"]) < 1e-3
    assert itself["precision"] == itself["recall"] == 1
    others = measure(*measure.others)
    negatives = measure(255 - measure.images, measure.labels)
    assert negatives["fd"] > 10 * others["fd"] > 0


# ---- A break, and on. With readers, and with several processes: test_imagenet.py

@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_as_if_unbroken(teacher, whole, tmp_path, start, no_report, ending):
    flags = ["--teacher", teacher, "--out", tmp_path, "--steps", STEPS, *TINY, "--save-every", 1]
    process = start(*flags)
    wait_until((tmp_path / "state.pt").exists, process)
    process.send_signal(ending)
    process.communicate()
    assert process.returncode == -ending
    assert 0 < steps_saved(tmp_path) < STEPS
    run("--resume", "--out", tmp_path)
    assert_same_run(whole, tmp_path)


@pytest.fixture
def broken(teacher, tmp_path):
    """OUT of a run of 9 steps that Ctrl-C ended in its eighth."""
    out = tmp_path / "broken"
    flags = ["--teacher", teacher, "--out", out, "--steps", 9, *TINY, "--save-every", 3]
    said = interrupted(7, *flags)
    assert said == "interrupted; what was saved of a run goes on with drift_rae.py --resume"
    return out


def test_ctrl_c_loses_what_came_after_the_last_save(broken):
    assert steps_saved(broken) == 6
    assert names(broken) == {"state.pt", "log.csv", "samples.png"}


def test_a_run_that_is_not_done_is_not_overwritten(broken, teacher):
    said = sentence("--teacher", teacher, "--out", broken)
    assert said == f"{broken} holds a run that lacks 3 steps: --resume, or change --out"


def test_finished_runs_may_be_repeated_and_copied(teacher, tmp_path, no_report):
    """A copy has other times."""
    a, b = tmp_path / "a", tmp_path / "b"
    run("--teacher", teacher, "--out", a, *FEW)
    shutil.copytree(a, b, copy_function=shutil.copyfile)
    os.utime(b / "student.pt", (0, 0))      # older than state.pt
    run("--teacher", teacher, "--out", b, *FEW)
    assert_same_run(a, b)


def test_a_new_run_that_breaks_early_leaves_no_state_of_the_run_before(whole, teacher, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    sentence("--teacher", teacher, "--out", tmp_path, *FEW, "--lr", 1000)
    assert not (tmp_path / "state.pt").exists()
    assert (tmp_path / "student.pt").exists()


def test_a_run_resumes_only_with_a_teacher_of_its_latents(broken, saved, tmp_path):
    out = shutil.copytree(broken, tmp_path / "out")
    saved["rae"] = saved["rae"] | {name: torch.ones(7, 2, 2) for name in ("mean", "var")}
    saved["ema"] = dr.DiTDH(2, 7, (16, 24), (1, 1), (2, 2), 10).state_dict()
    torch.save(saved, tmp_path / "other.pt")
    said = sentence("--resume", "--out", out, "--teacher", tmp_path / "other.pt")
    assert said == f"latents [64, 2, 2] are not of {tmp_path}/other.pt's autoencoder"


def test_a_look_is_taken_at_every_save(teacher, tmp_path, monkeypatch, no_report):
    """A row a class, eight samples of the moving average."""
    looks = []
    def note(path, sampler, rae, classes, n_each, cfg):
        looks.append((path, sampler.args[0], classes, n_each))
    monkeypatch.setattr(dr, "save_grid", note)
    run("--teacher", teacher, "--out", tmp_path, *FEW, "--steps", 5, "--save-every", 2)
    assert len(looks) == 3
    for path, model, classes, n_each in looks:
        assert path == tmp_path / "samples.png"
        assert not any(p.requires_grad for p in model.parameters())
        assert classes == [*range(10)]
        assert n_each == 8


def test_the_bar_shows_drift_gradient_and_images(teacher, tmp_path, capfd, no_report):
    run("--teacher", teacher, "--out", tmp_path, *FEW)
    said = capfd.readouterr().err
    assert re.search(r"images/s, drift=[\d.e-]+, grad_norm=[\d.e-]+", said)


def test_another_seed_gives_another_student(teacher, tmp_path, no_report):
    a, b = tmp_path / "a", tmp_path / "b"
    run("--teacher", teacher, "--out", a, *FEW)
    run("--teacher", teacher, "--out", b, *FEW, "--seed", 1)
    assert difference(a / "student.pt", b / "student.pt") > 0


def test_resuming_a_finished_run_writes_its_student(whole, tmp_path, no_report):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "student.pt").unlink()
    run("--resume", "--out", out)
    assert_same_run(whole, out)


def test_the_digits_teacher_is_made_once(teacher, tmp_path, monkeypatch, no_report):
    seeds = []

    def make_teacher(path, seed):
        seeds.append(seed)
        shutil.copy(teacher, path)

    monkeypatch.setattr(digits, "make_teacher", make_teacher)
    a, b = tmp_path / "a", tmp_path / "b"
    run("--out", a, *FEW)
    run("--out", a, *FEW, "--seed", 1)
    run("--out", b, *FEW, "--seed", 7)
    assert seeds == [0, 7]


@pytest.mark.parametrize("name,value", [("lr", 0.5), ("seed", 1), ("preset", "imagenet256")])
def test_a_resumed_run_keeps_its_configuration(whole, name, value):
    said = sentence("--resume", "--out", whole, f"--{name}", value)
    assert said == f"a resumed run keeps its {name}: leave that flag out"


def test_there_must_be_something_to_resume(tmp_path):
    path = tmp_path / "state.pt"
    assert f"cannot read {path}: FileNotFoundError" in sentence("--resume", "--out", tmp_path)


def test_a_state_of_another_version_is_refused(whole, tmp_path):
    state = torch.load(whole / "state.pt", weights_only=True)
    state["config"]["shift"] = 3
    torch.save(state, tmp_path / "state.pt")
    said = sentence("--resume", "--out", tmp_path)
    assert f"cannot read {tmp_path}/state.pt: TypeError" in said
    assert "shift" in said


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("length", [0, 5, 9999])
def test_a_damaged_state_is_named_and_kept(whole, tmp_path, length, resume):
    content = (whole / "state.pt").read_bytes()[:length]
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    assert f"cannot read {path}: " in sentence("--out", tmp_path, *resume)
    assert path.read_bytes() == content


# ---- Samples

@pytest.fixture(scope="module")
def lively(teacher, tmp_path_factory):
    """OUT with a student of random weights, to which classes and guidance matter."""
    out = tmp_path_factory.mktemp("lively")
    torch.manual_seed(0)
    model = dr.DiTDH(2, 64, (32, 48), (1, 1), (2, 2), 10)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    rae = torch.load(teacher, weights_only=True)["rae"]
    torch.save({"ema": model.state_dict(), "rae": rae}, out / "student.pt")
    return out


@pytest.fixture
def draw(lively, tmp_path):
    """draw(name, *flags) -> the arrays of an .npz, the pixels of a .png."""
    def draw(name, *flags):
        run("--out", lively, "--to", tmp_path / name, *flags)
        assert names(tmp_path) == {name}    # it alone
        if name.endswith(".npz"):
            return np.load(tmp_path / name)
        return np.asarray(Image.open(tmp_path / name))

    return draw


def grey_levels(a, b):
    """Largest difference of two uint8 images."""
    return np.abs(a.astype(int) - b).max()


def test_samples_are_of_all_classes_in_turn(draw):
    drawn = draw("a.npz", "--sample", 20)
    assert drawn["arr_0"].shape == (20, 28, 28, 3)
    assert drawn["arr_0"].dtype == np.uint8
    assert drawn["arr_1"].tolist() == 2 * list(range(10))


def test_samples_are_of_the_classes_asked_for(draw):
    drawn = draw("a.npz", "--sample", 6, "--classes", "7,3")
    assert drawn["arr_1"].tolist() == [7, 3, 7, 3, 7, 3]


@pytest.fixture
def samples(draw):
    return draw("a.npz", "--sample", 20)["arr_0"]


def test_samples_do_not_hang_on_the_batch(draw, samples):
    again = draw("a.npz", "--sample", 20, "--batch-size", 3)
    assert grey_levels(samples, again["arr_0"]) <= 1


def test_samples_change_with_the_seed(draw, samples):
    other = draw("a.npz", "--sample", 20, "--seed", 1)
    assert grey_levels(samples, other["arr_0"]) > 9


def test_samples_in_bf16_are_nearly_the_same(draw, samples):
    coarse = draw("a.npz", "--sample", 20, "--dtype", "bf16")
    assert 0 < grey_levels(samples, coarse["arr_0"]) < 30


def test_the_first_of_several_processes_samples_alone(lively, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(dr, "distributed", Mock())
    monkeypatch.setenv("WORLD_SIZE", "2")
    to = tmp_path / "two.npz"
    flags = ["--out", lively, "--sample", 20, "--to", to]
    monkeypatch.setenv("RANK", "1")
    run(*flags)
    assert not to.exists()
    monkeypatch.setenv("RANK", "0")
    run(*flags)
    assert np.array_equal(samples, np.load(to)["arr_0"])


def test_pixels_are_rounded_not_cut():
    levels = torch.tensor([-3, 0.4, 0.6, 254.6, 300])
    images = (levels / 255).expand(1, 3, 1, 5)
    pixels = dr.to_uint8(images)
    assert pixels.shape == (1, 1, 5, 3)
    assert pixels[0, 0, :, 2].tolist() == [0, 0, 1, 255, 255]


@torch.no_grad()
def naive_samples(path, labels, guidance):
    """uint8 [n,H,W,3]: z of sample i is drawn from its own stream."""
    cfg = dr.Config(device="cpu")
    model, rae, _ = dr.load_pair(path, cfg)
    model = dr.guide(model, guidance)
    images = []
    for i, c in enumerate(labels):
        z = torch.randn(1, 64, 2, 2, generator=dr.torch_stream(cfg, "samples", i))
        v = model(z, torch.ones(1), torch.tensor([c]))
        image = rae.decode(z - v)[0].clamp(0, 1) * 255
        images.append(image.round().permute(1, 2, 0))
    return torch.stack(images).numpy()


def test_a_picture_has_a_row_a_class_guided(draw, lively):
    picture = draw("a.png", "--sample", 6, "--classes", "7,3", "--guidance", 2)
    assert picture.shape == (2 * 29 + 1, 3 * 29 + 1, 3)     # 28 pixels and a line
    expected = naive_samples(lively / "student.pt", [7, 7, 7, 3, 3, 3], guidance=2)
    for i, image in enumerate(expected):
        row, column = divmod(i, 3)
        top, left = 1 + 29 * row, 1 + 29 * column
        assert grey_levels(image, picture[top:top + 28, left:left + 28]) <= 1


def test_guidance_changes_the_picture(draw):
    flags = ["--sample", 6, "--classes", "7,3"]
    plain = draw("a.png", *flags)
    assert grey_levels(plain, draw("a.png", *flags, "--guidance", 2)) > 9


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
def test_samples_must_share_out_over_the_classes(whole, tmp_path, name):
    to = ["--out", whole, "--to", tmp_path / name]
    said = sentence(*to, "--classes", "3,7", "--sample", 5)
    assert said == "--sample must be a multiple of 2, the number of classes"
    assert "a multiple of 10," in sentence(*to, "--sample", 23)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("classes", ["1,12", "-1"])
def test_classes_must_be_of_the_model(whole, tmp_path, classes):
    said = sentence("--out", whole, "--to", tmp_path / "x.npz", "--sample", 4,
                    f"--classes={classes}")
    assert said == f"--classes: the student was distilled on {[*range(10)]}"


@pytest.mark.parametrize("classes", ["one", 10**20])
def test_classes_must_be_numbers(whole, tmp_path, classes):
    sentence("--out", whole, "--to", tmp_path / "x.npz", "--sample", 4, f"--classes={classes}")


def test_there_must_be_a_student_to_sample(tmp_path):
    said = sentence("--out", tmp_path, "--to", tmp_path / "x.npz", "--sample", 4)
    assert f"cannot read {tmp_path}/student.pt: FileNotFoundError" in said


# ---- Flags of the method and of the machine

FLAGS = ["", "--seed 1", "--field y-softmax", "--no-perturb", "--n-extra-neg 0",
         "--temperatures 0.1", "--windows 2", "--windows 1 2", "--dtype bf16", "--lr 1e-4",
         "--lr-final 0.5", "--betas 0.5 0.95", "--betas 0.9 0.5", "--weight-decay 1",
         "--clip 0.01", "--ema 0.9", "--ema-warmup 1"]


def learnt(flags, teacher, out):
    """Norm of a student's weights after three steps."""
    given = dr.parse([*TINY, "--steps", "3", *flags.split()])
    cfg = dr.Config(**given, device="cpu", out=str(out))
    model, rae, saved = dr.load_pair(teacher, cfg)
    latents = dr.encode(rae, saved["images"], cfg)
    data = dr.Positives(latents, saved["labels"].numpy(), cfg)
    ema = dr.distil(model, data, cfg)
    weights = parameters_to_vector(ema.parameters())
    return weights.double().norm().item()


def test_each_flag_of_the_method_changes_what_is_learnt(teacher, tmp_path):
    norms = [learnt(flags, teacher, tmp_path) for flags in FLAGS]
    assert len(set(norms)) == len(FLAGS)
    assert np.ptp(norms) < 1


def test_grad_checkpoint_changes_no_bit(teacher, tmp_path, monkeypatch, no_report):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return recompute(*args, **kwargs)

    recompute = dr.recompute
    monkeypatch.setattr(dr, "recompute", counted)
    a, b = tmp_path / "a", tmp_path / "b"
    run("--teacher", teacher, "--out", a, *FEW)
    assert not calls
    run("--teacher", teacher, "--out", b, *FEW, "--grad-checkpoint")
    assert calls
    assert_same_run(a, b)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile_changes_nothing_but_roundings(teacher, tmp_path, monkeypatch, no_report):
    """Of the smallest network there is, without a second graph: compiling is slow."""
    compiled = []

    def noted(model, **options):
        compiled.append(model)
        return compile_module(model, **options)

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", noted)
    saved = torch.load(teacher, weights_only=True)
    model = dr.DiTDH(2, 64, (32, 48), (0, 1), (2, 2), 10)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    path = tmp_path / "small.pt"
    torch.save(saved | {"ema": model.state_dict()}, path)
    flags = ["--teacher", path, *FEW, "--n-extra-neg", 0, "--lr", 3e-4]
    a, b = tmp_path / "a", tmp_path / "b"
    run(*flags, "--out", a)
    assert not compiled
    run(*flags, "--out", b, "--compile")
    assert len(compiled) == 1
    assert difference(a / "state.pt", b / "state.pt") < 1e-5
    assert difference(path, b / "student.pt") > 1e-4     # it has learnt


# ---- Bad checkpoints

@pytest.fixture
def said_of(tmp_path):
    """said_of(content): the sentence about a file with that content, bytes or what torch saves."""
    path = tmp_path / "bad.pt"

    def said_of(content):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return sentence("--teacher", path, "--out", tmp_path / "o", "--models", tmp_path, *FEW)

    return said_of


@pytest.fixture
def saved(teacher):
    return torch.load(teacher, weights_only=True)


def test_a_missing_teacher_is_named(tmp_path):
    path = tmp_path / "none.pt"
    said = sentence("--teacher", path, "--out", tmp_path / "o", *FEW)
    assert f"cannot read {path}: FileNotFoundError" in said


@pytest.mark.parametrize("content", [b"", b"hello", [1], {"ema": 3}, {"w": torch.zeros(3)}])
def test_a_foreign_file_is_named(said_of, tmp_path, content):
    assert f"cannot read {tmp_path}/bad.pt: " in said_of(content)


def test_a_cut_file_is_named(said_of, teacher):
    assert "bad.pt: " in said_of(teacher.read_bytes()[:5000])


def test_a_pickle_is_not_executed(said_of):
    assert "bad.pt: UnpicklingError" in said_of({"ema": os.system})


@pytest.mark.parametrize("key", ["blocks.0.norm1.weight", "foreign"])
def test_a_tensor_of_other_shape_or_name_is_named(said_of, saved, key):
    saved["ema"][key] = torch.ones(5)
    said = said_of(saved)
    assert "bad.pt: " in said
    assert key in said


@pytest.mark.parametrize("part,key", [("ema", "blocks.0.norm1.weight"), ("rae", "mean"),
                                      ("rae", "decoder")])
def test_a_missing_part_is_named(said_of, saved, part, key):
    del saved[part][key]
    said = said_of(saved)
    assert "bad.pt: " in said
    assert key in said


def test_teacher_and_autoencoder_must_fit(said_of, saved):
    other = dr.DiTDH(2, 7, (16, 24), (1, 1), (2, 2), 10)
    said = said_of(saved | {"ema": other.state_dict()})
    assert said.startswith("latents [7, 2, 2] are not of ")
    assert said.endswith("bad.pt's autoencoder")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_teacher_with_nan_is_refused(said_of, saved, bad):
    saved["ema"]["final_layer.linear.bias"][3] = bad
    said = said_of(saved)
    assert "bad.pt: " in said
    assert "it holds NaN or infinity" in said


def test_without_images_there_must_be_a_folder_of_them(said_of, saved):
    del saved["images"]
    assert "name a folder with --data" in said_of(saved)


def test_a_bare_teacher_is_taken_for_an_official_one(said_of, saved, tmp_path):
    said = said_of({"ema": saved["ema"]})
    assert f"cannot read {tmp_path}/dinov2_vitb14_reg4_pretrain.pth: FileNotFoundError" in said


# ---- Bad flags

BAD = {"steps": [0], "n_class": [0], "n_pos": [0], "n_neg": [1], "n_extra_neg": [-1],
       "temperatures": [0, -0.1, "nan", "inf"], "windows": [0], "lr": [-1, "nan", "inf"],
       "lr_final": [-0.1, 1.1], "weight_decay": [-1, "nan"], "clip": [-1, "nan"],
       "ema": [0.4, 1.1], "ema_warmup": [0], "save_every": [0], "seed": [-1], "workers": [-1],
       "batch_size": [0], "sample": [-1], "guidance": [11, "nan"]}


@pytest.mark.parametrize("name", BAD)
def test_numbers_out_of_bounds_are_named(tmp_path, name):
    flag = "--" + name.replace("_", "-")
    for value in [*BAD[name], 10**20]:
        said = sentence("--out", tmp_path / "o", f"{flag}={value}")
        assert said.startswith(f"{name} must be from ")
    assert f"argument {flag}: invalid" in sentence("--out", tmp_path / "o", flag, "many")
    assert names(tmp_path) == set()


def test_every_bound_is_tested():
    assert dr.LIMITS.keys() == BAD.keys() | {"betas"}


def test_betas_are_two_from_0_to_1(tmp_path):
    assert sentence("--out", tmp_path, "--betas", 1.5, 0.9) == "betas must be from 0 to 1, not 1.5"
    assert "--betas: expected 2 arguments" in sentence("--out", tmp_path, "--betas", 0.9)


@pytest.mark.parametrize("flags", [["--unknown"], ["--preset", "no"], ["--field", "no"],
                                   ["--device", "no"], ["--dtype", "no"]])
def test_flags_and_choices_that_do_not_exist_are_named(flags):
    assert flags[0] in sentence(*flags)


@pytest.mark.parametrize("flags", [["--sample", 4], ["--to", "a.npz"],
                                   ["--sample", 4, "--to", "a.jpg"]])
def test_sampling_takes_a_number_and_a_file(flags):
    assert sentence(*flags) == "sampling takes --sample N --to FILE.npz or FILE.png"


@pytest.fixture
def refused(teacher, tmp_path):
    """refused(*flags): the sentence about a run with them."""
    return partial(sentence, "--teacher", teacher, "--out", tmp_path, *FEW)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_there_must_be_the_device_asked_for(refused, device, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert refused("--device", device) == f"--device {device}: torch finds none"


def test_there_must_be_as_many_classes_as_a_step_takes(refused):
    said = refused("--n-class", 11)
    assert "processes 1 <= --n-class 11 <= classes of the images 10" in said


def test_a_step_must_have_a_class_for_each_process(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    cfg = dr.Config(teacher=str(teacher), out=str(tmp_path), n_class=2, device="cpu")
    with pytest.raises(ValueError, match="processes 8 <= --n-class 2"):
        dr.run(cfg, None, 0)


def test_windows_must_divide_the_grid(refused):
    assert refused("--windows", 1, 3) == "windows of 3 do not divide the tokens' grid"


def test_a_rate_that_is_too_high_stops_the_run_and_leaves_the_step_before(refused, tmp_path):
    said = refused("--lr", 1000, "--save-every", 1)
    assert said == "NaN or infinite gradient at step 1: is --lr too high?"
    assert steps_saved(tmp_path) == 1


# ---- A disk that is full or cannot be written

@contextlib.contextmanager
def no_file_over(size):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("folder", ["{}/file/out", "/proc/out"])
def test_a_folder_that_cannot_be_is_named(teacher, whole, tmp_path, folder):
    (tmp_path / "file").touch()
    out = folder.format(tmp_path)
    assert out in sentence("--teacher", teacher, "--out", out, *FEW)
    assert out in sentence("--out", whole, "--sample", 10, "--to", f"{out}/a.npz")


def test_a_full_disk_keeps_the_old_files_and_leaves_no_others(broken, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(broken / "state.pt", out)
    before = (out / "state.pt").read_bytes()
    with no_file_over(200_000):
        said = sentence("--resume", "--out", out)
    assert said.startswith(f"cannot write {out}/state.pt, an old file is kept: ")
    assert (out / "state.pt").read_bytes() == before
    assert names(out) == {"state.pt"}


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_samples_for_a_full_disk_leave_no_file(whole, tmp_path, name):
    with no_file_over(10_000):
        said = sentence("--out", whole, "--sample", 40, "--to", tmp_path / name)
    assert said.startswith(f"cannot write {tmp_path / name}, ")
    assert names(tmp_path) == set()


def test_imports_without_resource_and_fork():
    code = """
import os, sys
sys.modules["resource"] = None
del os.fork
import drift_rae, toy.digits
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent)
    assert done.returncode == 0
