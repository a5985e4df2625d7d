"""The embedded default: 5,000 real digits -> a tiny RAE, a flow teacher, a judge and the report.

    python toy/digits.py [--out out] [--seed 0]    out/teacher.pt, as drift_rae.py makes it itself

In place of DINOv2 stands a small ViT, trained here on the labels: its features cluster by class.
Cross-entropy alone would collapse a class to a point, so a linear reconstruction is trained, too.

mnist.png: MNIST, Y. LeCun, C. Cortes, C. J. C. Burges, CC BY-SA 3.0. Row = class, 500 tiles a row.
"""
import argparse
import csv
import json
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (RAE, Decoder, DiTDH, ViT, build_rae, command, encode,  # noqa: E402
                       flow_matching_loss, generate, guide, load_teacher, ode_sample, one_step,
                       pixel_logits, require, to_uint8, update_average, write_atomically)
from toy.plot import panels  # noqa: E402
from toy.runs import Metrics, grey, judge_network  # noqa: E402

ENCODER = dict(img_size=28, patch_size=14, embed_dim=64, depth=3, num_heads=4, num_registers=4,
               mlp_ratio=4)
DECODER = dict(latent_dim=64, width=128, depth=3, num_heads=4, mlp_dim=256, patch_size=14, grid=2)
TEACHER = dict(input_size=2, in_channels=64, hidden_size=(96, 128), depth=(3, 1), num_heads=(4, 4),
               num_classes=10)
STEPS = (400, 1000, 5000)   # of encoder, decoder and teacher
TITLES = {"real": "real", "reconstruction": "real, through the RAE",
          "teacher_1step": "teacher, 1 step", "teacher_50step": "teacher, 50 grid points",
          "student_1step": "student, 1 step", "student_guided": "student, guidance 0.1"}

def load_digits():
    """-> images uint8 [5000,28,28,3], black 0 and white 255; labels int64 [5000]."""
    sheet = np.array(Image.open(Path(__file__).with_name("mnist.png")))
    tiles = sheet.reshape(10, 28, 500, 28).swapaxes(1, 2)       # [10,500,28,28]
    channel = torch.from_numpy(tiles).reshape(5000, 28, 28)
    images = torch.stack([channel, channel, channel], -1)
    return images, torch.arange(10).repeat_interleave(500)

def turned(images):
    """Images [B,C,H,W], each under a random affine map close to the identity."""
    maps = torch.eye(2, 3) + 0.1 * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(maps, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)

def fit(params, loss, n, steps, lr, name, batch=256, after=None):
    """AdamW with a one-cycle rate on loss(i), i being `batch` random indices below n; after(),
    if given, is called after each step.
    """
    params = list(params)
    optimizer = torch.optim.AdamW(params, lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1,
                                                   cycle_momentum=False)
    for _ in trange(steps, desc=name):
        value = loss(torch.randint(n, (batch,)))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if after:
            after()

def make_rae(images, labels, steps):
    """Train the encoder, then the decoder -> what build_rae reads. images [n,3,28,28] in [0,1]."""
    dim, patch = ENCODER["embed_dim"], ENCODER["patch_size"]
    encoder, decoder = ViT(**ENCODER), Decoder(**DECODER)
    classify = nn.Linear(4 * dim, 10)
    reconstruct = nn.Linear(dim, patch**2)
    mean, var = torch.zeros(dim, 2, 2), torch.ones(dim, 2, 2)
    rae = RAE(encoder, decoder, mean, var, input_size=28)

    def encoder_loss(i):
        x = turned(images[i])
        tokens = rae.encode(x).flatten(2).mT                    # [B,4,D]
        patches = F.unfold(x[:, :1], patch, stride=patch).mT    # [B,4,196]
        class_loss = F.cross_entropy(classify(tokens.flatten(1)), labels[i])
        pixel_loss = F.mse_loss(reconstruct(tokens), patches)
        return class_loss + 100 * pixel_loss                    # 10 would lose the strokes

    learned = nn.ModuleList([encoder, classify, reconstruct]).requires_grad_(True)
    fit(learned.parameters(), encoder_loss, len(images), steps[0], 2e-3, "encoder")
    with torch.no_grad():
        latents = rae.encode(images)
    mean, var = latents.mean(0), latents.var(0)
    rae = RAE(encoder, decoder, mean, var, input_size=28)       # freezes both
    latents = rae.encode(images)

    def decoder_loss(i):
        # as in RAE, noisy latents: the decoder must mend what a generator gets slightly wrong
        level = 0.6 * torch.rand(len(i), 1, 1, 1)
        noise = level * torch.randn_like(latents[i])
        logits = pixel_logits(rae.decode(latents[i] + noise))
        return F.binary_cross_entropy_with_logits(logits, images[i])

    decoder.requires_grad_(True)
    fit(decoder.parameters(), decoder_loss, len(images), steps[1], 2e-3, "decoder", batch=128)
    saved = {"encoder_args": ENCODER, "decoder_args": DECODER, "input_size": 28, "sigmoid": True}
    weights = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    return saved | weights | {"mean": mean, "var": var}

def train_flow(model, latents, labels, steps, lr=4e-3, batch=128, decay=0.995, seed=0):
    """A flow teacher of latents [n,D,h,w] with labels [n] -> the moving average of its weights."""
    torch.manual_seed(seed)
    ema = deepcopy(model).requires_grad_(False).eval()

    def loss(i):
        return flow_matching_loss(model, latents[i], labels[i])

    average = partial(update_average, ema, model, decay)
    fit(model.parameters(), loss, len(latents), steps, lr, "teacher", batch, average)
    return ema

def make_judge(steps=500):
    """A classifier of the digits: the same for every --seed, so that all runs are comparable."""
    torch.manual_seed(0)
    images, labels = load_digits()
    pixels = grey(images)
    judge = judge_network()

    def loss(i):
        logits = judge(turned(pixels[i]))
        return F.cross_entropy(logits, labels[i])

    fit(judge.parameters(), loss, len(images), steps, 2e-3, "judge", batch=128)
    return judge

def make_teacher(path, seed=0, steps=STEPS):
    """Train RAE, flow teacher and judge and write them to path, with the images."""
    torch.manual_seed(seed)
    images, labels = load_digits()
    pixels = images.permute(0, 3, 1, 2) / 255
    rae = make_rae(pixels, labels, steps[:2])
    latents = build_rae(rae).encode(pixels)
    teacher = train_flow(DiTDH(**TEACHER), latents, labels, steps[2], seed=seed)
    checkpoint = {"ema": teacher.state_dict(), "rae": rae, "images": images, "labels": labels}
    checkpoint["judge"] = make_judge().state_dict()
    with write_atomically(Path(path)) as file:
        torch.save(checkpoint, file)

def report(student, rae, checkpoint, cfg, began):
    """Print the table; write OUT/samples.png and metrics.json. drift_rae.py began at `began`.

    Every row is as many images against the same half R of the real ones: `real` is the other
    half, `reconstruction` is R through the RAE. The generators have seen both halves.
    """
    out, measure = Path(cfg.out), Metrics(checkpoint)
    teacher = load_teacher(cfg.teacher or out / "teacher.pt").to(cfg.device)
    samplers = {"teacher_1step": partial(one_step, teacher),
                "teacher_50step": partial(ode_sample, teacher, steps=50),
                "student_1step": partial(one_step, student),
                "student_guided": partial(one_step, guide(student, 0.1))}
    labels = measure.labels
    rebuilt = to_uint8(rae.decode(encode(rae, measure.images, cfg)))
    images = {"real": measure.images, "reconstruction": rebuilt}
    rows = {"real": measure(*measure.others), "reconstruction": measure(rebuilt, labels)}
    for name, sampler in samplers.items():
        generate(sampler, rae, labels[:cfg.batch_size], cfg)    # a warm-up, not timed
        start = time.perf_counter()
        images[name] = generate(sampler, rae, labels, cfg)
        seconds = time.perf_counter() - start
        rows[name] = measure(images[name], labels)
        rows[name]["seconds_per_image"] = seconds / len(labels)
    print_table(rows)

    eight = [torch.nonzero(labels == c)[:8] for c in range(10)]     # of each class
    eight = torch.cat(eight).flatten()
    picture = panels({TITLES[name]: images[name][eight] for name in images}, rows=10)
    with write_atomically(out / "samples.png") as file:
        picture.save(file, "PNG")
    with open(out / "log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    rows["config"], rows["seed"] = vars(cfg), cfg.seed
    rows["versions"] = {"torch": torch.__version__}
    total = time.perf_counter() - began
    rows["seconds"] = {"distil": float(last["seconds"]), "total": total}
    with write_atomically(out / "metrics.json", "w") as file:
        json.dump(rows, file, indent=1)

def print_table(rows):
    """rows: {name: what Metrics gives, perhaps with seconds_per_image}."""
    print("\n                  Fréchet    prec.   recall    label  nearest ms/image")
    for name, row in rows.items():
        line = f"{name:16}"
        for metric in ("fd", "precision", "recall", "label_accuracy", "nearest_real"):
            line += f" {row[metric]:8.3f}"
        if "seconds_per_image" in row:
            milliseconds = 1e3 * row["seconds_per_image"]
            line += f" {milliseconds:8.3f}"
        print(line)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of teacher.pt (default: out)")
    add("--seed", type=int, default=0, help="of all but the judge (default: 0)")
    add("--steps", type=int, nargs=3, default=STEPS, help="of encoder, decoder and teacher")
    args = parser.parse_args(argv)
    require(min(args.steps) > 10, "--steps: at least 11 each, a tenth is the warm-up of the rate")
    args.out.mkdir(parents=True, exist_ok=True)
    make_teacher(args.out / "teacher.pt", args.seed, args.steps)

if __name__ == "__main__":
    command(main)
