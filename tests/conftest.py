"""Fixtures: a tiny digits teacher, tiny files of the released formats, and processes."""
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"         # in all processes: only then are bits equal
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # two ranks would ask for two GPUs

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import helpers  # noqa: E402
from toy import digits, runs  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's & makes all ignore it
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The file that toy/digits.py writes, but small, hardly trained, with 20 latents per class."""
    out = tmp_path_factory.mktemp("teacher with space ü")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "make_judge", partial(digits.make_judge, 20))
        patch.setitem(digits.ENCODER, "depth", 1)
        for name, value in {"width": 32, "depth": 1, "mlp_dim": 64}.items():
            patch.setitem(digits.DECODER, name, value)
        for name, value in {"hidden_size": (32, 48), "depth": (1, 1)}.items():
            patch.setitem(digits.TEACHER, name, value)
        helpers.run("--out", out, "--steps", 11, 11, 11, main=digits.main)
    assert helpers.names(out) == {"teacher.pt"}
    saved = helpers.read(out / "teacher.pt")
    assert saved["latents"].shape == (5000, 64, 2, 2)
    chosen = torch.cat([torch.nonzero(saved["labels"] == c)[:20, 0] for c in range(10)])
    few = {name: saved[name][chosen].clone() for name in ("latents", "labels")}
    torch.save(saved | few, out / "teacher.pt")
    return out / "teacher.pt"


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A folder with tiny models/ and train/, as the README's downloads leave them.

    The teacher has three classes. The seven noisy images of each have several sizes, modes and
    formats.
    """
    root = tmp_path_factory.mktemp("released ä")
    golden = helpers.read(Path(__file__).parent / "golden" / "rae.pt")
    teacher = helpers.tiny_network(4, 32, (2, 1), (4, 4), classes=3)
    contents = {helpers.DECODER: golden["decoder_state_dict"],
                helpers.ENCODER: golden["encoder_state_dict_native"],
                helpers.STATISTICS: {"mean": None, "var": golden["stats"]["var"]},
                helpers.TEACHER: teacher.state_dict()}
    for name, content in contents.items():
        path = root / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    rng = np.random.default_rng(0)
    for label in "012":
        folder = root / "train" / label
        folder.mkdir(parents=True)
        for i in range(7):
            pixels = rng.integers(0, 256, (20 + 9 * i, 60 - 5 * int(label), 3), dtype=np.uint8)
            ending = "JPEG" if i % 3 else "png"
            Image.fromarray(pixels).convert(["RGB", "L", "CMYK"][i % 3]).save(
                folder / f"{i}.{ending}")
    return root


@pytest.fixture(scope="session")
def commands(teacher, released):
    """Flags of a small run of each kind: latents in memory, and folders of images."""
    models = released / "models"
    return {"digits": ["--teacher", teacher, "--steps", 60, *helpers.TINY],
            "images": ["--preset", "imagenet256", "--teacher", models / helpers.TEACHER,
                       "--models", models, "--data", released / "train", "--steps", 30,
                       *helpers.TINY, "--workers", 1, "--batch-size", 4]}


@pytest.fixture(scope="module")
def tiny_sizes():
    """The script takes the released files to have the sizes of the tiny ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers.dr, "VIT_B14", helpers.TINY_VIT)
        patch.setitem(helpers.dr.DECODER_XL, "num_heads", helpers.TINY_HEADS["num_heads"])
        yield


@pytest.fixture
def no_report(monkeypatch):
    """A run ends without the digits' table, which takes longer than a tiny run."""
    monkeypatch.setattr(digits, "report", Mock())


@pytest.fixture
def launch():
    """launch(*flags) starts the script in a process group; ranks=n does so under torchrun."""
    started = []

    def launch(*flags, ranks=0, script=helpers.__file__):
        torchrun = []
        if ranks:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *torchrun, script, *map(str, flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:                           # it outlives its test
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def few(monkeypatch):
    """20 digits per class, as many as the teacher has latents, and no worker processes."""
    few = [x.unflatten(0, (10, 500))[:, :20].flatten(0, 1) for x in digits.load_digits()]
    monkeypatch.setattr(digits, "load_digits", lambda: few)

    def in_workers(work, jobs, workers):
        return [(key, work(job)) for key, job in jobs.items()]

    monkeypatch.setattr(runs, "in_workers", in_workers)
