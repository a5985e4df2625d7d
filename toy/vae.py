"""What an RAE's space is compared with: a VAE of the same digits, a flow in its latents, its paths.

The VAE makes the same 2×2 tokens, with an encoder and a decoder of the same size. As in latent
diffusion, its latents are samples of the posterior, here one an image.
"""
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drift_rae import (RAE, Decoder, DiTDH, ViT, ode_sample,  # noqa: E402
                       pixel_logits, reading, write_atomically)
from toy.digits import DECODER, ENCODER, TEACHER, fit, train_flow  # noqa: E402
from toy.digits import STEPS as RAE_STEPS  # noqa: E402

STEPS = (800, RAE_STEPS[2])     # of VAE and flow, which is trained like the RAE's
KL = 0.01               # weight of the divergence: made to reconstruct, as SD-VAE

class Space(NamedTuple):
    rae: RAE                    # its decode() takes the latents
    raw: torch.Tensor           # as the encoder gives them, [n,D,2,2]
    latents: torch.Tensor       # normalised to mean 0, variance 1 in each channel and position
    labels: torch.Tensor        # [n]

def divergence(mean, log_var):
    """KL of N(mean, exp(log_var)) from N(0, I), summed over everything."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()

def posterior(vae, images):
    """-> mean, logarithm of the variance, and one sample, [B,D,2,2] each."""
    mean, log_var = vae.encode(images).chunk(2, 1)
    noise = torch.randn_like(mean)
    return mean, log_var, mean + (log_var / 2).exp() * noise

def negative_elbo(vae, images):
    """A pixel's, with a Bernoulli likelihood."""
    mean, log_var, latents = posterior(vae, images)
    logits = pixel_logits(vae.decode(latents))
    nll = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    loss = nll / 3 + KL * divergence(mean, log_var)     # three equal channels
    return loss / images[:, 0].numel()

def vae_space(checkpoint, width, steps):
    """Train a VAE, its tokens `width` wide, on the digits -> its Space, the posterior's means."""
    images = checkpoint["images"].permute(0, 3, 1, 2) / 255
    dim = max(ENCODER["embed_dim"], width)      # or the encoder would be narrower than the latents
    vit = ViT(**ENCODER | {"embed_dim": dim})
    encoder = nn.Sequential(vit, nn.Linear(dim, 2 * width))
    decoder = Decoder(**DECODER | {"latent_dim": width})
    zeros, ones = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    vae = RAE(encoder, decoder, zeros, ones, input_size=28, eps=0)
    vae.requires_grad_(True)

    def loss(i):
        return negative_elbo(vae, images[i])

    fit(vae.parameters(), loss, len(images), steps, 2e-3, "VAE")
    vae.requires_grad_(False)
    mean, _, raw = posterior(vae, images)
    return space_of(decoder, raw, checkpoint["labels"]), mean

def space_of(decoder, raw, labels):
    mean, var = raw.mean(0), raw.var(0)
    rae = RAE(None, decoder, mean, var, input_size=28, eps=0, sigmoid=True)
    return Space(rae, raw, (raw - rae.mean) / rae.std, labels)

def flow_teacher(space, steps, seed=0):
    """-> a flow in the space, as drift_rae.py's default trains it in the RAE's."""
    model = DiTDH(**TEACHER | {"in_channels": space.latents.shape[1]})
    return train_flow(model, space.latents, space.labels, steps, seed=seed)

def ode_path(teacher, z, y):
    """The grid points [50,n,D,h,w] of ode_sample's paths, from the noise z to the end."""
    points = []

    def record(x, t, y):
        points.append(x)
        return teacher(x, t, y)

    points.append(ode_sample(record, z, y))
    return torch.stack(points)

def make_vae64(path, checkpoint, steps=STEPS):
    """Train VAE-64 and its flow teacher on the checkpoint's digits; write what read_vae64 reads."""
    torch.manual_seed(0)
    space, _ = vae_space(checkpoint, 64, steps[0])
    teacher = flow_teacher(space, steps[1])
    flow, decoder = teacher.state_dict(), space.rae.decoder.state_dict()
    with write_atomically(path) as file:
        torch.save({"ema": flow, "decoder": decoder, "raw": space.raw}, file)

def read_vae64(path, labels):
    """-> flow teacher and Space; labels are the checkpoint's."""
    with reading(path) as saved:
        decoder = Decoder(**DECODER | {"latent_dim": 64})
        decoder.load_state_dict(saved["decoder"])
        return DiTDH.from_state_dict(saved["ema"]).eval(), space_of(decoder, saved["raw"], labels)
