"""The command line as a user runs it, on tiny digits: break and resume, sample, every kind of bad input."""
import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import drift_rae as dr
from conftest import SCRIPT, run, same, sentence, table, wait_until
from toy import digits

TINY = "--n-class 2 --n-pos 8 --n-neg 4 --n-extra-neg 4".split()
FEW = [*TINY, "--steps", 2]


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """OUT of an unbroken run of 100 steps."""
    out = tmp_path_factory.mktemp("whole")
    run("--teacher", teacher, "--out", out, "--steps", 100, *TINY)
    return out


def test_what_a_run_leaves(teacher, whole):
    names = {"student.pt", "state.pt", "samples.png", "log.csv", "metrics.json"}
    assert {p.name for p in whole.iterdir()} == names and min(Image.open(whole / "samples.png").size) > 8 * 28
    metrics = json.loads((whole / "metrics.json").read_text())
    for row in "real reconstruction teacher_1step teacher_50step student_1step student_guided".split():
        assert {"fd", "precision", "recall", "label_accuracy"} <= metrics[row].keys()
        assert np.isfinite([*metrics[row].values()]).all()
        assert ("seconds_per_image" in metrics[row]) == ("teacher" in row or "student" in row)
    assert metrics["config"]["n_pos"] == 8 and metrics["seed"] == 0 and "torch" in metrics["versions"]
    assert metrics["seconds"]["total"] > metrics["seconds"]["distil"] > 0
    log = (whole / "log.csv").read_text().splitlines()
    assert log[0] == "step,scale,drift_0.02,drift_0.05,drift_0.2,loss,grad_norm,seconds" and len(log) == 101
    assert np.isfinite(np.loadtxt(log[1:], delimiter=",")).all() and log[-1].startswith("99,")
    state, ours = (torch.load(p, weights_only=True) for p in (whole / "state.pt", teacher))
    group = state["optimizer"]["param_groups"][0]
    assert tuple(group["betas"]) == (0.9, 0.95) and group["weight_decay"] == 0      # Table 8
    assert not any(torch.equal(state["student"][k], v) for k, v in ours["ema"].items() if "mlp.w3" in k)
    measure = digits.Metrics(ours)
    itself = measure(measure.images, measure.labels)
    assert abs(itself["fd"]) < 1e-3 and itself["precision"] == itself["recall"] == 1
    assert measure(255 - measure.images, measure.labels)["fd"] > 10 * measure(*measure.others)["fd"] > 0


def test_interrupt_and_resume_repeat_an_unbroken_run(teacher, whole, tmp_path, start, monkeypatch):
    state = tmp_path / "state.pt"
    process = start("--teacher", teacher, "--out", tmp_path, "--steps", 100, *TINY, "--save-every", 1)
    wait_until(state.exists, process)       # test_imagenet.py: SIGKILL, SIGTERM
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    step = torch.load(state, weights_only=True)["step"]
    assert process.returncode == 130 and f"step {step} is saved, go on with --resume" in err, err
    assert "Traceback" not in err and 0 < step < 100
    said = sentence("--teacher", teacher, "--out", tmp_path)
    assert f"holds a run at step {step} of 100: --resume" in said
    recompute, calls = dr.recompute, []
    monkeypatch.setattr(dr, "recompute", lambda *args, **how: calls.append(1) or recompute(*args, **how))
    run("--resume", "--out", tmp_path, "--grad-checkpoint")                 # less memory, the same gradients
    assert calls and same(whole / "state.pt", state) and same(whole / "student.pt", tmp_path / "student.pt")
    assert table(whole / "log.csv") == table(tmp_path / "log.csv")


def test_finished_runs_may_be_repeated_and_copied(teacher, tmp_path, monkeypatch):
    """Without --teacher the digits' is made, once. A copy has other times, and only state.pt counts."""
    made, (a, b) = [], (tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(digits, "make_teacher", lambda p, seed: made.append(seed) or shutil.copy(teacher, p))
    monkeypatch.setattr(digits, "report", lambda *args: None)
    run("--out", a, *FEW)
    shutil.copytree(a, b, copy_function=shutil.copyfile)
    os.utime(b / "student.pt", (0, 0))                                      # older than state.pt
    run("--out", b, *FEW)
    assert same(a / "student.pt", b / "student.pt")
    (b / "student.pt").unlink()
    run("--resume", "--out", b)                                             # all is done but to write it
    assert same(a / "student.pt", b / "student.pt")
    run("--out", b, "--seed", 1, *FEW)
    assert not same(a / "student.pt", b / "student.pt")
    run("--out", tmp_path / "c", "--seed", 7, *FEW)
    assert made == [0, 7]


def test_resume_keeps_its_configuration(whole, tmp_path):
    for flag, value in (("lr", 0.5), ("seed", 1), ("preset", "imagenet256")):
        said = sentence("--resume", "--out", whole, f"--{flag}", value)
        assert f"keeps its {flag}: leave that flag out" in said
    assert "nowhere/state.pt" in sentence("--resume", "--out", tmp_path / "nowhere")
    state, path = torch.load(whole / "state.pt", weights_only=True), tmp_path / "state.pt"
    state["config"]["shift"] = 3    # of another version
    torch.save(state, path)
    assert "state.pt is damaged or not what belongs there" in sentence("--resume", "--out", tmp_path)
    for content in (b"", b"hello", (whole / "state.pt").read_bytes()[:9999]):
        path.write_bytes(content)
        for flags in ([], ["--resume"]):                                    # nor is it overwritten
            assert "state.pt is damaged" in sentence("--out", tmp_path, *flags)
        assert path.read_bytes() == content


def test_sampling(whole, tmp_path):
    def draw(to, *more):
        run("--out", whole, "--to", tmp_path / to, *more)
        return np.load(tmp_path / to) if to.endswith("npz") else np.asarray(Image.open(tmp_path / to))
    a, b = draw("a.npz", "--sample", 23), draw("b.npz", "--sample", 23, "--batch-size", 4)
    assert a["arr_0"].shape == (23, 28, 28, 3) and a["arr_0"].dtype == np.uint8
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1 and (a["arr_1"] == b["arr_1"]).all()
    assert sorted(np.bincount(a["arr_1"])) == [2] * 7 + [3] * 3
    assert (a["arr_0"] != draw("c.npz", "--sample", 23, "--seed", 1)["arr_0"]).any()
    six = ["--student", whole / "student.pt", "--classes", "3,7", "--sample", 6]
    assert sorted(draw("d.npz", *six)["arr_1"]) == [3, 3, 3, 7, 7, 7]
    assert (draw("a.png", *six) != (guided := draw("b.png", *six, "--guidance", 5))).any()
    cfg, labels = dr.Config(device="cpu"), torch.tensor([3, 3, 3, 7, 7, 7])         # a row a class
    model, rae, _ = dr.load_pair(whole / "student.pt", cfg)
    with torch.no_grad():
        expected = dr.generate(lambda z, y: dr.one_step(dr.guide(model, 5), z, y), rae, labels, cfg).numpy()
    cells = guided[1:, 1:].reshape(2, 29, 3, 29, 3).swapaxes(1, 2)[:, :, :28, :28].reshape(expected.shape)
    assert np.abs(cells.astype(int) - expected).max() <= 1
    assert {p.name for p in tmp_path.iterdir()} == {"a.npz", "b.npz", "c.npz", "d.npz", "a.png", "b.png"}
    assert "--sample a multiple of 2, not 5" in sentence(*six[:-1], 5, "--to", tmp_path / "x.png")
    for name in ("1,12", "one", "-1", 10**20):
        assert "classes 0 to 9" in sentence(*six, f"--classes={name}", "--to", tmp_path / "x.npz")


def test_each_flag_of_the_method_changes_what_is_learnt(teacher, tmp_path, monkeypatch):
    compiler, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda m, **_: compiled.append(m) or compiler(m, backend="eager"))
    flags = ("", "--y-softmax", "--no-perturb", "--n-extra-neg 0", "--temperatures 0.1", "--windows 2",
             "--windows 1 2", "--dtype bf16", "--ema 0.9", "--ema-warmup 1", "--lr 1e-4", "--compile")
    results, (model, rae, ours) = [], dr.load_pair(teacher, dr.Config(device="cpu"))
    latents = dr.encode(rae, ours["images"], dr.Config(device="cpu"))
    for more in flags:
        cfg, _ = dr.parse(f"--device cpu --steps 3 {' '.join(TINY)} {more}".split())
        cfg.out = str(tmp_path)
        ema = dr.distil(copy.deepcopy(model), latents, ours["labels"].numpy(), cfg)
        results.append(torch.nn.utils.parameters_to_vector(ema.parameters()).double().norm().item())
    assert results.pop() == pytest.approx(results[0], abs=1e-6) and len(compiled) == 1      # --compile
    assert len(set(results)) == len(flags) - 1 and np.ptp(results) < 1


def test_bad_checkpoints(teacher, tmp_path):
    bad, more = tmp_path / "bad.pt", ["--out", tmp_path / "o", "--models", tmp_path, *FEW]
    ours, damaged = torch.load(teacher, weights_only=True), "bad.pt is damaged or not what belongs there"
    assert re.search("No such file or directory.*bad.pt", sentence("--teacher", bad, *more))

    def changed(part, key, value):
        return ours | {part: {k: v for k, v in (ours[part] | {key: value}).items() if v is not None}}
    other = dr.DiTDH(2, 7, (16, 24), (1, 1), (2, 2), 10).state_dict()
    for content, saying in (
            (b"", damaged), (b"hello", damaged), (teacher.read_bytes()[:5000], damaged), ([1], damaged),
            ({"ema": 3}, damaged), ({"w": torch.zeros(3)}, damaged), ({"a": os.system}, damaged),   # a pickle
            (changed("ema", "final_layer.linear.bias", torch.full((64,), torch.nan)), "bias holds NaN"),
            (changed("ema", "blocks.0.norm1.weight", torch.ones(5)), damaged), (ours | {"rae": {}}, damaged),
            (changed("ema", "foreign", torch.ones(5)), "foreign"), (changed("rae", "mean", None), damaged),
            (ours | {"ema": other}, r"makes latents \[7, 2, 2\], its autoencoder \[64, 2, 2\]"),
            ({"ema": ours["ema"], "rae": ours["rae"]}, "name a folder of them with --data"),
            ({"ema": ours["ema"]}, "No such file.*dinov2_vitb14_reg4_pretrain.pth")):     # as official ones
        bad.write_bytes(content) if isinstance(content, bytes) else torch.save(content, bad)
        assert re.search(saying, sentence("--teacher", bad, *more))


def test_bad_flags(teacher, tmp_path, monkeypatch):
    bad = dict(seed=[-1], workers=[-1], steps=[0], n_class=[0], n_pos=[0], n_neg=[1], n_extra_neg=[-1],
               temperatures=[0, -0.1, "nan", "inf"], windows=[0], lr=[0, "nan", "inf"], ema=[0.4, 1.1],
               ema_warmup=[0], save_every=[0], sample=[-1], guidance=[11, "nan"], batch_size=[0])
    assert bad.keys() == {f.name for f in dataclasses.fields(dr.Config) if f.type in (int, float, tuple)}
    for name, values in bad.items():
        flag = "--" + name.replace("_", "-")
        for value in [*values, "many", 10**20]:
            assert flag in sentence("--out", tmp_path / "o", f"{flag}={value}")
    assert "--unknown" in sentence("--unknown") and "--preset" in sentence("--preset", "no")
    for flags in (["--sample", 4], ["--to", "a.npz"], ["--sample", 4, "--to", "a.jpg"]):
        assert "--sample N and --to FILE.npz or FILE.png" in sentence(*flags)
    assert not (tmp_path / "o").exists()
    here = ["--teacher", teacher, "--out", tmp_path, *FEW]
    if not torch.cuda.is_available():
        assert "--device" in sentence(*here, "--device", "cuda")
    assert "1 processes <= --n-class 11 <= classes of the teacher 10" in sentence(*here, "--n-class", 11)
    assert "a window of 3 does not divide a grid of [2, 2]" in sentence(*here, "--windows", 1, 3)
    assert "gradient is NaN or infinite at step 1" in sentence(*here, "--lr", 1e9, "--save-every", 1)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 1        # the step before
    monkeypatch.setenv("WORLD_SIZE", "8")   # --n-class matters neither to sampling nor, here, to --resume
    assert dr.parse(["--resume"]) and dr.parse(["--sample", "4", "--to", "a.npz"])
    with pytest.raises(ValueError, match="8 processes <= --n-class 2"):
        dr.run(dr.Config(teacher=str(teacher), n_class=2, device="cpu"), None, 0)


def test_a_full_disk_keeps_the_old_files_and_leaves_no_others(teacher, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(digits, "report", lambda *args: None)
    flags = ["--teacher", teacher, "--out", tmp_path / "out", *FEW]
    run(*flags)
    for out in (tmp_path / "out" / "log.csv" / "out", "/proc/out"):         # nor can these be written
        assert str(out) in sentence(*flags, "--out", out)
        assert str(out) in sentence("--sample", 4, "--student", teacher, "--to", f"{out}/a.npz")
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path / "out" / "state.pt").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))     # no file may grow larger
        assert re.search("cannot write .*state.pt, an old file is kept", sentence(*flags, "--seed", 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        assert sentence("--sample", 40, "--student", teacher, "--to", tmp_path / "x.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "out" / "state.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"state.pt", "student.pt", "log.csv"}


def test_imports_without_resource_and_fork():
    code = "import os, sys; sys.modules['resource'] = None; del os.fork; import drift_rae, toy.digits"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0
