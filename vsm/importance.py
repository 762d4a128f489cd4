"""Importance sampling of the density p(x) of a VAE and of its derivatives."""

import math
from typing import NamedTuple

import torch

from objectives import dot
from vsm.device import evaluating


class Importance(NamedTuple):
    """log p(x) and its derivatives per datum, float64: [B], or [S, B] for an ensemble.

    By the delta method the standard error of log_likelihood is sqrt(1 / ess - 1 / samples). It is unreliable where ess is
    only a few.
    """
    log_likelihood: torch.Tensor  # log p(x), nats
    score: torch.Tensor  # grad_x log p(x) = E[a] under p(z|x) (Fisher's identity), [..., D]
    laplacian: torch.Tensor  # laplacian_x log p(x) = E[lap + ||a||^2] - ||E a||^2
    ess: torch.Tensor  # effective sample size, (sum w)^2 / sum w^2

    @property
    def score_matching_loss(self):
        """1/2 ||grad log p(x)||^2 + laplacian log p(x) (Hyvarinen 2005).

        Its mean over the data is the Fisher divergence from the data to the model, less a constant of the data.
        """
        return 1 / 2 * dot(self.score, self.score) + self.laplacian


def iw_log_likelihood(vae, x, samples, proposal="prior", generator=None, chunk=200):
    """log p(x) = log E_r[p(x|z) p(z) / r(z)] with r the prior or q(z|x), [B] or [S, B], nats; on average a lower bound."""
    return importance(vae, x, samples, proposal, generator, chunk).log_likelihood


def importance(vae, x, samples, proposal="prior", generator=None, chunk=200):
    """Importance sampling of p(x), x [B, ...] or [S, B, D], by z from the prior (the same for all data) or from q(z|x).

    The samples come in chunks, so memory does not grow with `samples`: it is O(B chunk) for the prior, O(B chunk D) for q.
    Raises ValueError for another proposal.
    """
    if proposal not in ("prior", "posterior"):
        raise ValueError(f"the proposal is prior or posterior, not {proposal!r}")
    shared = proposal == "prior"
    with evaluating(vae):
        gammas, batch = vae.log_gamma.double().exp().flatten(), x.shape[:vae.log_gamma.dim() + 1]  # [S]; [B] or [S, B]
        S = len(gammas)  # 1 without an ensemble
        P = S if shared else batch.numel()  # sets of samples: each serves all data of one model, or one datum
        q = vae.prior if shared else vae.encode(x)
        data = x.double().reshape(P, batch.numel() // P, -1)  # [P, Q, D]
        moments = [_PosteriorMoments(*model) for model in zip(data.chunk(S), gammas)]
        for start in range(0, samples, chunk):
            n = min(chunk, samples - start)
            z = vae.sample(q, vae.noise(q, n, generator), relaxed=False)  # [n, Dz], or [n, *batch, Dz]
            if shared:
                g = vae.decode(z.expand(*vae.log_gamma.shape, *z.shape)).reshape(P, n, -1)
                log_ratio = g.new_zeros(P, n)
            else:
                g = vae.decode(z).reshape(n, P, -1).transpose(0, 1)
                log_ratio = (vae.prior.log_prob(z) - q.log_prob(z)).reshape(n, P).T
            for model, g_i, log_ratio_i in zip(moments, g.double().chunk(S), log_ratio.double().chunk(S)):
                model.add(g_i, log_ratio_i)
        fields = zip(*(model.result(samples) for model in moments))
        return Importance(*(torch.cat(field).reshape(*batch, *field[0].shape[2:]) for field in fields))


class _PosteriorMoments:
    """The moments of g(z) under p(z|x) of one model, from samples that come in parts.

    P sets of samples serve Q data each: x [P, Q, D], g [P, n, D], log_ratio = log p(z) / r(z) [P, n]. The importance weights
    w = p(x|z) p(z) / r(z) are held relative to the largest so far. One matmul gives the squared distances of x and g less
    ||x||^2, another the sums of w g, w ||g||^2 and w. All is float64, because the first adds terms of order 1 / gamma that
    nearly cancel.
    """

    def __init__(self, x, gamma):
        self.x, self.gamma = x, gamma
        self.peak = torch.full_like(x[..., 0], -torch.inf)
        self.sums, self.squares = x.new_zeros(*x.shape[:-1], x.shape[-1] + 2), torch.zeros_like(self.peak)

    def add(self, g, log_ratio):
        norms = dot(g, g)
        log_w = torch.baddbmm((log_ratio - norms / (2 * self.gamma))[:, None], self.x / self.gamma, g.mT)  # [P, Q, n]
        peak = torch.maximum(self.peak, log_w.amax(-1))
        w, decay = log_w.sub_(peak[..., None]).exp_(), (self.peak - peak).exp()
        columns = torch.cat([g, norms[..., None], torch.ones_like(norms)[..., None]], dim=-1)
        self.sums = torch.baddbmm(decay[..., None] * self.sums, w, columns)
        self.squares = decay**2 * self.squares + torch.linalg.vecdot(w, w)
        self.peak = peak

    def result(self, samples):
        D = self.x.shape[-1]
        total = self.sums[..., -1]
        g, norm = self.sums[..., :D] / total[..., None], self.sums[..., D] / total  # E g, E ||g||^2 under p(z|x)
        log_p = self.peak - dot(self.x, self.x) / (2 * self.gamma) + total.log() - math.log(samples)
        return (log_p - D / 2 * (2 * math.pi * self.gamma).log(), (g - self.x) / self.gamma,
                (norm - dot(g, g)) / self.gamma**2 - D / self.gamma, total**2 / self.squares)
