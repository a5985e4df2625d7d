"""A run as its user meets it: its files, breaks and ranks, its samples, its flags, its ends."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import drift_rae as dr
import eval_fid
from helpers import (SCRIPT, assert_same_run, distance, interrupted, log_rows, names, read,
                     refusal, run, steps_saved, tiny_network, wait_for)
from toy import digits

pytestmark = pytest.mark.usefixtures("tiny_sizes")
FEW = ["--steps", 2]


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory, tiny_sizes):
    """Per kind, the OUT of an unbroken run; and what the script printed on the digits.

    That one ran as a process of its own, on a terminal that has no é for "Fréchet".
    """
    outs = {kind: tmp_path_factory.mktemp(kind) for kind in commands}
    run(*commands["images"], "--out", outs["images"])
    command = [sys.executable, SCRIPT, *map(str, commands["digits"]), "--out", outs["digits"]]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    return outs | {"printed": done.stdout, "errors": done.stderr}


@pytest.fixture
def begin(commands, tmp_path, no_report):
    """begin(name, *flags) runs two steps on the digits -> OUT, tmp_path/name."""
    def begin(name, *flags):
        run(*commands["digits"], *FEW, "--out", tmp_path / name, *flags)
        return tmp_path / name

    return begin


def change(teacher, out):
    """How far the student's weights are from those of the teacher."""
    before = read(teacher)
    return distance(before.get("ema", before), read(out / "state.pt")["student"])


# ---- What a run leaves

@pytest.mark.parametrize("kind,size,more", [
    ("digits", None, {"metrics.json", "training.gif"}),
    ("images", (8 * 17 + 1, 3 * 17 + 1), set())])
def test_a_run_leaves_its_files(whole, kind, size, more):
    out = whole[kind]
    assert names(out) == {"student.pt", "state.pt", "samples.png", "log.csv"} | more
    picture = Image.open(out / "samples.png").size           # 16 pixels and a line per image
    assert picture == size if size else min(picture) > 8 * 28


def test_the_film_begins_with_the_teacher_and_shows_the_training(whole):
    """60 steps: a frame before them, after each of the first 20, and after every other one."""
    with Image.open(whole["digits"] / "training.gif") as film:
        assert film.n_frames == 1 + 20 + 20
        frames = []
        for i in (0, 1, 40):
            film.seek(i)
            frames.append(np.asarray(film.convert("L"), float))
    first, second, last = frames
    assert 0 < np.abs(second - first).mean() < np.abs(last - first).mean()


def test_metrics_are_finite_and_say_which_run_they_belong_to(whole):
    metrics = json.loads((whole["digits"] / "metrics.json").read_text())
    timed = {"teacher_1step", "teacher_50step", "student_1step", "student_guided"}
    for row in {"real", "reconstruction"} | timed:
        assert {"fd", "precision", "recall", "label_accuracy"} <= metrics[row].keys()
        assert np.isfinite(list(metrics[row].values())).all()
        assert ("seconds_per_image" in metrics[row]) == (row in timed)
    assert metrics["config"]["n_pos"] == 8
    assert metrics["seed"] == 0
    assert "torch" in metrics["versions"]
    assert metrics["seconds"]["total"] > metrics["seconds"]["distil"] > 0


def test_metrics_tell_digits_from_their_negatives(teacher):
    measure = digits.Metrics(read(teacher))
    itself = measure(measure.images, measure.labels)
    assert abs(itself["fd"]) < 1e-3
    assert itself["precision"] == itself["recall"] == 1
    others = measure(*measure.others)
    negatives = measure(255 - measure.images, measure.labels)
    assert negatives["fd"] > 10 * others["fd"] > 0


def test_the_log_has_a_row_per_step(whole):
    header, *rows = (whole["digits"] / "log.csv").read_text().splitlines()
    assert header == "step,scale,V_0.02,V_0.05,V_0.2,loss,grad_norm,seconds"
    numbers = np.loadtxt(rows, delimiter=",")
    assert np.isfinite(numbers).all()
    assert numbers[:, 0].tolist() == list(range(60))


def test_the_student_leaves_its_teacher(whole, teacher):
    student, before = read(whole["digits"] / "student.pt")["ema"], read(teacher)["ema"]
    moved = {name for name in before if not torch.equal(student[name], before[name])}
    assert {"blocks.0.mlp.w3.weight", "final_layer.linear.bias"} <= moved


def test_a_picture_is_drawn_at_every_save(begin, monkeypatch):
    """It has a row per class, with eight samples of the moving average."""
    pictures = []
    monkeypatch.setattr(dr, "save_grid", lambda *args: pictures.append(args))
    out = begin("a", "--steps", 5, "--save-every", 2)
    assert len(pictures) == 3
    for path, sampler, _, classes, n_each, _ in pictures:
        assert path == out / "samples.png"
        assert not any(p.requires_grad for p in sampler.args[0].parameters())
        assert classes == list(range(10))
        assert n_each == 8


def test_the_bar_on_a_terminal_shows_loss_and_gradient(begin, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    begin("a")
    assert re.search(r"grad_norm=[\d.e-]+, loss=[\d.e-]+", sys.stderr.getvalue())


# ---- A break, and on

@pytest.mark.parametrize("kind,ending,flags,resumed", [
    ("digits", signal.SIGKILL, [], []),
    ("digits", signal.SIGTERM, [], ["--batch-size", 100]),
    ("images", signal.SIGINT, ["--workers", 2], ["--workers", 0])])
def test_a_broken_run_continues_as_if_unbroken(
        commands, whole, tmp_path, launch, no_report, kind, ending, flags, resumed):
    """Ctrl-C goes to the whole group, as from a terminal, and so to the processes that read."""
    process = launch(*commands[kind], "--out", tmp_path, "--save-every", 1, *flags)
    for _ in range(2):                                       # the first save is then over
        wait_for(tmp_path / "samples.png", process)
        (tmp_path / "samples.png").unlink()
    if ending == signal.SIGINT:
        os.killpg(process.pid, ending)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "Traceback" not in err
        assert "--resume" in err.splitlines()[-1]
    else:
        process.send_signal(ending)
        process.communicate()
        assert process.returncode == -ending
    assert 0 < steps_saved(tmp_path) < len(log_rows(whole[kind])) - 1
    run("--resume", "--out", tmp_path, *resumed)
    assert_same_run(whole[kind], tmp_path)


@pytest.fixture
def broken(commands, tmp_path):
    """OUT of a run of nine steps that Ctrl-C ended in its eighth."""
    out = tmp_path / "broken"
    said = interrupted(7, *commands["digits"], "--steps", 9, "--save-every", 3, "--out", out)
    assert f"--resume --out {out}" in said
    assert "step 6" in said
    assert steps_saved(out) == 6
    assert names(out) == {"state.pt", "log.csv", "samples.png"}
    return out


def test_ctrl_c_speaks_of_resuming_only_where_there_is_a_state(commands, whole, tmp_path):
    """The state of an older, finished run in OUT is not one."""
    old = shutil.copytree(whole["digits"], tmp_path / "old")
    for out in (tmp_path / "new", old):
        said = interrupted(1, *commands["digits"], "--out", out)
        assert "--resume" not in said
        assert "nothing" in said


def test_ctrl_c_on_any_rank_tells_whether_something_was_saved(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(dr, "RANK", 1)
    said = interrupted(7, *commands["digits"], "--save-every", 3, "--out", tmp_path)
    assert "nothing" not in said


def test_ctrl_c_after_the_first_state_speaks_of_resuming(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(dr, "save_grid", Mock(side_effect=KeyboardInterrupt))
    assert "--resume" in refusal(*commands["digits"], "--save-every", 1, "--out", tmp_path)
    assert steps_saved(tmp_path) == 1


def test_finished_runs_may_be_repeated_and_copied(begin, tmp_path):
    a = begin("a")
    b = shutil.copytree(a, tmp_path / "b", copy_function=shutil.copyfile)    # with new times
    os.utime(b / "student.pt", (0, 0))                       # older than state.pt
    begin("b")
    assert_same_run(a, b)


def test_files_of_an_older_run_stay_until_the_new_one_saves_a_state(commands, whole, tmp_path):
    out = shutil.copytree(whole["digits"], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flags = [*commands["digits"], "--steps", 9, "--save-every", 3, "--out", out]
    refusal(*flags, "--teacher", tmp_path / "typo.pt")
    refusal(*flags, "--lr", 1000)                            # its gradient is soon NaN
    interrupted(2, *flags)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    interrupted(4, *flags)
    assert names(out) == {"state.pt", "log.csv", "samples.png"}
    assert steps_saved(out) == 3


def test_resuming_a_finished_run_writes_its_student(whole, tmp_path, no_report):
    out = shutil.copytree(whole["digits"], tmp_path / "out")
    (out / "student.pt").unlink()
    run("--resume", "--out", out)
    assert_same_run(whole["digits"], out)


def test_a_resumed_run_reads_its_files_once_and_no_weights_of_the_teacher(
        begin, broken, teacher, tmp_path, monkeypatch):
    path = tmp_path / "garbage.pt"
    torch.save(read(teacher) | {"ema": {"no": torch.tensor(torch.nan)}}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", Mock(wraps=torch.load))
        run("--resume", "--out", broken, "--teacher", path)
        calls = torch.load.call_args_list
    assert {str(call.args[0]) for call in calls} == {str(broken / "state.pt"), str(path)}
    assert [call.kwargs["mmap"] for call in calls] == [True, True]
    assert_same_run(begin("a", "--steps", 9), broken)


def test_files_are_on_the_disk_before_they_replace_others(tmp_path, monkeypatch):
    calls = Mock()
    calls.fsync, calls.replace = Mock(wraps=os.fsync), Mock(wraps=os.replace)
    monkeypatch.setattr(os, "fsync", calls.fsync)
    monkeypatch.setattr(os, "replace", calls.replace)
    dr.save(tmp_path / "a", lambda file: file.write(b"a"))
    assert [name for name, *_ in calls.mock_calls] == ["fsync", "replace"]
    assert (tmp_path / "a").read_bytes() == b"a"


def test_a_run_resumes_only_with_a_teacher_of_its_latents(broken, teacher, tmp_path):
    saved = read(teacher)
    saved["rae"] |= {name: torch.ones(7, 2, 2) for name in ("mean", "var")}
    torch.save(saved, tmp_path / "other.pt")
    said = refusal("--resume", "--out", broken, "--teacher", tmp_path / "other.pt")
    assert "other.pt" in said
    assert "[7, 2, 2]" in said


# ---- Several processes

def test_ranks_share_a_run_that_one_process_began(commands, tmp_path, launch):
    """Two ranks share three classes unevenly; only roundings differ from a run of one process."""
    a, b = tmp_path / "a", tmp_path / "b"
    flags = [*commands["images"], "--steps", 4, "--dtype", "fp32", "--n-class", 3]
    run(*flags, "--out", a)
    interrupted(1, *flags, "--out", b, "--save-every", 1)
    assert steps_saved(b) == 1
    process = launch("--resume", "--out", b, ranks=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert distance(read(a / "state.pt"), read(b / "state.pt")) < 1e-5
    assert distance(read(a / "student.pt"), read(b / "student.pt")) < 1e-5
    one, two = (np.loadtxt(log_rows(out)[1:], delimiter=",") for out in (a, b))
    assert np.allclose(one, two, rtol=1e-3)
    assert change(flags[flags.index("--teacher") + 1], a) > 2e-5


def test_sigterm_to_the_group_ends_all_processes(commands, tmp_path, launch):
    """Schedulers send it: to torchrun, two ranks and their readers, which hold stderr open."""
    flags = ["--steps", 3000, "--save-every", 1, "--out", tmp_path]
    process = launch(*commands["images"], *flags, ranks=2)
    wait_for(tmp_path / "state.pt", process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert steps_saved(tmp_path) > 0


def test_a_step_has_a_class_for_each_process(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(dr, "distributed", Mock())
    monkeypatch.setattr(dr, "WORLD", 8)
    said = refusal(*commands["digits"], "--out", tmp_path)
    assert "--n-class" in said
    assert "8" in said


# ---- Samples

@pytest.fixture(scope="module")
def lively(teacher, tmp_path_factory):
    """OUT with a student of random weights, to which classes and guidance matter."""
    out = tmp_path_factory.mktemp("lively")
    student = tiny_network(std=0.2).state_dict()
    content = {"ema": student, "rae": read(teacher)["rae"], "classes": list(range(10))}
    torch.save(content, out / "student.pt")
    return out


@pytest.fixture
def draw(lively, tmp_path):
    """draw(name, *flags) -> the arrays of an .npz file, or the pixels of a .png file."""
    def draw(name, *flags):
        run("--out", lively, "--to", tmp_path / "new folder" / name, *flags)
        assert names(tmp_path / "new folder") == {name}
        if name.endswith(".npz"):
            return np.load(tmp_path / "new folder" / name)
        return np.asarray(Image.open(tmp_path / "new folder" / name))

    return draw


@pytest.fixture
def samples(draw):
    return draw("a.npz", "--sample", 20)["arr_0"]


def grey_levels(a, b):
    """The largest difference of two uint8 images."""
    return np.abs(a.astype(int) - b).max()


@pytest.mark.parametrize("flags,classes", [
    (["--sample", 20], 2 * list(range(10))), (["--sample", 6, "--classes", "7,3"], 3 * [7, 3])])
def test_samples_are_of_the_classes_in_turn(draw, flags, classes):
    drawn = draw("a.npz", *flags)
    assert drawn["arr_0"].shape == (len(classes), 28, 28, 3)
    assert drawn["arr_0"].dtype == np.uint8
    assert drawn["arr_1"].tolist() == classes


@pytest.mark.parametrize("flags,low,high", [
    (["--batch-size", 3], 0, 1), (["--dtype", "bf16"], 1, 29), (["--seed", 1], 10, 255),
    (["--guidance", 2], 10, 255)])
def test_samples_depend_on_seed_and_guidance_but_not_on_the_batch(
        draw, samples, flags, low, high):
    other = draw("a.npz", "--sample", 20, *flags)["arr_0"]
    assert low <= grey_levels(samples, other) <= high


def test_the_first_of_several_ranks_samples_alone(lively, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(dr, "WORLD", 2)
    to = tmp_path / "two.npz"
    for rank in (1, 0):
        assert not to.exists()
        monkeypatch.setattr(dr, "RANK", rank)
        run("--out", lively, "--sample", 20, "--to", to)
    assert np.array_equal(samples, np.load(to)["arr_0"])


@torch.no_grad()
def naive_samples(path, labels, guidance):
    """uint8 [n,H,W,3]; the noise of sample i comes from its own random stream."""
    cfg, checkpoint = dr.Config(device="cpu"), dr.load(path)
    model = dr.guide(dr.read_network(checkpoint, path), guidance)
    rae = dr.load_autoencoder(checkpoint, path, "")
    images = []
    for i, c in enumerate(labels):
        z = torch.randn(1, 64, 2, 2, generator=dr.torch_stream(cfg, "samples", i))
        v = model(z, torch.ones(1), torch.tensor([c]))
        image = rae.decode(z - v)[0].clamp(0, 1) * 255
        images.append(image.round().permute(1, 2, 0))
    return torch.stack(images).numpy()


def test_a_picture_has_a_row_per_class_of_guided_samples(draw, lively):
    picture = draw("a.png", "--sample", 6, "--classes", "7,3", "--guidance", 2)
    assert picture.shape == (2 * 29 + 1, 3 * 29 + 1, 3)      # 28 pixels and a line per image
    expected = naive_samples(lively / "student.pt", [7, 7, 7, 3, 3, 3], guidance=2)
    for i, image in enumerate(expected):
        row, column = divmod(i, 3)
        top, left = 1 + 29 * row, 1 + 29 * column
        assert grey_levels(image, picture[top:top + 28, left:left + 28]) <= 1


def test_pixels_are_rounded_not_cut():
    levels = torch.tensor([-3, 0.4, 0.6, 254.6, 300])
    pixels = dr.to_uint8((levels / 255).expand(1, 3, 1, 5))
    assert pixels.shape == (1, 1, 5, 3)
    assert pixels[0, 0, :, 2].tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_interrupted_sampling_says_that_the_images_are_lost(lively, tmp_path, monkeypatch, name):
    monkeypatch.setattr(dr, "to_uint8", Mock(side_effect=KeyboardInterrupt))
    said = refusal("--out", lively, "--sample", 10, "--to", tmp_path / name)
    assert "lost" in said
    assert name in said
    assert names(tmp_path) == set()


def test_samples_of_images_are_drawn_and_evaluated(commands, whole, released, tmp_path):
    samples, report = tmp_path / "samples.npz", tmp_path / "fid.json"
    run("--sample", 12, "--out", whole["images"], "--models", released / "models", "--to", samples)
    drawn = np.load(samples)
    assert drawn["arr_0"].shape == (12, 16, 16, 3)
    assert drawn["arr_1"].tolist() == 4 * [0, 1, 2]
    run(samples, released / "train", "--json", report, "--size", 16, "--features", "pixels",
        main=eval_fid.main)
    assert np.isfinite(json.loads(report.read_text())["frechet_distance"])


def test_a_few_classes_are_trained_and_drawn_by_their_numbers(
        commands, released, tmp_path, monkeypatch):
    """The folders 0 and 2 train the classes 0 and 2."""
    for label in "02":
        shutil.copytree(released / "train" / label, tmp_path / "data" / label)
    out = tmp_path / "out"
    class_loss = Mock(wraps=dr.class_loss)
    monkeypatch.setattr(dr, "class_loss", class_loss)
    run(*commands["images"], *FEW, "--data", tmp_path / "data", "--out", out)
    assert {call.args[1] for call in class_loss.call_args_list} == {0, 2}
    assert read(out / "student.pt")["classes"] == [0, 2]
    assert Image.open(out / "samples.png").size[1] == 2 * 17 + 1
    flags = ["--out", out, "--models", released / "models", "--to", tmp_path / "x.npz"]
    run(*flags, "--sample", 4)
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [0, 2, 0, 2]
    assert "[0, 2]" in refusal(*flags, "--sample", 4, "--classes", "1")


# ---- Flags of the method and of the machine

FLAGS = ["", "--seed 1", "--field y-softmax", "--no-perturb", "--n-extra-neg 0",
         "--temperatures 0.1", "--windows 2", "--windows 1 2", "--dtype bf16", "--lr 1e-4",
         "--lr-final 0.5", "--betas 0.5 0.95", "--betas 0.9 0.5", "--weight-decay 1",
         "--clip 0.01", "--ema 0.9", "--ema-warmup 1"]


def test_each_flag_of_the_method_changes_what_is_learnt(begin):
    norms = set()
    for i, flags in enumerate(FLAGS):
        out = begin(str(i), "--steps", 3, *flags.split())
        weights = read(out / "student.pt")["ema"].values()
        norms.add(sum(w.double().square().sum().item() for w in weights)**0.5)
    assert len(norms) == len(FLAGS)
    assert max(norms) - min(norms) < 1


def test_grad_checkpoint_changes_no_bit(begin, monkeypatch):
    recomputed = Mock(wraps=dr.recompute_later)
    monkeypatch.setattr(dr, "recompute_later", recomputed)
    a = begin("a")
    assert not recomputed.called
    b = begin("b", "--grad-checkpoint")
    assert recomputed.called
    assert_same_run(a, b)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile_changes_nothing_but_roundings(begin, teacher, tmp_path, monkeypatch):
    """The network is the smallest there is, without a second graph: compiling is slow."""
    compiled = Mock(wraps=nn.Module.compile)
    monkeypatch.setattr(nn.Module, "compile", lambda *args, **more: compiled(*args, **more))
    path = tmp_path / "small.pt"
    torch.manual_seed(0)
    model = dr.DiTDH(2, 64, (32, 48), (0, 1), (2, 2), 10)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    torch.save(read(teacher) | {"ema": model.state_dict()}, path)
    flags = ["--teacher", path, "--n-extra-neg", 0, "--lr", 3e-4]
    a = begin("a", *flags)
    assert not compiled.called
    b = begin("b", *flags, "--compile")
    assert compiled.call_count == 1
    assert distance(read(a / "state.pt"), read(b / "state.pt")) < 1e-5
    assert change(path, b) > 1e-4


# ---- How a run ends that cannot go on

def test_a_rate_that_is_too_high_stops_the_run_and_leaves_the_step_before(commands, tmp_path):
    said = refusal(*commands["digits"], "--out", tmp_path, "--lr", 1000, "--save-every", 1)
    assert "--lr" in said
    assert "step 1" in said
    assert steps_saved(tmp_path) == 1


@contextlib.contextmanager
def no_file_over(size):
    """Stands in for a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_old_file_and_leaves_no_others(broken, commands, tmp_path, lively):
    before = (broken / "state.pt").read_bytes()
    with no_file_over(10_000):
        said = refusal("--resume", "--out", broken)
    assert f"{broken}/state.pt" in said
    assert "old file is kept" in said
    assert "GB" in said
    assert (broken / "state.pt").read_bytes() == before
    assert names(broken) == {"state.pt", "log.csv", "samples.png"}
    out = tmp_path / "new"
    for name, flags in {
            "state.pt": [*commands["digits"], "--out", out],
            "a.npz": ["--out", lively, "--sample", 40, "--to", out / "a.npz"],
            "a.png": ["--out", lively, "--sample", 40, "--to", out / "a.png"]}.items():
        with no_file_over(10_000):
            said = refusal(*flags)
        assert str(out / name) in said
        assert "old file" not in said
        assert names(out) == set()


def test_an_out_that_vanishes_ends_the_run_in_one_sentence(commands, tmp_path, monkeypatch):
    """Somebody removes the folder, or a network disk goes away."""
    out = tmp_path / "out"
    monkeypatch.setattr(dr, "save_grid", lambda *args: shutil.rmtree(out))
    assert "state.pt" in refusal(*commands["digits"], "--out", out, "--save-every", 1)


def raising(text):
    return Mock(side_effect=RuntimeError(text))


@pytest.mark.parametrize("main,fragments", [
    (Mock(side_effect=KeyboardInterrupt), ["interrupted"]),
    (lambda: torch.empty(2**50), ["--batch-size", "--n-neg"]),
    (raising("CUDA out of memory. Tried to allocate 2.00 GiB."), ["--batch-size", "--n-neg"]),
    (raising("DataLoader timed out after 300 seconds"), ["/dev/shm", "--shm-size"]),
    (raising("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
             "dataloader's workers are out of shared memory."), ["/dev/shm", "--shm-size"]),
    (raising("DataLoader worker (pid(s) 7) exited unexpectedly"), ["--workers"])])
def test_what_runs_out_is_named_with_the_flag_that_helps(main, fragments):
    said = refusal(main=lambda _: main())
    assert all(fragment in said for fragment in fragments)


def test_a_killed_reader_ends_the_run_in_one_sentence(commands, tmp_path, monkeypatch):
    """One that hangs, for want of shared memory, does so after minutes: there is a timeout."""
    loader = Mock(wraps=dr.DataLoader)
    monkeypatch.setattr(dr, "DataLoader", loader)
    monkeypatch.setattr(dr, "center_crop", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    assert "--workers" in refusal(*commands["images"], "--out", tmp_path)
    assert 0 < loader.call_args.kwargs["timeout"] <= 600


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(error, match="a bug"):
        dr.run_as_script(Mock(side_effect=error("a bug")))


# ---- Terminals and systems

def test_a_terminal_that_knows_no_greek_gets_its_help():
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0
    assert b"--n-pos" in done.stdout


def test_the_script_prints_its_table_and_no_bars_where_there_is_no_terminal(whole):
    assert "student_1step" in whole["printed"]
    assert whole["errors"] == ""


def test_the_script_imports_without_resource_and_fork():
    code = """
import os, sys
sys.modules["resource"] = None
del os.fork
import drift_rae, toy.digits
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0
