"""The released files' formats, folders of images, caches and several processes: a rehearsal of ImageNet on a CPU.

Random tiny weights under the released files' own keys (tests/golden/rae.pt holds such encoder and decoder), generated
PNGs and JPEGs, and the very commands of the README's section "ImageNet-256".
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drift_rae as dr
import eval_fid
from test_cli import SCRIPT, fails, same, weights

DECODER = "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
ENCODER = "dinov2_vitb14_reg4_pretrain.pth"
TEACHER = "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"
TINY = "--steps 3 --n-class 2 --n-pos 6 --n-neg 3 --n-extra-neg 3 --teacher-steps 3 --workers 1 --batch-size 4".split()
CLASSES, PER_CLASS = 3, 7


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folder with models/ and train/ as the README's download commands leave them, but tiny."""
    root = tmp_path_factory.mktemp("released ä")
    golden = torch.load(Path(__file__).parent / "golden" / "rae.pt", weights_only=True)
    torch.manual_seed(0)
    teacher = dr.DiTDH(4, 32, (32, 48), (2, 1), (4, 4), CLASSES)
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.1)
    for name, content in ((DECODER, golden["decoder_state_dict"]), (ENCODER, golden["encoder_state_dict_native"]),
                          ("stats/dinov2/wReg_base/imagenet1k/stat.pt", golden["stats"]), (TEACHER, teacher.state_dict())):
        path = root / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        (root / "train" / f"n0{c}").mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = rng.integers(0, 256, (20 + 9 * i, 60 - 5 * c, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(("RGB", "L", "CMYK")[i % 3])
            image.save(root / "train" / f"n0{c}" / f"{i}{'.JPEG' if i % 3 else '.png'}")
    return root


def command(root, out, *more):
    return ["--preset", "imagenet256", "--teacher", root / "models" / TEACHER, "--models", root / "models",
            "--data", root / "train", "--out", out, *TINY, *more]


def run(*args):
    assert dr.main([str(a) for a in args]) == 0


def torchrun(n, *args, **kw):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", SCRIPT,
                             *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)


def test_rehearsal_train_kill_resume_sample_evaluate(released, tmp_path, capsys):
    run(*command(released, tmp_path / "whole", "--steps", 30, "--save-every", 1))
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, command(released, tmp_path / "out", "--steps", 30,
                                                                          "--save-every", 1))], stderr=subprocess.PIPE)
    while not (tmp_path / "out" / "state.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert torch.load(tmp_path / "out" / "state.pt", weights_only=True)["step"] < 30
    run("--resume", "--out", tmp_path / "out", "--workers", 0)
    assert same(tmp_path / "whole" / "student.pt", tmp_path / "out" / "student.pt")
    assert Image.open(tmp_path / "out" / "samples.png").size[0] > 4 * 16 * 6
    run("--sample", 12, "--student", tmp_path / "out" / "student.pt", "--models", released / "models",
        "--to", tmp_path / "samples.npz", "--batch-size", 5)
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].shape == (12, 16, 16, 3) and np.bincount(samples["arr_1"]).tolist() == [4, 4, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "samples.npz", "whole"]
    assert eval_fid.main([str(tmp_path / "samples.npz"), str(released / "train"), "--size", "16", "--features", "pixels",
                          "--json", str(tmp_path / "fid.json")]) in (0, None)
    assert np.isfinite(json.loads((tmp_path / "fid.json").read_text())["frechet_distance"])


def test_teachers_of_every_released_form(released, tmp_path):
    sd = torch.load(released / "models" / TEACHER, weights_only=True)
    for form in ({"ema": sd, "model": {}}, {"ema": {f"module.{k}": v for k, v in sd.items()}},
                 {f"_orig_mod.{k}": v for k, v in sd.items()}, {f"module._orig_mod.{k}": v for k, v in sd.items()},
                 {f"_orig_mod.module.{k}": v for k, v in sd.items()}):
        torch.save(form, tmp_path / "t.pt")
        loaded = dr.load_teacher(tmp_path / "t.pt").state_dict()
        assert loaded.keys() == sd.keys() and all(torch.equal(loaded[k], sd[k]) for k in sd)


def test_encoder_from_hub_cache_or_network(released, tmp_path, monkeypatch):
    Offline = namedtuple("Offline", "models")
    calls = []
    sd = torch.load(released / "models" / ENCODER, weights_only=True)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **kw: calls.append((url, kw)) or sd)
    encoder, patch = dr.load_encoder(Offline(tmp_path))
    assert patch == 14 and all(torch.equal(v, sd[k]) for k, v in encoder.state_dict().items())
    assert calls[0][0].endswith(ENCODER) and calls[0][1]["weights_only"]

    def fail(url, **kw):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(dr.UserError, match=f"(?s)run curl .*{ENCODER}.*no network"):
        dr.load_encoder(Offline(tmp_path))


def test_files_that_are_missing_name_the_command(released, tmp_path, capsys):
    models = shutil.copytree(released / "models", tmp_path / "models")
    for name in ("stats/dinov2/wReg_base/imagenet1k/stat.pt", DECODER):
        (models / name).unlink()
        fails(capsys, *command(released, tmp_path / "o", "--models", models), saying=f"{Path(name).name}: run hf download")


def test_unreadable_images_and_small_classes(released, tmp_path, capsys):
    data = shutil.copytree(released / "train", tmp_path / "train")
    (data / "n00" / "1.JPEG").write_bytes((data / "n00" / "1.JPEG").read_bytes()[:200])     # cut off
    (data / "n01" / "3.png").write_text("no image")
    for i in (0, 2, 3, 4):
        next((data / "n02").glob(f"{i}.*")).unlink()
    run(*command(released, tmp_path / "out", "--data", data, "--n-class", 3, "--n-pos", 7))
    out, err = capsys.readouterr()
    assert out.count("drawn with replacement") == 1 and "class 2 with 3" in out
    assert err.count("unreadable image") == 2 and "1.JPEG" in err and "3.png" in err and "(2 so far)" in err
    for path in (data / "n02").iterdir():
        path.write_text("no image")
    assert dr.main([*map(str, command(released, tmp_path / "out2", "--data", data, "--n-class", 3))]) == 2
    assert "none of 6 images can be read" in capsys.readouterr().err


def test_positives_are_of_the_class_that_was_asked_for(released, tmp_path):
    cfg = dr.Config(data=str(released / "train"), n_pos=5, device="cpu", flip=True, workers=2)
    source = dr.Images(cfg.data, 16)
    positives = dr.Positives(source, CLASSES, cfg)
    pairs = [(step, c) for step in range(4) for c in range(CLASSES)]
    flips = 0
    for (step, c), x in zip(pairs, dr.read(source, (positives.draw(*p) for p in pairs), cfg, 2), strict=True):
        index, flip = positives.draw(step, c)
        assert set(index) <= set(range(c * PER_CLASS, (c + 1) * PER_CLASS)) and len(set(index)) == 5
        for i, f, image in zip(index, flip, x.numpy()):
            with Image.open(source.paths[i]) as expected:
                expected = np.asarray(dr.center_crop(expected.convert("RGB"), 16))
            assert (image == (expected[:, ::-1] if f else expected)).all()
        flips += flip.sum()
    assert 15 < flips < 45      # of 60


def test_cache_resumes_and_serves_without_the_images(released, tmp_path, capsys, monkeypatch):
    base = command(released, tmp_path / "direct", "--dtype", "fp32")
    base.remove("--data"), base.remove(released / "train")
    run(*base, "--data", released / "train", "--no-flip")
    cached = ["--data", released / "train", "--cache", tmp_path / "cache", "--no-flip"]
    write, calls = dr.encode, []

    def broken(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)
    monkeypatch.setattr(dr, "encode", broken)
    assert dr.main([*map(str, base), *map(str, cached), "--out", str(tmp_path / "a")]) == 130
    fails(capsys, *base, "--latents", tmp_path / "cache", saying="unfinished cache, 1 classes are missing")
    monkeypatch.setattr(dr, "encode", lambda *args: calls.append(1) or write(*args))
    del calls[:]
    run(*base, *cached, "--out", tmp_path / "a")
    assert len(calls) == 1 + 3 * 2                  # the one class that was left, and two in each of the steps
    # the cache is the latents in half precision: so close that three steps hardly differ
    a, b = weights(tmp_path / "direct" / "student.pt"), weights(tmp_path / "a" / "student.pt")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-4
    x = np.concatenate([np.load(tmp_path / "cache" / f"{c:05d}.npy") for c in range(CLASSES)])
    assert x.dtype == np.float16
    cfg = dr.Config(device="cpu", models=str(released / "models"))
    rae = dr.load_rae({}, cfg)
    images, _ = dr.Images(released / "train", 16)[(np.arange(CLASSES * PER_CLASS), np.zeros(CLASSES * PER_CLASS))]
    assert np.allclose(x, rae.encode(dr.to_float(images)).numpy(), rtol=1e-3, atol=1e-3)
    # elsewhere, without the images
    run(*base, "--latents", shutil.copytree(tmp_path / "cache", tmp_path / "moved"), "--out", tmp_path / "b")
    assert same(tmp_path / "a" / "student.pt", tmp_path / "b" / "student.pt")
    # what does not belong to it is refused
    data = shutil.copytree(released / "train", tmp_path / "train")
    next((data / "n00").iterdir()).rename(data / "n00" / "zz.png")
    fails(capsys, *base, *cached, "--data", data, "--out", tmp_path / "c", saying="cache of other images")
    fails(capsys, *base, *cached, "--seed", 1, "--flip", saying="another encoder, --dtype, --flip")
    fails(capsys, *base, "--latents", data, saying="is no cache: make it with")
    fails(capsys, *base, *cached, "--latents", tmp_path / "cache", saying="--latents DIR stands in place of --data")
    for file in (tmp_path / "moved").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-1])
    fails(capsys, *base, "--latents", tmp_path / "moved", "--out", tmp_path / "c", saying=r"0\d.npy: .*mend")
    (tmp_path / "moved" / "cache.json").write_text("{")
    fails(capsys, *base, *cached, "--cache", tmp_path / "moved", saying="cache.json is damaged")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("U", "free")(10_000))
    fails(capsys, *base, *cached, "--cache", tmp_path / "full", saying="do not fit into")


def test_one_and_two_processes_train_alike(released, tmp_path):
    run(*command(released, tmp_path / "1", "--dtype", "fp32", "--n-class", 3))
    process = torchrun(2, *command(released, tmp_path / "2", "--dtype", "fp32", "--n-class", 3))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    a, b = (weights(tmp_path / n / "state.pt") for n in "12")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    start = weights_of_teacher(released)
    assert any((a[f"student.{k}"] - v).abs().max() > 1e-5 for k, v in start.items())     # it did move
    rows = [[[float(v) for v in line.split(",")] for line in (tmp_path / n / "log.csv").read_text().splitlines()[1:]]
            for n in "12"]
    assert np.allclose(np.delete(rows[0], 3, 1), np.delete(rows[1], 3, 1), rtol=1e-4) and len(rows[0]) == 3
    # both ranks sample; the images do not depend on their number
    sample = ["--sample", 11, "--student", tmp_path / "1" / "student.pt", "--models", released / "models", "--batch-size", 2]
    run(*sample, "--to", tmp_path / "1.npz")
    process = torchrun(2, *sample, "--to", tmp_path / "2.npz")
    assert process.wait(120) == 0
    a, b = np.load(tmp_path / "1.npz"), np.load(tmp_path / "2.npz")
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1 and (a["arr_1"] == b["arr_1"]).all()


def weights_of_teacher(released):
    return torch.load(released / "models" / TEACHER, weights_only=True)


def test_a_rank_that_dies_ends_the_run(released, tmp_path):
    process = torchrun(2, *command(released, tmp_path, "--steps", 100_000, "--save-every", 1))
    while not (tmp_path / "state.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    parent = lambda pid: int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    ranks = [pid for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == process.pid]
    killed = next(pid for pid in ranks if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(killed), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode and "SIGKILL" in err or "Signal 9" in err
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] > 0


def test_sigterm_to_the_whole_group_saves_the_step(released, tmp_path):
    """As schedulers and torchrun send it: to the workers too, which must not die before the step is done."""
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, command(released, tmp_path, "--steps", 100_000, "--workers",
                                2, "--save-every", 1))], start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "state.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with --resume" in err and "Traceback" not in err, err


def test_interrupted_sampling_goes_on(released, tmp_path, capsys, monkeypatch):
    run(*command(released, tmp_path / "out"))
    sample = ["--sample", 11, "--student", tmp_path / "out" / "student.pt", "--models", released / "models",
              "--batch-size", 3]
    run(*sample, "--to", tmp_path / "whole.npz")
    run(*sample, "--to", tmp_path / "whole")
    write = dr.to_uint8
    for to in ("a.npz", "a"):
        made = []

        def broken(x):
            made.append(len(x))
            if len(made) == 3:
                raise KeyboardInterrupt
            return write(x)
        monkeypatch.setattr(dr, "to_uint8", broken)
        assert dr.main([*map(str, sample), "--to", str(tmp_path / to)]) == 130
        run(*sample, "--to", tmp_path / f"other{to}", "--seed", 1)
        monkeypatch.setattr(dr, "to_uint8", lambda x: made.append(len(x)) or write(x))
        del made[:]
        run(*sample, "--to", tmp_path / to)
        assert made == [3, 2]                       # batches 2 and 3: 0 and 1 were there
    a, b, whole = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "othera.npz", "whole.npz"))
    assert (a == whole).all() and (a != b).any()    # another seed, other images
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [p.name for p in sorted((tmp_path / "whole").iterdir())]
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]


def test_checkpointing_changes_memory_and_not_the_gradient(released):
    pos, gradients = torch.randn(4, 32, 4, 4), []
    for on in (False, True):
        model = dr.load_teacher(released / "models" / TEACHER)
        model.grad_checkpoint = on
        dr.class_gradient(model, pos, 0, 0, dr.Config(device="cpu", n_neg=4, n_extra_neg=2))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients) and gradients[0].norm() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan_predicts_the_peak_memory(checkpointing):
    """Against the kernel's high-water mark, on the digits' network, with samples enough to see it."""
    code = f"""
import dataclasses, torch, drift_rae as dr
from pathlib import Path
from toy.digits import TEACHER
def peak():
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024
torch.set_num_threads(1)
cfg = dr.Config(device='cpu', n_neg=1024, n_extra_neg=1024, n_pos=1024, grad_checkpoint={checkpointing})
model = dr.DiTDH(**TEACHER | dict(depth=(12, 1))).eval()
model.grad_checkpoint = cfg.grad_checkpoint
predicted = dr.cost_of_a_class(model, cfg)[0]
dr.class_gradient(model, torch.randn(4, 48, 2, 2), 0, 0, dataclasses.replace(cfg, n_neg=4, n_extra_neg=4, n_pos=4))
pos = torch.randn(cfg.n_pos, 48, 2, 2)
Path('/proc/self/clear_refs').write_text('5')
before = peak()
dr.class_gradient(model, pos, 0, 0, cfg)
print(predicted, peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True,
                         env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})     # freed memory goes back at once
    assert out.returncode == 0, out.stderr
    predicted, real = map(float, out.stdout.split())
    print(predicted, real)
    assert abs(predicted / real - 1) < 0.25


def test_plan_prints_what_a_run_costs(capsys, released, tmp_path):
    run("--plan", "--out", tmp_path)
    out = capsys.readouterr().out
    assert "1.1 M parameters" in out and "450 steps: " in out and "moving average" in out and not list(tmp_path.iterdir())
    run(*command(released, tmp_path), "--plan", "--data", "")
    assert "hours" in capsys.readouterr().out
