"""The embedded default: 5,000 real handwritten digits -> a tiny RAE, a flow teacher, a judge and the report.

    python toy/digits.py [--out out] [--seed 0]      writes out/teacher.pt (drift_rae.py does so by itself)

In place of DINOv2 stands a small ViT trained here on the digits' own labels: its features cluster by class.
Cross-entropy alone would collapse each class to a point, so a linear reconstruction is trained with it.

mnist.png: MNIST, Y. LeCun, C. Cortes and C. J. C. Burges, CC BY-SA 3.0. Row = class, 500 tiles a row.
"""
import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (RAE, Decoder, DiTDH, ViT, build_rae, command, encode, generate, guide,  # noqa: E402
                       load_teacher, ode_sample, one_step, to_uint8, train_flow, write_atomically)
from eval_fid import frechet_distance, mean_and_covariance, precision_recall  # noqa: E402
from toy.plot import panels  # noqa: E402

ENCODER = dict(img_size=28, patch_size=14, embed_dim=64, depth=3, num_heads=4, num_registers=4, mlp_ratio=4)
DECODER = dict(latent_dim=64, width=128, depth=3, num_heads=4, mlp_dim=256, patch_size=14, grid=2)
TEACHER = dict(input_size=2, in_channels=64, hidden_size=(128, 192), depth=(3, 1), num_heads=(4, 4),
               num_classes=10)
STEPS = (400, 500, 3000)    # of encoder, decoder and teacher


def load_digits():
    """-> images uint8 [5000,28,28,3], black 0 and white 255; labels int64 [5000]."""
    sheet = np.asarray(Image.open(Path(__file__).with_name("mnist.png")))            # [280,14000]
    tiles = sheet.reshape(10, 28, 500, 28).transpose(0, 2, 1, 3).reshape(5000, 28, 28, 1)
    images = torch.from_numpy(tiles.copy()).expand(-1, -1, -1, 3).contiguous()
    return images, torch.arange(10).repeat_interleave(500)


def fit(params, loss, n, steps, lr, name, batch=256):
    """AdamW with a one-cycle rate on loss(indices); `batch` indices below n are drawn for each step."""
    params = list(params)
    optimizer = torch.optim.AdamW(params, lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1, cycle_momentum=False)
    for _ in trange(steps, desc=name):
        value = loss(torch.randint(n, (batch,)))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()


def turned(images, strength=0.1):
    """Images [B,C,H,W], each under a random affine map close to the identity."""
    maps = torch.eye(2, 3) + strength * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(maps, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def make_rae(images, labels, steps):
    """Train the encoder, then the decoder on it -> what build_rae reads. images [n,3,28,28] in [0,1]."""
    dim, patch, n = ENCODER["embed_dim"], ENCODER["patch_size"], len(images)
    encoder, decoder = ViT(**ENCODER), Decoder(**DECODER)
    classify, reconstruct = nn.Linear(4 * dim, 10), nn.Linear(dim, patch**2)
    rae = RAE(encoder, decoder, torch.zeros(dim, 2, 2), torch.ones(dim, 2, 2), input_size=28)

    def features(i):
        x = turned(images[i])
        tokens = rae.encode(x).flatten(2).mT                                 # [B,4,D]
        patches = F.unfold(x[:, :1], patch, stride=patch).mT                 # [B,4,196]
        # with a weight of 10 the latents would lose the strokes
        return (F.cross_entropy(classify(tokens.flatten(1)), labels[i])
                + 100 * F.mse_loss(reconstruct(tokens), patches))

    encoder.requires_grad_(True)
    learned = [p for net in (encoder, classify, reconstruct) for p in net.parameters()]
    fit(learned, features, n, steps[0], 2e-3, "encoder")
    with torch.no_grad():
        latents = rae.encode(images)
        mean, var = latents.mean(0), latents.var(0)
    rae = RAE(encoder, decoder, mean, var, input_size=28)                    # freezes them
    latents = rae.encode(images)

    def likelihood(i):
        # as in RAE, noisy latents: the decoder must mend what a generator gets slightly wrong
        noise = 0.4 * torch.rand(len(i), 1, 1, 1) * torch.randn_like(latents[i])
        logits = 6 * rae.decode(latents[i] + noise) - 3                      # those of RAE's sigmoid
        return F.binary_cross_entropy_with_logits(logits, images[i])

    decoder.requires_grad_(True)
    fit(decoder.parameters(), likelihood, n, steps[1], 2e-3, "decoder")
    return dict(encoder=encoder.state_dict(), encoder_args=ENCODER, decoder=decoder.state_dict(),
                decoder_args=DECODER, mean=mean, var=var, input_size=28, sigmoid=True)


def judge_network():
    """Grey images [B,1,28,28] in [0,1] -> logits [B,10]; without the last layer, 64 features for Metrics."""
    return nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(),
                         nn.Flatten(), nn.Linear(64 * 49, 64), nn.GELU(), nn.Linear(64, 10))


def make_judge(steps=500):
    """A classifier of the digits: the same for every --seed, so that all runs are comparable."""
    with torch.random.fork_rng(devices=[]):             # the rest draws as if it were not here
        torch.manual_seed(0)
        images, labels = load_digits()
        grey = images.permute(0, 3, 1, 2)[:, :1] / 255
        judge = judge_network()
        loss = lambda i: F.cross_entropy(judge(turned(grey[i])), labels[i])  # noqa: E731
        fit(judge.parameters(), loss, len(grey), steps, 2e-3, "judge", batch=128)
    return judge.requires_grad_(False).eval()


def make_teacher(path, seed=0, steps=STEPS):
    """Train RAE, flow teacher and judge and write them to path, with the images."""
    torch.manual_seed(seed)
    images, labels = load_digits()
    pixels = images.permute(0, 3, 1, 2) / 255
    saved = make_rae(pixels, labels, steps[:2])
    latents = build_rae(saved).encode(pixels)
    teacher = train_flow(DiTDH(**TEACHER), latents, labels, steps[2], seed=seed)
    checkpoint = {"ema": teacher.state_dict(), "images": images, "labels": labels, "rae": saved,
                  "judge": make_judge().state_dict()}
    write_atomically(Path(path), partial(torch.save, checkpoint))


class Metrics:
    """Measures images against R, every other image of the checkpoint; .others are the rest, the row `real`.

    Of images uint8 [n,28,28,3] and labels [n]: fd, precision and recall (k = 3) in the judge's features;
    label_accuracy, how often it sees the class that was asked for; nearest_real, the median distance in
    pixels to the nearest image of R, over the same within R: 1 is as new as data, 0 a copy.
    """

    def __init__(self, checkpoint):
        self.judge = judge_network().requires_grad_(False).eval()
        self.judge.load_state_dict(checkpoint["judge"])
        images, self.labels = checkpoint["images"], checkpoint["labels"][::2]
        self.others = images[1::2], checkpoint["labels"][1::2]
        self.images = images[::2]                                            # R
        self.pixels, self.features, _ = self.look(self.images)
        self.spacing = torch.cdist(self.pixels, self.pixels).fill_diagonal_(torch.inf).amin(1).median()

    def look(self, images):
        """-> grey pixels [n,784] in [0,1], features [n,64], the classes [n] that the judge sees."""
        grey = images[..., :1].permute(0, 3, 1, 2) / 255
        features = self.judge[:-1](grey)
        return grey.flatten(1), features, self.judge[-1](features).argmax(1)

    def __call__(self, images, labels):
        pixels, features, classes = self.look(images)
        precision, recall = precision_recall(self.features, features)
        distance = frechet_distance(*mean_and_covariance(features), *mean_and_covariance(self.features))
        return {"fd": distance, "precision": precision, "recall": recall,
                "label_accuracy": (classes == labels).double().mean().item(),
                "nearest_real": (torch.cdist(pixels, self.pixels).amin(1).median() / self.spacing).item()}


def print_table(rows):
    """rows: {name: what Metrics gives, perhaps with seconds_per_image}."""
    print("\n                  Fréchet    prec.   recall    label  nearest ms/image")
    for name, m in rows.items():
        numbers = [m[key] for key in ("fd", "precision", "recall", "label_accuracy", "nearest_real")]
        numbers += [1e3 * m["seconds_per_image"]] if "seconds_per_image" in m else []
        print(f"{name:17}" + " ".join(f"{number:8.3f}" for number in numbers))


def report(student, rae, checkpoint, cfg, began):
    """Print the table, write OUT/samples.png and OUT/metrics.json. drift_rae.py, begun at `began`, calls it.

    Every row is as many images against the same half R of the real ones: `real` is the other half,
    `reconstruction` is R through the RAE. The generators have seen both halves.
    """
    measure = Metrics(checkpoint)
    teacher = load_teacher(cfg.teacher or Path(cfg.out, "teacher.pt")).to(cfg.device)
    samplers = {"teacher_1step": partial(one_step, teacher),
                "teacher_50step": partial(ode_sample, teacher, steps=50),    # 50 grid points
                "student_1step": partial(one_step, student),
                "student_guided": partial(one_step, guide(student, 0.1))}
    rebuilt = to_uint8(rae.decode(encode(rae, measure.images, cfg)))
    images = {"real": measure.images, "reconstruction": rebuilt}
    rows = {"real": measure(*measure.others), "reconstruction": measure(rebuilt, measure.labels)}
    for name, sampler in samplers.items():
        generate(sampler, rae, measure.labels[:cfg.batch_size], cfg)         # a warm-up, not timed
        start = time.perf_counter()
        images[name] = generate(sampler, rae, measure.labels, cfg)
        seconds = (time.perf_counter() - start) / len(measure.labels)
        rows[name] = measure(images[name], measure.labels) | {"seconds_per_image": seconds}
    print_table(rows)
    shown = torch.cat([(measure.labels == c).nonzero()[:8, 0] for c in range(10)])
    titles = ("real", "real, through the RAE", "teacher, 1 step", "teacher, 50 grid points",
              "student, 1 step", "student, guidance 0.1")
    picture = panels({title: x[shown] for title, x in zip(titles, images.values())}, rows=10)
    write_atomically(Path(cfg.out, "samples.png"), partial(picture.save, format="PNG"))
    distilled = float(Path(cfg.out, "log.csv").read_text().rsplit(",", 1)[1])    # the last row's seconds
    rows |= {"config": vars(cfg), "seed": cfg.seed, "versions": {"torch": torch.__version__},
             "seconds": {"distil": distilled, "total": time.perf_counter() - began}}
    write_atomically(Path(cfg.out, "metrics.json"), lambda f: f.write(json.dumps(rows, indent=1).encode()))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train OUT/teacher.pt: a tiny RAE, a judge, a flow teacher.")
    parser.add_argument("--out", default="out", help="folder that receives teacher.pt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all but the judge (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs=3, default=STEPS, help="of encoder, decoder and teacher")
    args = parser.parse_args(argv)
    if min(args.steps) < 11:    # a tenth of them is the warm-up of the learning rate
        parser.error("--steps: each at least 11")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    make_teacher(Path(args.out, "teacher.pt"), args.seed, args.steps)


if __name__ == "__main__":
    command(main)
