"""What the tests share: the command as its user meets it, tiny files, and comparisons of runs.

Started as a script, this file is drift_rae.py with the sizes of the tiny released files.
"""
import contextlib
import io
import re
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import drift_rae as dr  # noqa: E402

SCRIPT = Path(dr.__file__)
TINY = "--n-class 2 --n-pos 8 --n-neg 4 --n-extra-neg 4".split()
TINY_VIT = dict(img_size=98, patch_size=14, embed_dim=32, depth=3, num_heads=4)  # golden/rae.pt
TINY_HEADS = dict(num_heads=4)
# Names of the released files in the folder --models.
ENCODER = "dinov2_vitb14_reg4_pretrain.pth"
DECODER = "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
STATISTICS = "stats/dinov2/wReg_base/imagenet1k/stat.pt"
TEACHER = "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"
# Words of Python and torch that no sentence for a user may hold.
PYTHON = r"[a-z]Error\b|Traceback|weights_only|has no attribute|positional argument"


def tiny_network(input_size=2, channels=64, depth=(1, 1), heads=(2, 2), classes=10, std=0.1):
    """A DiT^DH whose weights are all random, so that its velocity depends on all of its inputs."""
    torch.manual_seed(0)
    model = dr.DiTDH(input_size, channels, (32, 48), depth, heads, classes)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model.eval()


def run(*flags, main=dr.main):
    main([str(flag) for flag in flags])


def refusal(*flags, main=dr.main):
    """The one line with which a command ends instead of doing what the flags ask for."""
    err = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        dr.run_as_script(partial(run, *flags, main=main))
    said = stop.value.code
    if said == 2:                                            # argparse has printed its own line
        err.seek(0)
        said = err.read().splitlines()[-1]
    assert len(said.splitlines()) == 1
    assert not re.search(PYTHON, said), said
    return said


def interrupted(step, *flags):
    """What the command says when Ctrl-C comes at this step."""
    train_step = dr.train_step

    def broken(student, ema, optimizer, positives, at, *more):
        if at == step:
            raise KeyboardInterrupt
        return train_step(student, ema, optimizer, positives, at, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dr, "train_step", broken)
        return refusal(*flags)


def wait_for(file, process):
    while not file.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def names(folder):
    return {path.name for path in folder.iterdir()}


def read(path):
    return torch.load(path, weights_only=True)


def tensors(content, name=""):
    """Nested dicts and lists -> {name: tensor}."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    parts = {}
    if isinstance(content, (dict, list)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            parts |= tensors(value, f"{name}.{key}")
    return parts


def distance(a, b):
    """The largest difference between two numbers of two contents of the same names."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def steps_saved(out):
    return len(read(out / "state.pt")["log"])


def log_rows(out):
    """The lines of OUT/log.csv without the last column, which is the time."""
    return [line.rpartition(",")[0] for line in (out / "log.csv").read_text().splitlines()]


def assert_same_run(a, b):
    """Two OUTs are equal bit for bit, and the second one's clock went on over a break."""
    for name in ("state.pt", "student.pt"):
        assert distance(read(a / name), read(b / name)) == 0
    assert log_rows(a) == log_rows(b)
    seconds = [row["seconds"] for row in read(b / "state.pt")["log"]]
    assert seconds == sorted(seconds)


if __name__ == "__main__":
    dr.VIT_B14.update(TINY_VIT)
    dr.DECODER_XL.update(TINY_HEADS)
    dr.run_as_script(dr.main)
