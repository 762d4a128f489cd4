"""Linear VAEs: the fixed point of each learning objective, predicted (`kappa`) and measured (`measured_kappa`).

    p(z) = N(0, I), p(x|z) = N(W z, gamma I); q(z|x) = N(Phi x, diag s^2) with the exact posterior's mean,
    Phi = (W'W + gamma I)^-1 W', and alpha times its variance, s_j^2 = alpha gamma / (gamma + |w_j|^2), w_j the j-th column of W.

Algorithm 1 updates the decoder while q is held. In a direction where the data have variance v, its fixed point is
gamma + w^2 = v / kappa, with the contraction kappa of the objective. docs/theory.md has the proofs.
"""

import math

import numpy as np
import torch
from torch import nn

from models import VAE, EnsembleVAE
from objectives import LEARN, Objective

LOWEST, HIGHEST, SCANNED = 1e-6, 1e3, 16  # a scan for fixed points: least w^2 / gamma, largest (gamma + w^2) / v, values
KAPPA_KNOWN = ("elbo", "fd", "swersky", "bao", "dsm")


def kappa(objective, estimator="plugin", N=math.inf, alpha=1.0, batch=None):
    """The contraction of a learning objective: the linear model that it trains has the variance v / kappa where the data have v.

    objective: one of KAPPA_KNOWN. estimator: plugin, unbiased or (not for dsm) released. N: posterior samples; plugin with
    N = inf is the exact expectation. alpha: the variance of q over the exact posterior's, a number or an array.
    batch: the size of the minibatch over which `released` averages vectors; None for `released` on images. Raises ValueError for
    another objective.
    """
    if objective in ("elbo", "fd"):
        return alpha
    if objective not in KAPPA_KNOWN:
        raise ValueError(f"no constant contraction is known for the objective {objective}")
    if estimator == "unbiased":
        return 2 * alpha if objective == "swersky" else 1.0
    B = batch if estimator == "released" and batch else 1
    if objective == "swersky":
        return alpha * (2 * B - 1 / N) / (2 * B - 1)
    return B + alpha / N


def bilevel_kappa(objective, estimator, N, mean_share, variance_share, V):
    """The right side of (7) in docs/theory.md, for alpha = 1 and not for `released` on vectors.

    mean_share, variance_share: the derivatives of q's mean and variance with respect to w after the kept encoder steps, over
    those of the exact posterior; 0 without such steps, 1 for infinitely many. V: the posterior's variance, gamma / (gamma + w^2).
    """
    kappa_0 = 0.0 if objective in ("fd", "swersky") else 1.0
    factor = (1 - variance_share * (1 - V)) / (1 - mean_share * (1 - 2 * V))
    return kappa_0 + (kappa(objective, estimator, N) - kappa_0) * factor


def bilevel_end(objective, estimator, N, steps, lr, v, gamma):
    """The end of a small w where KLD inference takes so many kept gradient steps of size lr: the largest kappa that solves (7).

    It is v / gamma where the latent is pruned, and NaN where w grows until the encoder's steps are too large, lr v / V > 1.
    """
    grid = np.geomspace(v / gamma, lr * v**2 / gamma, 20_000)  # of kappa; the posterior's variance is V = gamma kappa / v
    V = gamma * grid / v
    found = bilevel_kappa(objective, estimator, N, 1 - (1 - lr * v / V) ** steps, 1 - (1 - 2 * lr) ** steps, V) - grid
    solved = np.flatnonzero(found >= 0)  # the first one is the root, or w = 0 where that is stable
    return grid[solved[0]] if len(solved) else math.nan


def second_moment(kappa, alpha, gamma, v):
    """E z^2 of the aggregate posterior along an active latent (v > kappa gamma): kappa, less a term of the order of gamma / v."""
    return kappa - (kappa - alpha) * kappa * gamma / v


# ------------------------------------------------------------------------------------------------------------------ models


class LinearEncoder(nn.Module):
    """x [..., *event_shape] to the mean Phi x and the log standard deviation of q(z|x), [..., 2 Dz]."""

    def __init__(self, dim_z, event_shape):
        super().__init__()
        self.event_ndim = len(event_shape)
        self.phi = nn.Parameter(torch.zeros(dim_z, math.prod(event_shape)))  # [Dz, D]
        self.log_std = nn.Parameter(torch.zeros(dim_z))

    def forward(self, x):
        mean = x.flatten(-self.event_ndim) @ self.phi.T
        return torch.cat((mean, self.log_std.expand_as(mean)), -1)


class LinearDecoder(nn.Module):
    """z [..., Dz] to W z, [..., *event_shape]."""

    def __init__(self, weight, event_shape):
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.weight = nn.Parameter(weight)  # [D, Dz]

    def forward(self, z):
        return (z @ self.weight.T).unflatten(-1, self.event_shape)


def linear_vae(weight, gamma, event_shape=None, members=None):
    """A linear `models.VAE` of data [*event_shape] with W = `weight` [D, Dz], in weight's dtype; gamma is not trained.

    event_shape: (D,) by default, or (C, H, W) for images. With `members` it is an EnsembleVAE of that many equal members.
    """
    event_shape = event_shape or (len(weight),)
    encoder, decoder = LinearEncoder(weight.shape[1], event_shape), LinearDecoder(weight, event_shape)
    vae = EnsembleVAE(encoder, decoder, weight.shape[1], members) if members else VAE(encoder, decoder, weight.shape[1])
    vae.to(weight.dtype).log_gamma.requires_grad_(False).fill_(math.log(gamma))
    return vae


@torch.no_grad()
def set_posterior(vae, alpha=1.0):
    """Set the encoder to the exact posterior's mean and alpha times its variance, if the columns of W are orthogonal.

    Otherwise it gets alpha over the diagonal of the posterior's precision as its variance.
    """
    W, gamma = vae.decoder.weight, vae.log_gamma.exp().flatten()[0]
    precision = W.T @ W / gamma + torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    vae.encoder.phi.copy_(torch.linalg.solve(precision, W.T / gamma))
    vae.encoder.log_std.copy_((alpha / precision.diagonal()).log() / 2)


# ------------------------------------------------------------------------------------------------------------ fixed points


def matched_noise(pairs, dims, seed=0):
    """Noise [2 pairs, dims], float64: whitened rows e and their negatives -e; pairs must be at least dims.

    Its odd moments are zero and its covariance is I, exactly. So the mean of a quadratic function is its expectation under
    N(0, I); the mean of another function estimates its expectation.
    """
    e = torch.randn(pairs, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    e = torch.linalg.solve_triangular(torch.linalg.cholesky(e.T @ e / pairs), e.T, upper=False).T
    return torch.cat((e, -e))


def noisy_data(x, e, v):
    """Data of variance v, of which half is noise, from standard normals x and e, and the score t of that noise."""
    sd = math.sqrt(v / 2)
    return sd * (x + e), -e / sd


def expected_gradient(objective, w, v, N, alpha, gamma=1.0, batch=None, image=False, pairs=128, seed=0, **options):
    """d E[loss] / dw of a one-dimensional linear VAE at w, with q and z held (Algorithm 1). Options: see measured_kappa.

    An objective that takes the score of the data's noise gets `noisy_data`.
    """
    B, entry = batch or 1, LEARN[objective] if isinstance(objective, str) else Objective(objective, letter="")
    kinds = 2 + N if entry.takes("t") else 1 + N
    noise = matched_noise(max(pairs, 2 * B * kinds), B * kinds, seed).unflatten(-1, (kinds, B, 1)).transpose(0, 1)
    if not batch:
        noise = noise[:, :, 0]
    x, noise, e = noise[0], noise[1:1 + N], noise[1 + N:]  # [M, B, 1] or [M, 1], [N, *x.shape], [0 or 1, *x.shape]
    x, t = noisy_data(x, e[0], v) if len(e) else (math.sqrt(v) * x, None)
    event_shape = (1, 1, 1) if image else (1,)
    vae = linear_vae(torch.full((1, 1), w, dtype=torch.float64), gamma, event_shape, len(x) if batch else None)
    set_posterior(vae, alpha)
    vae.encoder.requires_grad_(False)
    x = x.unflatten(-1, event_shape).requires_grad_()
    q = vae.encode(x)
    z = vae.sample(q, noise).detach()
    loss = entry(vae, x, q, z, t=t, **options).mean()
    return torch.autograd.grad(loss, vae.decoder.weight)[0].item()


def measured_kappa(objective, N, alpha=1.0, v=25.0, gamma=1.0, **options):
    """v / (gamma + w^2) at the fixed point w of a learning objective on a one-dimensional linear VAE, without use of `kappa`.

    objective: a name in objectives.LEARN or a function with their signature. N: posterior samples. alpha: the variance of q over
    the exact posterior's. v: variance of the data. expected_gradient takes `batch`, the size of minibatches for an objective that
    couples data; `image`, to give x as [C, H, W]; `pairs` and `seed` of the noise (use more pairs for an objective that is not
    quadratic in x and z). Other keywords go to the objective, for example `estimator`.

    Returns inf if the latent is pruned (kappa above v / gamma), 0 if w grows without bound, nan if the gradient is not finite,
    and the least kappa if there are several stable fixed points.
    """
    from scipy.optimize import brentq  # slow to import, and figures of 2-D runs need `kappa` alone

    def slope(t):  # linear in t = gamma + w^2 for an objective with a constant kappa, so that one secant step finds the root
        w = math.sqrt(t - gamma)
        return expected_gradient(objective, w, v, N, alpha, gamma, **options) * t / w

    tried = np.append(gamma * (1 + LOWEST), np.geomspace(gamma * 1.01, HIGHEST * v, SCANNED))
    above = slope(tried[-1])
    if not above > 0:
        return 0.0 if above <= 0 else math.nan
    for low, high in zip(tried[-2::-1], tried[:0:-1]):
        if slope(low) < 0:
            return v / brentq(slope, low, high, rtol=1e-10)
    return math.inf


def split_kappa(objective, alpha=1.0, samples=(2, 5, 20), **options):
    """Fit kappa = limit + slope / N over N in `samples` by least squares. Returns (limit, slope, residual).

    limit: the kappa of the objective itself, N = inf. slope: the bias of its estimator, 0 for an unbiased one. residual: the
    largest |error| of the fit, which is informative for three N or more. Options as in measured_kappa.
    """
    measured = np.array([measured_kappa(objective, N, alpha, **options) for N in samples])
    design = np.stack((np.ones(len(samples)), 1 / np.array(samples)), 1)
    limit, slope = np.linalg.lstsq(design, measured, rcond=None)[0]
    return limit, slope, np.abs(design @ (limit, slope) - measured).max()


def expected_slope(W, C, gamma, objective, estimator="plugin", N=math.inf, alpha=1.0):
    """gamma^2 times the gradient of an objective's expectation with respect to the decoder's weights W [D, Dz], in closed form.

    For elbo it is gamma times the gradient. objective: one of KAPPA_KNOWN. C [D, D]: covariance of the data. q and z are
    held; q has the exact posterior's mean and alpha times its full covariance.
    """
    S = gamma * torch.linalg.inv(W.T @ W + gamma * torch.eye(W.shape[1], dtype=W.dtype, device=W.device))  # the exact covariance
    cross = C @ W @ S / gamma  # E[x m'], [D, Dz], m = S W' x / gamma the posterior mean
    mm = S @ W.T @ cross / gamma  # E[m m'], [Dz, Dz]
    return W @ (mm + kappa(objective, estimator, N, alpha) * S) - cross
