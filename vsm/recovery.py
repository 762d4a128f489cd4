"""Recovery of the parameter that made the data, when q has the wrong variance, by closed forms and from samples.

Model: p(z) = N(0, 1), p_w(x|z) = N(w z, gamma), data from p_{w*}, v = gamma + w*^2. Encoder: q(z|x) = N(phi x, s2), its variance
alpha times the exact one, s2 = alpha gamma / (gamma + w^2). (w, phi) and (-w, -phi) are the same model: w >= 0 here.

A rule is a way to find w and phi. The rules, by their names in the table, the arrays and the figures:

    JKLD, JFD        The minimum over w and phi of the joint Kullback-Leibler or Fisher divergence, where s2 moves with w
                     (Figure 1). Up to constants of the data these are E[elbo] and E[fae] of objectives.py.
    held ELBO|F|S|B  Algorithm 1 of the paper at its fixed point: the objective moves w while q (phi and s2) is held fixed, and
                     inference moves phi. KLD and FD inference agree here: phi = w / (gamma + w^2), that of the exact posterior.
                     S and B are their exact expectations, those of the unbiased estimators; "held S, N = 5" is plug-in.
    following F|S|B  The same objective, but q(z|x; w) is that fixed point at every w, and the gradient goes through it: the
                     limit of many bi-level steps. (For the ELBO this is JKLD.)
"""

import math

import numpy as np
import torch
from torch import nn

from models import EnsembleVAE
from objectives import INFER, LEARN
from vsm.linear import kappa

GRID, CELLS, ZOOMS = 2001, 3, 12  # points over w; local minima that are refined; refinements of each, by a factor 10


def joint_kld(w, phi, alpha, gamma, w_star):
    """KL(q(x, z) || p_w(x, z)), nats: KL between the marginals of x plus E_x KL(q(z|x) || p_w(z|x)). Arrays broadcast."""
    v, t = gamma + w_star**2, gamma + w**2
    return (v / t - 1 - np.log(v / t) + alpha - 1 - np.log(alpha) + v * t / gamma * (phi - w / t) ** 2) / 2


def joint_fd(w, phi, alpha, gamma, w_star):
    """FD(q(x, z) || p_w(x, z)) = 1/2 E_q ||grad log q - grad log p||^2 (Eq. 6). Arrays broadcast.

    Both scores are linear in x and in u = z - phi x, which are independent with variances v and s2.
    """
    v, s2 = gamma + w_star**2, posterior_variance(w, alpha, gamma)
    x_score = v * (1 / gamma - 1 / v - w * phi / gamma) ** 2 + s2 * (w / gamma - phi / s2) ** 2
    z_score = v * (phi * (1 + w**2 / gamma) - w / gamma) ** 2 + s2 * (1 + w**2 / gamma - 1 / s2) ** 2
    return (x_score + z_score) / 2


def posterior_variance(w, alpha, gamma):
    """The variance s2 of q(z|x)."""
    return alpha * gamma / (gamma + w**2)


def minimise(loss):
    """The global minimum over w in [0, 1273] and phi of loss(w, phi), which is quadratic in phi. Returns w and phi, float64.

    loss takes w and phi with one trailing axis. phi is eliminated exactly; w = tan(angle) is searched on an even grid of angles
    that contains w = 0 (the collapsed solution), then refined around its lowest local minima.
    """
    def best_phi(w):
        low, middle, high = (loss(w, phi + 0 * w) for phi in (-1, 0, 1))
        return (low - high) / (2 * (low + high - 2 * middle))

    def profile(angle):
        w = np.tan(angle)
        return loss(w, best_phi(w))

    grid = np.linspace(0, math.pi / 2, GRID + 1)[:-1]
    value = profile(grid)
    inner = np.pad(value, [(0, 0)] * (value.ndim - 1) + [(1, 1)], constant_values=np.inf)
    is_minimum = (value <= inner[..., :-2]) & (value <= inner[..., 2:])
    cells = np.argsort(np.where(is_minimum, value, np.inf), axis=-1)[..., :CELLS]
    angle, width = grid[cells], grid[1]
    for _ in range(ZOOMS):
        tried = np.clip(angle[..., None] + width * np.linspace(-1, 1, 21), 0, grid[-1])
        lowest = profile(tried.reshape(*angle.shape[:-1], -1)).reshape(tried.shape).argmin(-1)
        angle, width = np.take_along_axis(tried, lowest[..., None], -1)[..., 0], width / 10
    lowest = profile(angle).argmin(-1)
    w = np.tan(np.take_along_axis(angle, lowest[..., None], -1))
    return w[..., 0], best_phi(w)[..., 0]


# gamma + w^2 at the minimum where q follows w. It comes from the closed forms of a linear VAE with r = (1 - w phi) x and
# tr W S W' = w^2 s2, each less 1 / gamma: fd (r^2 + w^2 s2) / 2 gamma^2, swersky (r^2 / 2 + w^2 s2) / gamma^2,
# bao r^2 / 2 gamma^2 + w phi / gamma. Where q is held fixed, gamma + w^2 = v / kappa (vsm/linear.py).
FOLLOWING = {"fd": lambda v, alpha: 2 * v / alpha, "swersky": lambda v, alpha: v / alpha, "bao": lambda v, alpha: v + 0 * alpha}
SAMPLES = 1, 2, 5, 20  # the N of the plug-in estimators

RULES = {  # name: how q moves, objective, estimator (None if it has none), N (None for that of `--samples`)
    "JKLD": ("joint", "elbo", None, None), "JFD": ("joint", "fae", None, None),
    "held ELBO": ("held", "elbo", None, None), "held F": ("held", "fd", None, None),
    "held S": ("held", "swersky", "unbiased", None), "held B": ("held", "bao", "unbiased", None),
    "following F": ("following", "fd", None, None), "following S": ("following", "swersky", "unbiased", None),
    "following B": ("following", "bao", "unbiased", None),
    **{f"held {name}, N = {N}": ("held", objective, "plugin", N)
       for name, objective in (("S", "swersky"), ("B", "bao")) for N in SAMPLES}}


def recover(rule, alpha, gamma, w_star):
    """w and phi that the rule finds by closed forms, for data of p_{w*}; alpha and w_star broadcast."""
    how, objective, estimator, N = RULES[rule]
    alpha, w_star = np.broadcast_arrays(np.asarray(alpha, float), np.asarray(w_star, float))
    if how == "joint":
        divergence = {"elbo": joint_kld, "fae": joint_fd}[objective]
        return minimise(lambda w, phi: divergence(w, phi, alpha[..., None], gamma, w_star[..., None]))
    v = gamma + w_star**2
    t = v / kappa(objective, estimator, N, alpha) if how == "held" else FOLLOWING[objective](v, alpha)
    w = np.sqrt(np.maximum(t - gamma, 0))  # collapse where t < gamma: the loss then rises with w from 0
    return w, w / (gamma + w**2)


class Scale(nn.Module):
    """g(z) = w z for S models at once."""

    def __init__(self, members):
        super().__init__()
        self.w = nn.Parameter(torch.ones(members, 1, 1))

    def forward(self, z):
        return self.w * z


class MismatchedEncoder(nn.Module):
    """Mean and log std of q(z|x) = N(phi x, alpha gamma / (gamma + w^2)), x [S, B, 1], with the decoder's own w.

    how: the gradient with respect to w goes through the variance in "joint" but not in "held"; in "following" it goes through the
    variance and through phi = w / (gamma + w^2).
    """

    def __init__(self, how, decoder, alpha, gamma):
        super().__init__()
        self.how, self.decoder, self.alpha, self.gamma = how, decoder, alpha, gamma
        self.phi = nn.Parameter(torch.full_like(decoder.w, 0.25), requires_grad=how != "following")

    def forward(self, x):
        w = self.decoder.w.detach() if self.how == "held" else self.decoder.w
        phi = w / (self.gamma + w**2) if self.how == "following" else self.phi
        log_std = posterior_variance(w, self.alpha, self.gamma).log() / 2
        return torch.cat((phi * x, log_std.expand_as(x)), -1)


def recover_from_samples(rule, alpha, w_star, args, device):
    """w and phi [S] that the rule finds with objectives.py, fresh samples and Adam, for all of alpha and w_star [S] at once."""
    how, objective, estimator, N = RULES[rule]
    alpha, w_star = (torch.as_tensor(value, dtype=torch.float32, device=device).view(-1, 1, 1) for value in (alpha, w_star))
    decoder = Scale(len(alpha)).to(device)
    encoder = MismatchedEncoder(how, decoder, alpha, args.gamma)
    vae = EnsembleVAE(encoder, decoder, 1, len(alpha), init_sd=math.sqrt(args.gamma)).to(device)
    vae.log_gamma.requires_grad_(False)
    options = {"estimator": estimator} if estimator else {}
    optimiser = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.iterations)
    generator = torch.Generator(device).manual_seed(args.seed)
    sd = (args.gamma + w_star**2).sqrt()
    for _ in range(args.iterations):
        x = sd * torch.randn(len(alpha), args.batch, 1, generator=generator, device=device)
        q = vae.encode(x)
        z = vae.sample(q, vae.noise(q, N or args.samples, generator))
        optimiser.zero_grad()
        if how == "held":
            LEARN[objective](vae, x, q, z.detach(), **options).mean(-1).sum().backward(inputs=[decoder.w], retain_graph=True)
            INFER["kld"](vae, x, q, z).mean(-1).sum().backward(inputs=[encoder.phi])
        else:
            LEARN[objective](vae, x, q, z, **options).mean(-1).sum().backward()
        optimiser.step()
        schedule.step()
    w = decoder.w.detach()
    phi = w / (args.gamma + w**2) if how == "following" else encoder.phi.detach()
    return w.flatten().cpu().numpy(), phi.flatten().cpu().numpy()
