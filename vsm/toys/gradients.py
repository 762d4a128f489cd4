"""Gradients of the toy objectives with respect to q's parameters, written out by hand for every run at once.

Axes: 2 coordinates of z, L likelihoods, N samples, I objectives, P optimisers, K starts. q factorises over the two coordinates;
each has a location and a log scale, and z = location + scale * e with standard noise e.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


class Family(NamedTuple):
    """A location-scale family of densities, described by its standard member (location 0, scale 1)."""
    noise: Callable  # (shape, generator, device) -> e, float64
    score: Callable  # e -> d log density / de
    slope: float  # derivative of the score, almost everywhere
    variance: float
    entropy: float  # nats
    nodes: Callable  # () -> nodes and weights of a quadrature over e, numpy arrays


def normal_noise(shape, generator, device):
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)


def laplace_noise(shape, generator, device):
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=device) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).log()


def normal_nodes():
    e = np.linspace(-7, 7, 71)  # trapezoidal rule: exact to rounding for smooth integrands
    return e, np.exp(-(e**2) / 2) / np.exp(-(e**2) / 2).sum()


def laplace_nodes():
    e, weight = np.polynomial.laguerre.laggauss(40)
    return np.concatenate((-e[::-1], e)), np.concatenate((weight[::-1], weight)) / 2


FAMILIES = {"gaussian": Family(normal_noise, lambda e: -e, -1.0, 1.0, (1 + math.log(2 * math.pi)) / 2, normal_nodes),
            "laplace": Family(laplace_noise, lambda e: -e.sign(), 0.0, 2.0, 1 + math.log(2), laplace_nodes)}


class Samples(NamedTuple):
    """Samples z = location + scale * e of q and what the gradients need at them, [2, L, N, I, P, K] or without the first axis.

    Axes along which a quantity is constant have length 1. `split_by_objective` removes the axis I.
    """
    location: torch.Tensor
    scale: torch.Tensor
    e: torch.Tensor
    z: torch.Tensor
    h1: torch.Tensor  # h'(z1)
    h2: torch.Tensor  # h''(z1)
    r: torch.Tensor  # (x - g) / sd^2
    slope: torch.Tensor  # grad_z g
    likelihood: torch.Tensor  # grad_z log p(x|z)
    score: torch.Tensor  # d log density / de of the standard member
    c: torch.Tensor  # grad_z log q(z) - grad_z log p(z) - grad_z log p(x|z)


def sample(params, e, score, posterior):
    """Samples of q with params [2 (location, log scale), 2, L, I, P, K], from noise e and its score, [2, 1, N, 1, 1, K]."""
    location, scale = params[0].unsqueeze(2), params[1].exp().unsqueeze(2)
    z = location + scale * e
    _, h1, h2, r, slope = posterior.likelihood(z)
    likelihood = r * slope
    return Samples(location, scale, e, z, h1, h2, r, slope, likelihood, score, score / scale + z - likelihood)


def split_by_objective(samples, objectives):
    """A list with the `Samples` of each objective, without the axis I; all share the noise, whose axis I has length 1."""
    columns = [field.unbind(-3) if field.shape[-3] == objectives else objectives * (field.squeeze(-3),) for field in samples]
    return [Samples(*fields) for fields in zip(*columns)]


# Gradients of the losses of objectives.INFER with respect to location and log scale, for each sample: [2, L, N, P, K] each.


def kld_gradient(s, family, posterior):
    # -E_q log p(x|z) + KL(q || p(z)); the first term is reparametrised, the second has a closed form
    return s.location - s.likelihood, family.variance * s.scale**2 - 1 - s.likelihood * s.scale * s.e


def fd_gradient(s, family, posterior):
    # E_q 1/2 ||c||^2 with z held fixed: only grad_z log q(z) depends on q, through e = (z - location) / scale and 1 / scale
    return -family.slope * s.c / s.scale**2, -(s.score + family.slope * s.e) * s.c / s.scale


def fd_weighted_gradient(s, family, posterior):
    # E_q 1/2 ||w c||^2 with z and the weight w, q's standard deviation, held fixed
    location, log_scale = fd_gradient(s, family, posterior)
    weight = family.variance * s.scale**2
    return weight * location, weight * log_scale


def fd_repar_gradient(s, family, posterior):
    # E_q 1/2 ||c||^2 with e held fixed: z moves with q, and so does the posterior's score, whose derivative is the Hessian H
    c1, c2 = s.c
    mixed = s.r * s.h1
    curvature = torch.stack((mixed * c2 + s.r * s.h2 * s.z[1] * c1, mixed * c1))
    Hc = curvature - s.slope * ((s.slope * s.c).sum(0) / posterior.like(c1)) - s.c
    return -Hc, -s.score / s.scale * s.c - Hc * s.scale * s.e


GRADIENTS = {"fd-repar": fd_repar_gradient, "fd": fd_gradient, "kld": kld_gradient, "fd-weighted": fd_weighted_gradient}


def gradients(params, e, score, family, posterior, objectives):
    """Gradients of the named `objectives` for every sample, [2 (location, log scale), 2, L, N, I, P, K].

    The arguments have the shapes that `sample` describes; the axis I runs over `objectives`.
    """
    samples = split_by_objective(sample(params, e, score, posterior), len(objectives))
    pairs = [GRADIENTS[name](s, family, posterior) for name, s in zip(objectives, samples)]
    location, log_scale = (torch.stack(parts, -3) for parts in zip(*pairs))
    return torch.stack((location, log_scale))


def closed_gradients(mean, sd, target_mean, target_sd):
    """Gradients by q's mean and sd of divergences of q = N(mean, sd^2) from p = N(target_mean, target_sd^2), by name.

    "kld" (29); "fd" (31), of FD = 1/2 E_q (d log q - d log p)^2; "biased", FD's with z held fixed (32). Arrays broadcast.
    """
    d_mean, d_sd = (mean - target_mean) / target_sd**2, sd / target_sd**2 - 1 / sd
    return {"kld": (d_mean, d_sd), "fd": (d_mean / target_sd**2, d_sd * (1 / target_sd**2 + 1 / sd**2)),
            "biased": (d_mean / sd**2, d_sd * 2 / sd**2)}


def gradients_on_a_grid(target_sd):
    """Closed forms for p = N(0, target_sd^2), on a grid of q's mean [M] and sd [S] that grows with target_sd.

    Tensors by name: "mean", "sd", "gradient" [3 (kld, fd, biased), 2 (by mean, by sd), M, S].
    """
    axis = torch.linspace(-2, 2, 41, dtype=torch.float64)
    mean, sd = 2 * target_sd * axis[:, None], 2 * target_sd * 2**axis
    pairs = [torch.stack(torch.broadcast_tensors(*pair)) for pair in closed_gradients(mean, sd, 0.0, target_sd).values()]
    return {"mean": mean[:, 0], "sd": sd, "gradient": torch.stack(pairs)}
