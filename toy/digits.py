"""The embedded default: 1,740 real 8×8 digits -> a tiny RAE and a flow teacher, minutes on a CPU.

    python toy/digits.py [--out out] [--seed 0]      writes out/teacher.pt (drift_rae.py calls this by itself)

What DINOv2 is to ImageNet, a small ViT trained here on the digits' own labels is to the digits: a
stand-in, whose features cluster by class. Cross-entropy alone would collapse each class to a point
and leave nothing to reconstruct, so a little reconstruction is trained with it. Then it is frozen, and
decoder and teacher are trained on its latents as in the RAE paper.

digits.png: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, CC BY 4.0.
Row = class, 174 tiles of 8×8 a row; as shipped the pixels are binary (0 or 15).
"""
import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import RAE, Decoder, DiTDH, ViT, flow_matching_loss, move_average, to_float  # noqa: E402
from eval_fid import (Parser, exit_code, frechet_distance, mean_and_covariance, precision_recall,  # noqa: E402
                      write_atomically)

ENCODER = dict(img_size=8, patch_size=4, embed_dim=48, depth=3, num_heads=4, num_registers=4, mlp_ratio=4)
DECODER = dict(latent_dim=48, width=96, depth=2, num_heads=4, mlp_dim=192, patch_size=4, grid=2)
TEACHER = dict(input_size=2, in_channels=48, hidden_size=(96, 160), depth=(3, 1), num_heads=(4, 4), num_classes=10)
NOISE = 0.4                 # largest standard deviation of the noise on the decoder's latents in training
STEPS = (400, 400, 3000)    # of encoder, decoder and teacher


def load_digits():
    """-> images uint8 [1740,8,8,3], black 0 and white 255; labels int64 [1740]."""
    sheet = np.asarray(Image.open(Path(__file__).with_name("digits.png")))          # [80,1392]
    tiles = sheet.reshape(10, 8, 174, 8).transpose(0, 2, 1, 3).reshape(1740, 8, 8, 1)
    images = torch.from_numpy(tiles * 17).expand(-1, -1, -1, 3).contiguous()
    return images, torch.arange(10).repeat_interleave(174)


def fit(params, loss, steps, lr, seed, name, batch=256, n=1740):
    """AdamW with a one-cycle rate on loss(indices); `batch` indices below n are drawn for each step."""
    params, generator = list(params), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps, pct_start=0.1, cycle_momentum=False)
    bar = trange(steps, desc=name)
    for _ in bar:
        value = loss(torch.randint(n, (batch,), generator=generator))
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)


def make_rae(images, labels, seed, steps):
    """Train encoder, freeze it, train decoder -> RAE. images [1740,3,8,8] in [0,1]."""
    encoder, decoder = ViT(**ENCODER), Decoder(**DECODER)
    rae = RAE(encoder, decoder, torch.zeros(48, 2, 2), torch.ones(48, 2, 2), input_size=8)
    classify, reconstruct = nn.Linear(4 * 48, 10), nn.Linear(4 * 48, 3 * 64)

    def features(i):
        tokens = rae.encode(images[i]).flatten(1)
        return (F.cross_entropy(classify(tokens), labels[i])
                + F.mse_loss(reconstruct(tokens), images[i].flatten(1)))

    encoder.requires_grad_(True)
    fit([*encoder.parameters(), *classify.parameters(), *reconstruct.parameters()], features, steps[0], 2e-3, seed,
        "encoder")
    with torch.no_grad():
        latents = rae.encode(images)
    rae = RAE(encoder, decoder, latents.mean(0), latents.var(0), input_size=8)
    latents = rae.encode(images)

    def reconstruction(i):
        # as in RAE, noisy latents: the decoder must mend what a generator gets slightly wrong
        noisy = latents[i] + NOISE * torch.rand(len(i), 1, 1, 1) * torch.randn_like(latents[i])
        # the pixels are black or white, so a Bernoulli likelihood; the logit 4·(x − 1/2) lets x run past 0 and 1,
        # where clamping makes it sharp
        return F.binary_cross_entropy_with_logits(4 * (rae.decode(noisy) - 0.5), images[i])

    decoder.requires_grad_(True)
    fit(decoder.parameters(), reconstruction, steps[1], 2e-3, seed, "decoder")
    decoder.requires_grad_(False)
    return rae


def make_teacher(path, seed=0, steps=STEPS):
    """Train RAE and flow teacher and write them to path, self-contained: networks, statistics, images."""
    torch.manual_seed(seed)
    images, labels = load_digits()
    rae = make_rae(to_float(images), labels, seed, steps[:2])
    latents = rae.encode(to_float(images))
    teacher = DiTDH(**TEACHER)
    ema = copy.deepcopy(teacher).requires_grad_(False)

    def flow(i):
        move_average(ema, teacher, 0.995)
        return flow_matching_loss(teacher, latents[i], labels[i])           # Eq. (1)-(4)

    fit(teacher.parameters(), flow, steps[2], 1.5e-3, seed, "teacher", batch=128)
    checkpoint = {"ema": ema.state_dict(), "images": images, "labels": labels,
                  "rae": {"encoder": rae.encoder.state_dict(), "encoder_args": ENCODER, "mean": rae.mean,
                          "decoder": rae.decoder.state_dict(), "decoder_args": DECODER, "var": rae.var,
                          "input_size": 8}}
    write_atomically(path, lambda f: torch.save(checkpoint, f))


def pixel_metrics(images, labels, real, real_labels):
    """Fréchet distance, precision, recall, label accuracy and nearest_real of grey pixels in [0,1].

    images, real: uint8 [n,H,W,3]. Label accuracy: how often the nearest real image has the class that
    was asked for. nearest_real: median distance to it, over the same median among the real images
    (1 is as new as the data, 0 a copy).
    """
    fake, real = (x.double().mean(-1).flatten(1) / 255 for x in (images, real))     # [n,H·W]
    among_real = torch.cdist(real, real).fill_diagonal_(torch.inf).amin(1)
    distance, nearest = torch.cdist(fake, real).min(1)
    precision, recall = precision_recall(real, fake)
    return {"fd": frechet_distance(*mean_and_covariance(fake), *mean_and_covariance(real)),
            "precision": precision, "recall": recall,
            "label_accuracy": (real_labels[nearest] == labels).double().mean().item(),
            "nearest_real": (distance.median() / among_real.median()).item()}


def table(panels, labels, metrics):
    """Print pixel_metrics of all panels {name: images} against panels["real"], and add them to metrics {name: dict}.

    The row "real": a random half against the other one.
    """
    real = panels["real"]
    a, b = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).chunk(2)
    print(f"\n{'':16}{'Fréchet':>9}{'prec.':>8}{'recall':>8}{'label':>8}{'nearest':>9}{'ms/image':>10}")
    for name in ("real", "reconstruction", *metrics):
        m = pixel_metrics(*((real[a], labels[a], real[b], labels[b]) if name == "real" else
                            (panels[name], labels, real, labels)))
        m = metrics[name] = m | metrics.get(name, {})
        time = f"{1e3 * m['seconds_per_image']:10.3f}" if "seconds_per_image" in m else ""
        print(f"{name:16}{m['fd']:9.3f}{m['precision']:8.3f}{m['recall']:8.3f}{m['label_accuracy']:8.3f}"
              f"{m['nearest_real']:9.3f}{time}")


@exit_code
def main(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder that receives teacher.pt (default: out)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--steps", type=int, nargs=3, default=STEPS, metavar="N",
                        help=f"steps of encoder, decoder and teacher (default: {' '.join(map(str, STEPS))})")
    args = parser.parse_args(argv)
    if min(args.steps) < 11:                            # a tenth of them is OneCycleLR's warm-up
        parser.error("--steps: each at least 11")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    make_teacher(Path(args.out, "teacher.pt"), args.seed, args.steps)


if __name__ == "__main__":
    sys.exit(main())
