"""Linear VAEs with biases, whose likelihood, posterior and objectives have closed forms, in float64."""

import math
from typing import NamedTuple

import torch
from torch import nn

from models import VAE

D, DZ = 4, 3


class Affine(nn.Module):
    """The encoder of q(z|x) = N(A x + c, diag std^2)."""

    def __init__(self, A, c, std):
        super().__init__()
        self.A, self.c, self.log_std = nn.Parameter(A), nn.Parameter(c), nn.Parameter(std.log())

    def forward(self, x):
        mean = x @ self.A.T + self.c
        return torch.cat([mean, self.log_std.expand_as(mean)], -1)


def affine_vae(W, b, A, c, std, gamma):
    """p(x|z) = N(W z + b, gamma I)."""
    decoder = nn.Linear(W.shape[1], W.shape[0])
    decoder.weight.data, decoder.bias.data = W, b
    vae = VAE(Affine(A, c, std), decoder, W.shape[1]).double()
    vae.log_gamma.data = torch.tensor(math.log(gamma), dtype=torch.float64)
    return vae


class Example(NamedTuple):
    vae: VAE
    W: torch.Tensor
    b: torch.Tensor
    A: torch.Tensor
    c: torch.Tensor
    std: torch.Tensor
    gamma: float
    x: torch.Tensor  # [5, D]


def example():
    """A linear VAE with its matrices, and data."""
    g = torch.Generator().manual_seed(0)
    W, A = torch.randn(D, DZ, generator=g).double() * 0.6, torch.randn(DZ, D, generator=g).double() * 0.4
    b, c = torch.randn(D, generator=g).double() * 0.3, torch.randn(DZ, generator=g).double() * 0.3
    std, x = torch.tensor([0.4, 0.7, 1.1]).double(), torch.randn(5, D, generator=g).double()
    return Example(affine_vae(W, b, A, c, std, 0.5), W, b, A, c, std, 0.5, x)


def closed_forms(linear):
    """Each term of an example's objectives, [5]."""
    _, W, b, A, c, std, gamma, x = linear
    S, mean = std.square().diag(), x @ A.T + c
    r = x - mean @ W.T - b
    r2, V, M = r.square().sum(-1), torch.trace(W @ S @ W.T), -S.inverse() + torch.eye(DZ) + W.T @ W / gamma
    return {
        "reconstruction": D / 2 * math.log(2 * math.pi * gamma) + (r2 + V) / (2 * gamma),
        "kl": (std.square().sum() + mean.square().sum(-1) - DZ - 2 * std.log().sum()) / 2, "half_a2": (r2 + V) / (2 * gamma**2),
        "half_abar2": r2 / (2 * gamma**2), "a_dot_b": (torch.trace(W @ A) / gamma).expand(5),
        "half_b2": (torch.trace(A.T @ S.inverse() @ A) / 2).expand(5),
        "half_c2": (torch.trace(M @ S @ M.T) + (mean - r @ W / gamma).square().sum(-1)) / 2,
        "laplacian": torch.full((5,), -D / gamma, dtype=torch.float64)}


def objectives_of(t):
    """The learning objectives as sums of their terms."""
    return {"elbo": t["reconstruction"] + t["kl"], "fd": t["half_a2"] + t["laplacian"],
            "swersky": 2 * t["half_a2"] + t["laplacian"] - t["half_abar2"],
            "bao": t["half_abar2"] + t["a_dot_b"] + t["laplacian"],
            "fae": t["half_c2"] + t["half_b2"] + t["half_a2"] + t["laplacian"]}
