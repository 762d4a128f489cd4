"""Variational score matching objectives for VAEs (Wenliang, "On the failure of variational score matching for VAE models").

A VAE has a generative model p(z) p(x|z) with parameters theta (decoder and gamma) and an approximate posterior q(z|x) with
parameters phi (encoder). LEARN lists the objectives that train theta, INFER those that train phi. They are built on the
Kullback-Leibler divergence (KLD, which gives the ELBO) or on the Fisher divergence (FD, 1/2 E ||difference of scores||^2, where a
score is the gradient of a log density); minimising an FD is score matching. Equations and propositions are the paper's.

Notation: N posterior samples per datum, B data, D = dim x, Dz = dim z; an ensemble of S models puts S before B.

    x [B, ...]    q = vae.encode(x)    z_n ~ q(z|x), [N, B, Dz]    g(z) = vae.decode(z), the mean of p(x|z)
    a_n = grad_x log p(x|z_n) = -(x - g(z_n)) / gamma                         [N, B, D]
    b_n = grad_x log q(z_n|x), z_n held fixed                                 [N, B, D]
    c_n = grad_z log q(z_n|x) - grad_z log p(z_n) - grad_z log p(x|z_n)       [N, B, Dz]
    lap = laplacian_x log p(x|z) = -D / gamma                                 [B]
    t   = -(x - x0) / sd^2, the score of the noise in data x = x0 + sd e, e ~ N(0, I)      [B, D]

Every Fisher-type loss carries the factor 1/2, sums over D or Dz, averages over N and returns one number per datum, [B]. Lower is
better. Every objective is a pure function objective(vae, x, q, z) of any model that has the members of `Model`. The caller
decides whether z carries a gradient (a reparametrised sample) and which parameters require one. The graph behind b and c is kept
only where the parameters that they depend on require a gradient, so a frozen network costs no double backward.

This file depends on torch alone and can be copied. To add an objective, write its function and an entry of LEARN or INFER.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd import grad
from torch.distributions import Distribution


class Model(Protocol):
    """The members that an objective uses of a model with a Gaussian likelihood p(x|z) = N(g(z), gamma I)."""

    latent: str  # "gaussian" or "bernoulli"; Bernoulli latents have no posterior Fisher divergence
    log_gamma: torch.Tensor  # [], or [S] for an ensemble
    encoder: torch.nn.Module  # objectives call `encode` and ask the module only for its mode, buffers and parameters
    decoder: torch.nn.Module  # objectives call `decode` and ask the module only for its parameters

    def encode(self, x: torch.Tensor) -> Distribution:
        """q(z|x), batch [B], event [Dz]: Independent(Normal(mean, sd), 1), or Independent(Bernoulli(logits=...), 1)."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """g(z), the mean of p(x|z): [N, B, ...] of x's shape for z [N, B, Dz]."""

    def kl(self, q: Distribution) -> torch.Tensor:
        """KL(q(z|x) || p(z)) per latent dimension, [B, Dz], nats; the prior p(z) is N(0, I) or Bernoulli(1/2)."""


# ------------------------------------------------------------------------------------------------------------ objectives


def elbo(vae, x, q, z):
    """The negative ELBO (Eq. 1), in nats: -E_q log p(x|z) + KL(q(z|x) || p(z))."""
    a, _ = likelihood_score(vae, x, q, z)
    gamma, D = vae.log_gamma.exp()[..., None], a.shape[-1]
    neg_log_lik = gamma / 2 * dot(a, a) + D / 2 * (math.log(2 * math.pi) + gamma.log())  # [N, B]
    return neg_log_lik.mean(0) + vae.kl(q).sum(-1)


def fd(vae, x, q, z):
    """The paper's benchmark for learning theta (Prop. 3.1, Alg. 1): E_q 1/2 ||a||^2 + lap, the terms of (8) without b and c."""
    a, lap = likelihood_score(vae, x, q, z)
    return 1 / 2 * dot(a, a).mean(0) + lap


def swersky(vae, x, q, z, estimator="plugin"):
    """Swersky et al. 2011 (Eq. 13), the marginal FD with q in place of p(z|x): E_q ||a||^2 + lap - 1/2 ||E_q a||^2."""
    a, lap = likelihood_score(vae, x, q, z)
    return dot(a, a).mean(0) + lap - 1 / 2 * squared_mean(a, x, q, estimator)


def bao(vae, x, q, z, estimator="plugin"):
    """Bao et al. 2020 (Eq. 15), the marginal FD with q in place of p(z|x): 1/2 ||E_q a||^2 + E_q[a . b] + lap."""
    a, lap = likelihood_score(vae, x, q, z)
    b = posterior_score(vae, x, q, z)
    return 1 / 2 * squared_mean(a, x, q, estimator) + mean_product(a, b, estimator) + lap


def dsm(vae, x, q, z, t, estimator="plugin"):
    """Denoising score matching (Vincent 2011), with the score t of the data's noise: 1/2 ||E_q a - t||^2 less 1/2 ||t||^2.

    For data with Gaussian noise its expectation is that of `bao`, for any decoder and q, but it needs no b. ValueError for the
    estimator `released`.
    """
    if estimator == "released":
        raise ValueError("the paper released no estimator of denoising score matching; use plugin or unbiased")
    a, _ = likelihood_score(vae, x, q, z)
    return 1 / 2 * squared_mean(a, x, q, estimator) - dot(a.mean(0), t)


def posterior_fd(vae, x, q, z):
    """The posterior FD for inferring phi, from q(z|x) to p(z|x) (Eq. 6, first term): E_q 1/2 ||c||^2."""
    c = latent_score_gap(vae, x, q, z)
    return 1 / 2 * dot(c, c).mean(0)


def posterior_fd_weighted(vae, x, q, z, weight=None):
    """The posterior FD weighted by the covariance of q: E_q 1/2 ||s c||^2, s = `weight` [B, Dz] the sd of q, held fixed."""
    c = (q.base_dist.scale.detach() if weight is None else weight) * latent_score_gap(vae, x, q, z)
    return 1 / 2 * dot(c, c).mean(0)


def fae(vae, x, q, z):
    """The Fisher autoencoder of Elkhalil et al. 2021, which trains theta and phi by the joint FD (Eq. 8).

    E_q[1/2 ||c||^2 + 1/2 ||b||^2 + 1/2 ||a||^2] + lap
    """
    a, lap = likelihood_score(vae, x, q, z)
    b = posterior_score(vae, x, q, z)
    c = latent_score_gap(vae, x, q, z, a)
    return 1 / 2 * (dot(c, c) + dot(b, b) + dot(a, a)).mean(0) + lap


@dataclass(frozen=True)
class Objective:
    """An entry of LEARN or INFER: all that scripts and figures know of an objective. Calling it calls its function.

    letter          the objective's name in labels, as in the paper: F, S, B, KLD, FD
    color           its matplotlib colour in every figure, of Okabe and Ito's palette for the colour-blind
    needs_b         whether x must require a gradient before it is encoded, because the objective uses b
    reparametrised  (INFER only) whether z carries a gradient; Algorithm 1 takes it as a constant in the posterior FD
    joint           whether one loss trains theta and phi; the same entry is then in LEARN and in INFER
    estimators      the values of --estimator that the objective takes, if its function declares a keyword `estimator`
    alias           (N, estimator) -> the letter of another objective that this one equals for them, or None
    gamma           (LEARN only) the statistics of its stationary gamma, likelihood_gamma or score_gamma; None: no closed form
    """
    function: Callable
    letter: str
    color: str = "tab:gray"
    needs_b: bool = False
    reparametrised: bool = True
    joint: bool = False
    estimators: tuple = ("plugin", "unbiased", "released")
    alias: Callable = lambda samples, estimator: None
    gamma: Callable | None = None

    def __call__(self, vae, x, q, z, **options):
        """The loss [B]. The function gets those of the `options` that it declares as keywords; a trainer offers

        estimator  one of ESTIMATORS
        weight     [B, Dz], held fixed; bi-level training passes it as a function of phi
        t          [B, D], the score of the noise that was added to the clean data x0: -(x - x0) / sd^2
        """
        return self.function(vae, x, q, z, **{name: value for name, value in options.items() if self.takes(name)})

    def takes(self, keyword):
        """Whether the function declares this keyword."""
        return keyword in keywords_of(self.function)


@functools.cache  # a trainer asks at every update
def keywords_of(function):
    return frozenset(inspect.signature(function).parameters)


def likelihood_gamma(loss, slope, gamma, D):
    """E||r||^2 and D; their ratio is the stationary gamma of the ELBO, E||r||^2 / (2 gamma) + D/2 log gamma + constant.

    r_n = x - g(z_n). loss and slope = d loss / d log gamma, [] or [S], are means over a minibatch at this gamma; q, z are held.
    The statistics do not depend on gamma. Average each over minibatches before the division: a mean of ratios is another number.
    """
    return (D - 2 * slope) * gamma, torch.full_like(gamma, D)


def score_gamma(loss, slope, gamma, D):
    """P and Q, whose ratio is the stationary gamma of P / (2 gamma^2) - Q / gamma, as in likelihood_gamma.

    F has P = E||r||^2, S 2 E||r||^2 - ||rbar||^2, B and DSM ||rbar||^2, with the estimator's ||rbar||^2; Q is D for F and S,
    D + E[r . b] for B and -E[rbar . t] for DSM. P or Q below 0, which noise can give B and DSM, means no stationary gamma.
    """
    return -2 * (loss + slope) * gamma**2, -(2 * loss + slope) * gamma


_FAE = Objective(fae, "FAE", "#D55E00", needs_b=True, joint=True)
LEARN = {
    "elbo": Objective(elbo, "ELBO", "black", gamma=likelihood_gamma),
    "fd": Objective(fd, "F", "#0072B2", gamma=score_gamma),
    "swersky": Objective(swersky, "S", "#E69F00", gamma=score_gamma,
                         alias=lambda samples, estimator: "F" if samples == 1 and estimator == "plugin" else None),
    "bao": Objective(bao, "B", "#009E73", needs_b=True, gamma=score_gamma),
    "dsm": Objective(dsm, "DSM", "#CC79A7", estimators=("plugin", "unbiased"), gamma=score_gamma),
    "fae": _FAE,
}
INFER = {
    "kld": Objective(elbo, "KLD"),
    "fd": Objective(posterior_fd, "FD", reparametrised=False),
    "fd-weighted": Objective(posterior_fd_weighted, "FDW", reparametrised=False),
    "fd-repar": Objective(posterior_fd, "FD-REPAR"),
    "fae": _FAE,
}
ESTIMATORS = Objective.estimators


def label(learn, infer, samples=None, estimator="plugin"):
    """The paper's name of a pair, inference first: KLD-F, FD-S, FAE; KLD-S=F where S equals F for N = `samples`."""
    learn, infer = LEARN[learn], INFER[infer]
    if learn.joint:
        return learn.letter
    alias = learn.alias(samples, estimator)
    return f"{infer.letter}-{learn.letter}" + (f"={alias}" if alias else "")


# ---------------------------------------------------------------------------------------------------------------- scores


def dot(u, v):
    return (u * v).sum(-1)


def likelihood_score(vae, x, q, z):
    """a_n [N, B, D] and lap [B] (broadcast), both in closed form: no autograd."""
    gamma = vae.log_gamma.exp()[..., None]
    x, g = x.flatten(len(q.batch_shape)), vae.decode(z).flatten(z.dim() - 1)
    return (g - x) / gamma[..., None], -x.shape[-1] / gamma


def posterior_score(vae, x, q, z):
    """b_n [N, B, D], by N vector-Jacobian products through the encoder.

    If x does not require a gradient, it is encoded once more here; ValueError where that would change buffers of the encoder
    (batch norm in training mode). Batch norm in training mode couples the data, and b is then not a per-datum score.
    """
    with torch.enable_grad():
        if not x.requires_grad:
            if vae.encoder.training and any(True for _ in vae.encoder.buffers()):
                raise ValueError("b is a gradient with respect to x: let x require a gradient before it is encoded")
            x = x.detach().requires_grad_()
            q = vae.encode(x)
        if vae.latent == "bernoulli":
            outputs, score = (q.base_dist.logits,), (z - q.base_dist.probs,)
        else:
            outputs, u = (q.base_dist.loc, q.base_dist.scale), (z - q.base_dist.loc) / q.base_dist.scale
            score = (u / q.base_dist.scale, (u**2 - 1) / q.base_dist.scale)  # d log q(z) / d mean, d std: [N, B, Dz]
        keep = _requires_grad(vae.encoder, z)
        b = [grad(outputs, x, score_n, create_graph=keep, retain_graph=True)[0] for score_n in zip(*score)]
    return torch.stack(b).flatten(z.dim() - 1)


def latent_score_gap(vae, x, q, z, a=None):
    """c_n [N, B, Dz]: closed forms of grad_z log q and grad_z log p(z), and grad_z log p(x|z) = -J_g(z)' a by autograd.

    `a`, the likelihood score at z, saves a pass through the decoder where z requires a gradient.
    ValueError for latents that are not Gaussian.
    """
    if vae.latent != "gaussian":
        raise ValueError(f"the posterior Fisher divergence needs continuous latents, not {vae.latent}")
    with torch.enable_grad():
        w = z if z.requires_grad else z.detach().requires_grad_()
        if a is None or w is not z:
            a, _ = likelihood_score(vae, x, q, w)
        gamma = vae.log_gamma.exp()[..., None, None]
        keep = vae.log_gamma.requires_grad or _requires_grad(vae.decoder, z)
        (minus_likelihood,) = grad(a, w, gamma * a, create_graph=keep)  # da/dz = J_g / gamma
    return -(z - q.base_dist.loc) / q.base_dist.scale**2 + z + minus_likelihood


def _requires_grad(network, z):
    return z.requires_grad or any(p.requires_grad for p in network.parameters())


# ------------------------------------------------------------------------------- estimators of ||E_q a||^2 and E_q[a . b]


def squared_mean(a, x, q, estimator):
    """||E_q a||^2 per datum from a [N, B, D].

    With abar = mean_n a_n, plugin is ||abar||^2, which is biased upwards by tr Var(a) / N, and unbiased subtracts an estimate of
    that bias; ValueError for N < 2. released follows the paper's code: for vectors abar is also a mean over the *minibatch*; for
    images it is plugin.
    """
    abar = a.mean(0)
    if estimator == "unbiased":
        if len(a) < 2:
            raise ValueError("the unbiased estimator needs at least 2 posterior samples")
        return dot(abar, abar) - a.var(0).sum(-1) / len(a)
    if estimator == "released" and x.dim() == len(q.batch_shape) + 1:
        abar = abar.mean(-2, keepdim=True).expand_as(abar)
    return dot(abar, abar)


def mean_product(a, b, estimator):
    """E_q[a . b] per datum from a, b [N, B, D].

    released follows the paper's code: abar . sum_n b_n. It is unbiased too, because E_q b = 0 and z_n, z_m are independent, but
    its variance is far larger.
    """
    if estimator == "released":
        return dot(a.mean(0), b.sum(0))
    return dot(a, b).mean(0)
