"""What the space of an RAE is compared with: a VAE of the same digits and a flow in its latents.

The VAE makes the same grid of 2×2 tokens, with an encoder and a decoder of the RAE's size. As in
latent diffusion, its latents are samples of the posterior; here there is one sample per image.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import drift_rae as dr
from toy import digits

KL = 0.01       # weight of the divergence: small, so that images are reconstructed, as in SD-VAE


class Space(NamedTuple):
    rae: dr.RAE                     # rae.decode takes the latents, also where a VAE made them
    raw: torch.Tensor               # the latents as the encoder gives them, [n,D,2,2]
    latents: torch.Tensor           # normalised to mean 0, variance 1 per channel and position
    labels: torch.Tensor            # [n]


def divergence(mean, log_var):
    """The divergence of N(mean, exp(log_var)) from N(0, I), summed over everything."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()


def posterior(vae, images):
    """-> mean, logarithm of the variance, and one sample, [B,D,2,2] each."""
    mean, log_var = vae.encode(images).chunk(2, 1)
    noise = torch.randn_like(mean)
    return mean, log_var, mean + (log_var / 2).exp() * noise


def negative_elbo(vae, images):
    """The loss of a VAE per pixel; a pixel is Bernoulli-distributed."""
    mean, log_var, latents = posterior(vae, images)
    logits = digits.pixel_logits(vae.decode(latents))
    nll = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    loss = nll / 3 + KL * divergence(mean, log_var)     # the three channels are equal
    return loss / images[:, 0].numel()


def vae_space(width, steps):
    """Train a VAE, whose tokens have `width` numbers, on the digits. `width` is at most the RAE's.

    -> its Space, and the posterior's means [n,D,2,2].
    """
    images, labels = digits.load_digits()
    pixels = images.permute(0, 3, 1, 2) / 255
    mean_and_log_var = nn.Linear(digits.ENCODER["embed_dim"], 2 * width)
    encoder = nn.Sequential(dr.ViT(**digits.ENCODER), mean_and_log_var)
    decoder = dr.Decoder(**digits.DECODER | {"latent_dim": width})
    zeros, ones = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    vae = dr.RAE(encoder, decoder, zeros, ones, input_size=28, eps=0)
    vae.requires_grad_(True)        # dr.RAE freezes both networks

    def loss(i):
        return negative_elbo(vae, pixels[i])

    digits.fit(vae.parameters(), loss, len(pixels), steps, 2e-3, "VAE")
    vae.requires_grad_(False)
    means, _, raw = posterior(vae, pixels)
    rae = dr.RAE(None, decoder, raw.mean(0), raw.var(0), input_size=28, eps=0, sigmoid=True)
    latents = (raw - rae.mean) / rae.std
    return Space(rae, raw, latents, labels), means


def flow_teacher(space, steps, seed=0):
    """Train a flow model in the space, as toy/digits.py trains the one in the RAE's."""
    model = dr.DiTDH(**digits.TEACHER | {"in_channels": space.latents.shape[1]})
    return digits.train_flow(model, space.latents, space.labels, steps, seed=seed)


def ode_path(teacher, z, y):
    """The 50 grid points of ode_sample's paths, from the noise z to the end: [50,n,D,h,w]."""
    points = []

    def record(x, t, y):
        points.append(x)
        return teacher(x, t, y)

    points.append(dr.ode_sample(record, z, y))
    return torch.stack(points)
