"""The runs of `vsm.toys.descent` one after another, by autograd, `objectives.INFER` and `torch.optim`: for comparison."""

import argparse
import itertools
import math
import time

import torch
from torch import nn

from models import VAE
from training import phi_loss
from vsm.toys.descent import OPTIMISERS, Descent
from vsm.toys.posteriors import LIKELIHOODS


class Product(nn.Module):
    """g(z) = h(z1) z2 as a decoder, [..., 2] -> [..., 1]."""

    def __init__(self, h):
        super().__init__()
        self.h = h

    def forward(self, z):
        return self.h(z[..., 0])[0][..., None] * z[..., 1:]


class Unamortised(nn.Module):
    """An encoder that ignores x: its parameters are q's mean and log sd, [4]."""

    def __init__(self, start):
        super().__init__()
        self.q = nn.Parameter(torch.cat((start, torch.zeros_like(start))))

    def forward(self, x):
        return self.q.expand(len(x), 4)


def run_alone(likelihood, objective, optimiser, start, noise, args):
    """Location and log scale [4] of one Gaussian q after a descent from the location `start` [2] with noise [steps, 2, N]."""
    h, sd = LIKELIHOODS[likelihood]
    encoder = Unamortised(start)
    vae = VAE(encoder, Product(h), 2, init_sd=sd).to(start)
    vae.log_gamma.requires_grad_(False)
    x = start.new_full((1, 1), args.x)
    descent = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser]([encoder.q], lr=args.lr)
    for e in noise:
        descent.zero_grad()
        phi_loss(vae, x, objective, e.T[:, None]).mean().backward()  # noise [N, 1, 2]
        descent.step()
    return encoder.q.detach()


def compare_with_loop(args, steps, device):
    """Repeat the first `steps` steps of the `Descent` of toy_inference.py's flags, one run after another.

    Returns runs x iterations per second, and the largest difference of a parameter from that of `Descent`; two numbers that are
    not finite agree, and one that is finite in only one of them differs by inf.
    """
    together = Descent(argparse.Namespace(**{**vars(args), "iterations": steps}), device)
    noise = []
    while together.step < steps:
        noise.append(together.noise())
        together.run_step(noise[-1])
    noise = torch.cat(noise)[:, :, 0, :, 0, 0]  # [steps, 2, N, K]
    axes = (args.likelihoods, args.objectives, OPTIMISERS, range(together.starts.shape[1]))
    began, difference = time.perf_counter(), 0.0
    for (l, likelihood), (i, objective), (p, optimiser), (k, _) in itertools.product(*map(enumerate, axes)):
        alone = run_alone(likelihood, objective, optimiser, together.starts[:, k], noise[..., k], args)
        ours = together.params[:, :, l, i, p, k].flatten()
        lost = ~(alone.isfinite() | ours.isfinite())
        gap = (alone - ours).abs().masked_fill(lost, 0).nan_to_num(nan=math.inf, posinf=math.inf)
        difference = max(difference, gap.max().item())  # waits for the device, so the clock measures its work
    return together.params[0, 0].numel() * steps / (time.perf_counter() - began), difference
