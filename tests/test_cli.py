"""The command line as a user runs it, with tiny sizes; kill and resume; every kind of bad input."""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drift_rae as dr
from toy.digits import load_digits, make_teacher, pixel_metrics

SCRIPT = Path(dr.__file__)
TINY = "--steps 6 --n-class 2 --n-pos 8 --n-neg 4 --n-extra-neg 4 --save-every 2 --teacher-steps 5".split()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher with space ü") / "teacher.pt"
    make_teacher(path, steps=(30, 30, 30))
    return path


def fails(capsys, *args, saying):
    """The command ends with code 2 and one sentence on stderr that matches."""
    capsys.readouterr()
    assert dr.main([str(a) for a in args]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]  # but for progress bars
    assert len(err) == 1 and re.search(saying, err[0]), err


def weights(path):
    ck = torch.load(path, weights_only=True)
    return {f"{part}.{k}": v for part in ("ema", "student") if part in ck for k, v in ck[part].items()}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(*args):
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_train_sample_and_repeat(teacher, tmp_path, capsys):
    out = tmp_path / "out"
    assert dr.main(["--teacher", str(teacher), "--out", str(out), *TINY]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("teacher_1step", "teacher_5step", "student_1step"):
        assert {"fd", "precision", "recall", "label_accuracy", "nearest_real", "seconds_per_image"} <= metrics[name].keys()
    assert metrics["config"]["n_pos"] == 8 and metrics["seed"] == 0
    log = (out / "log.csv").read_text().splitlines()
    assert len(log) == 7 and log[0].startswith("step,lr,grad_norm")
    assert Image.open(out / "samples.png").size[0] > 4 * 8 * 8
    # the same seed repeats bit for bit, another does not
    for seed, equal in ((0, True), (1, False)):
        assert dr.main(["--teacher", str(teacher), "--out", str(tmp_path / "b"), "--seed", str(seed), *TINY]) == 0
        assert same(out / "student.pt", tmp_path / "b" / "student.pt") == equal
    # sampling: class-balanced, independent of the batch, of chosen classes, as .npz and as PNGs
    draw = lambda to, *more: dr.main(["--sample", "23", "--student", str(out / "student.pt"), "--to", str(tmp_path / to), *more])
    assert draw("a.npz") == draw("b.npz", "--batch-size", "4") == draw("png", "--classes", "1,5,9") == 0
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a["arr_0"].shape == (23, 8, 8, 3) and a["arr_0"].dtype == np.uint8
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1 and np.ptp(np.bincount(a["arr_1"], minlength=10)) <= 1
    pngs = sorted((tmp_path / "png").iterdir())
    assert len(pngs) == 23 and {p.stem[-1] for p in pngs} == set("159") and Image.open(pngs[0]).size == (8, 8)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_kill_and_resume_repeats_an_unbroken_run(teacher, tmp_path, how):
    steps = ["--teacher", teacher, "--steps", "40", *TINY[2:]]
    assert dr.main([str(a) for a in ["--out", tmp_path / "whole", *steps]]) == 0
    process = start("--out", tmp_path / "broken", *steps)
    while not (tmp_path / "broken" / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -how), err
    reached = torch.load(tmp_path / "broken" / "state.pt", weights_only=True)["step"]
    assert reached < 40
    assert dr.main(["--resume", "--out", str(tmp_path / "broken")]) == 0
    for name in ("state.pt", "student.pt"):
        assert same(tmp_path / "whole" / name, tmp_path / "broken" / name)
    rows = [[line.split(",")[:3] for line in (tmp_path / run / "log.csv").read_text().splitlines()]
            for run in ("whole", "broken")]
    assert rows[0] == rows[1] and len(rows[0]) == 41


def test_resume_keeps_its_configuration(teacher, tmp_path, capsys):
    assert dr.main(["--teacher", str(teacher), "--out", str(tmp_path), *TINY]) == 0
    (tmp_path / ".state.pt.1.tmp").write_text("of a run that was killed while it saved")
    assert dr.main(["--resume", "--out", str(tmp_path), "--teacher", str(teacher)]) == 0 and not [*tmp_path.glob(".*")]
    fails(capsys, "--resume", "--out", tmp_path, "--lr", 0.5, saying="--lr was 0.001")
    fails(capsys, "--resume", "--out", tmp_path / "nowhere", saying="no checkpoint at .*state.pt")
    other = torch.load(teacher, weights_only=True)
    other["rae"]["mean"] += 0.1
    torch.save(other, tmp_path / "other.pt")
    fails(capsys, "--resume", "--out", tmp_path, "--teacher", tmp_path / "other.pt", saying="not belong to this teacher")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["config"]["shift"]
    torch.save(state, tmp_path / "state.pt")
    fails(capsys, "--resume", "--out", tmp_path, saying="another version")
    torch.save({}, tmp_path / "state.pt")
    fails(capsys, "--resume", "--out", tmp_path, saying="no state of a training run")


def folder_of_images(root, n=9, classes=10):
    images, _ = load_digits()
    for c in range(classes):
        (root / f"{c} ß").mkdir(parents=True)
        for i in range(n):
            Image.fromarray(images[174 * c + i].numpy()).resize((11, 9)).save(root / f"{c} ß" / f"{i}.png")
    return root


def test_folder_of_images(teacher, tmp_path, capsys):
    data = folder_of_images(tmp_path / "Bilder mit Umlaut ä")
    args = ["--teacher", teacher, "--data", data, "--out", tmp_path / "öut", *TINY]
    assert dr.main([*map(str, args), "--flip"]) == 0
    fails(capsys, *args, "--data", "", "--n-pos", 175, saying=r"class 0 has 174 images and --n-pos asks for 175")
    (data / "z").mkdir()
    fails(capsys, *args, saying="--data .*z")
    (data / "z" / "a.png").write_bytes((data / "0 ß" / "0.png").read_bytes())
    fails(capsys, *args, saying="11 classes, the teacher has 10")
    fails(capsys, *args, "--data", tmp_path / "no", saying="--data .*no")


def test_ablations_are_flags(teacher, tmp_path):
    """Each changes what is learnt; all train through the command's own configuration."""
    seen, flags = set(), ([], ["--y-softmax"], ["--no-perturb"], ["--n-extra-neg", "0"], ["--drift-norm", "sample"],
                          ["--temperatures", "0.1"], ["--dtype", "bf16"], ["--token-scale"], ["--perturb-all"],
                          ["--decode-encode"])
    for i, more in enumerate(flags):
        cfg, _ = dr.parse(["--out", str(tmp_path), *TINY, *more])
        student, rae, checkpoint = dr.load_pair(teacher, cfg)
        ema, _ = dr.train(student, dr.load_positives(rae, checkpoint, 10, cfg), cfg)
        seen.add(torch.cat([v.flatten() for v in ema.state_dict().values()]).double().abs().sum().item())
    assert len(seen) == len(flags)


def test_from_scratch_forgets_the_teacher(teacher, tmp_path):
    assert dr.main(["--teacher", str(teacher), "--out", str(tmp_path), "--init", "scratch", *TINY]) == 0
    scratch, taught = (torch.load(p, weights_only=True)["ema"] for p in (tmp_path / "student.pt", teacher))
    cos = torch.cosine_similarity(*(torch.cat([w.flatten() for k, w in sd.items() if "blocks" in k]) for sd in (scratch, taught)), 0)
    fresh = dr.DiTDH.from_state_dict(taught)
    torch.manual_seed(0)
    fresh.initialise()
    near = max((scratch[k] - v).abs().max().item() for k, v in fresh.state_dict().items())
    assert near < 0.05 < max((taught[k] - v).abs().max().item() for k, v in fresh.state_dict().items()) and cos < 0.9


def test_bad_checkpoints(teacher, tmp_path, capsys):
    bad, out = tmp_path / "bad.pt", ["--out", tmp_path / "o", *TINY]
    fails(capsys, "--teacher", tmp_path / "no.pt", *out, saying="no checkpoint at .*no.pt")
    bad.write_bytes(teacher.read_bytes()[:5000])
    fails(capsys, "--teacher", bad, *out, saying="bad.pt is damaged")
    bad.write_text("hello")
    fails(capsys, "--teacher", bad, *out, saying="bad.pt is damaged")
    torch.save({"weight": torch.zeros(3)}, bad)
    fails(capsys, "--teacher", bad, *out, saying="not a DiT.DH checkpoint")
    torch.save([1], bad)
    fails(capsys, "--teacher", bad, *out, saying="not a state dict")
    torch.save({"ema": 3}, bad)
    fails(capsys, "--teacher", bad, *out, saying="not a DiT.DH checkpoint")
    ck = torch.load(teacher, weights_only=True)
    ck["ema"]["final_layer.linear.bias"][0] = torch.nan
    torch.save(ck, bad)
    fails(capsys, "--teacher", bad, *out, saying="NaN")
    ck["ema"] = dr.DiTDH(2, 7, (16, 24), (1, 1), (2, 2), 10).state_dict()
    torch.save(ck, bad)
    fails(capsys, "--teacher", bad, *out, saying=r"\[7, 2, 2\].*\[48, 2, 2\]")
    ck = torch.load(teacher, weights_only=True)
    ck["ema"]["blocks.0.norm1.weight"] = torch.ones(5)
    torch.save(ck, bad)
    fails(capsys, "--teacher", bad, *out, saying="not a DiT.DH checkpoint")
    ck = torch.load(teacher, weights_only=True)
    del ck["rae"]["decoder"]["norm.weight"]
    torch.save(ck, bad)
    fails(capsys, "--teacher", bad, *out, saying="the autoencoder of .*norm.weight")
    del ck["rae"]  # an official one, whose autoencoder is elsewhere
    torch.save(ck, bad)
    fails(capsys, "--teacher", bad, *out, "--models", tmp_path, saying="no checkpoint at .*model.pt: run hf download")
    torch.save({"a": os.system}, bad)  # would have to be unpickled
    fails(capsys, "--teacher", bad, *out, saying="bad.pt is damaged or no torch checkpoint of plain tensors")


def test_bad_flags(teacher, tmp_path, capsys):
    run = ["--teacher", teacher, "--out", tmp_path]
    fails(capsys, "--unknown", saying="--unknown")
    fails(capsys, "--steps", "many", saying="--steps.*many")
    for flag, value in (("--steps", 0), ("--n-neg", 0), ("--n-extra-neg", -1), ("--temperatures", -0.1), ("--n-class", 11)):
        fails(capsys, *run, *TINY, flag, value, saying=flag)
    fails(capsys, *run, *TINY, "--device", "cuda:99", saying="--device cuda:99")
    fails(capsys, "--sample", 4, "--student", teacher, saying="--to")
    fails(capsys, "--to", tmp_path / "a.npz", saying="--sample")
    for flag, value in (("--lr", "nan"), ("--grad-clip", 0), ("--ema", 1), ("--seed", -1), ("--teacher-steps", 1),
                        ("--temperatures", "nan"), ("--lr-min", -1)):
        fails(capsys, *run, *TINY, flag, value, saying=flag)
    fails(capsys, "--preset", "imagenet256", "--out", tmp_path, saying="--teacher FILE")
    fails(capsys, "--sample", 4, "--student", teacher, "--to", tmp_path / "a.npz", "--classes", "1,12", saying="0 to 9")
    for classes in ("one", 10**20):
        fails(capsys, "--sample", 4, "--student", teacher, "--to", tmp_path / "a.npz", "--classes", classes, saying="1,5,9")


def test_what_is_there_is_not_overwritten(teacher, tmp_path, capsys, monkeypatch):
    run = ["--teacher", teacher, "--out", tmp_path, *TINY]
    assert dr.main([*map(str, run)]) == dr.main([*map(str, run)]) == 0      # a finished run may be done again
    (tmp_path / "student.pt").unlink()
    fails(capsys, *run, saying="unfinished run.*--resume")
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "old.png").write_text("")
    fails(capsys, "--sample", 4, "--student", teacher, "--to", tmp_path / "png", saying="is there already")
    fails(capsys, "--sample", 4, "--student", teacher, "--to", tmp_path / "png" / "old.png", saying="is there already")
    monkeypatch.setenv("WORLD_SIZE", "3")
    fails(capsys, *run, saying="each of the 3 processes needs a class")


def test_nan_stops_the_run_and_keeps_the_last_save(teacher, tmp_path, capsys):
    fails(capsys, "--teacher", teacher, "--out", tmp_path, *TINY, "--steps", 50, "--lr", 1e30, saying="NaN at step")
    state = tmp_path / "state.pt"
    assert not state.exists() or all(v.isfinite().all() for v in weights(state).values())


def test_a_full_gpu_says_what_helps(teacher, tmp_path, capsys, monkeypatch):
    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(dr, "drift_loss", full)
    fails(capsys, "--teacher", teacher, "--out", tmp_path, *TINY, saying="--grad-checkpoint: CUDA out of memory")


def test_a_dead_worker_ends_in_a_sentence(teacher, tmp_path, capsys, monkeypatch):
    data, main = folder_of_images(tmp_path / "data"), os.getpid()
    monkeypatch.setattr(dr, "center_crop", lambda *args: os._exit(1) if os.getpid() != main else None)
    fails(capsys, "--teacher", teacher, "--data", data, "--out", tmp_path, *TINY, saying="lower --workers.*exited unexpect")


def test_folders_that_cannot_be_written(teacher, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(capsys, "--teacher", teacher, "--out", tmp_path / "file" / "out", *TINY, saying="file")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "ro").mkdir(mode=0o555)
        fails(capsys, "--teacher", teacher, "--out", tmp_path / "ro", *TINY, saying="ro")
    fails(capsys, "--teacher", teacher, "--out", "/proc/out", *TINY, saying="/proc/out")


def test_what_the_readme_says_of_the_data():
    images, labels = load_digits()
    assert images.unique().tolist() == [0, 255]
    distance = torch.cdist(*2 * [images.double().flatten(1)]).fill_diagonal_(torch.inf)
    assert (labels[distance.argmin(1)] == labels).double().mean() == pytest.approx(0.897, abs=5e-4)
    halves = [torch.randperm(1740, generator=torch.Generator().manual_seed(seed)).chunk(2) for seed in range(10)]
    fd = [pixel_metrics(images[a], labels[a], images[b], labels[b])["fd"] for a, b in halves]
    assert np.mean(fd) == pytest.approx(0.17, abs=0.01) and np.ptp(fd) < 0.08


def test_full_disk(teacher, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # no file may grow beyond: state.pt would
    try:
        fails(capsys, "--teacher", teacher, "--out", tmp_path, *TINY, saying="cannot write .*state.pt")
        assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))      # nor now: 100 images would
        sample = "--sample", 100, "--student", teacher, "--to", tmp_path / "x.npz"
        fails(capsys, *sample, "--batch-size", 40, saying="cannot write .*x.npz, .*disk full")
        fails(capsys, *sample, saying="cannot write .*0.npy, .*disk full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert dr.main([*map(str, sample), "--batch-size", "40"]) == 0          # goes on, and cleans up
    assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".npz", ".part"}      # .part: of the third command


def test_files_are_old_or_new_never_half(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    def broken(f):
        f.write(b"half")
        raise OSError("disk full")
    with pytest.raises(dr.UserError, match="disk full"):
        dr.write_atomically(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
