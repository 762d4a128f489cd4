"""The 2-D distributions ("laws") that train_synthetic.py learns: sparse, mixture, banana, ring, spiral.

Each is a map of standard normals, so that one block of noise makes the data of a whole ensemble. log_prob is a closed form for
mixture, banana and ring, and a one-dimensional integral on a fine grid for sparse and spiral. `distribution` adds noise to them.
"""

import math
from functools import partial

import torch

from vsm.cli import UserError


class Distribution2D:
    """The distribution of x = transform(u), u ~ N(0, I).

    A subclass defines transform, [..., dim_noise] -> [..., 2], and log_prob if it is known. noisy_log_prob(x, sd)
    is the log density of x plus noise sd e, e ~ N(0, I).
    """

    dim_noise = 2
    log_prob = None  # [..., 2] -> [...], nats; None: the density is not known
    noisy_log_prob = None

    def sample(self, n, generator=None):
        """n points [n, 2], on the generator's device."""
        device = generator.device if generator is not None else None
        return self.transform(torch.randn(n, self.dim_noise, generator=generator, device=device))

    def score(self, x):
        """grad_x log p(x), [..., 2]. Raises ValueError where the density is not known."""
        return self._derivatives(x)[0]

    def score_matching_loss(self, x):
        """1/2 ||grad log p(x)||^2 + laplacian log p(x), [...]. Raises ValueError where the density is not known."""
        score, laplacian = self._derivatives(x)
        return 1 / 2 * (score**2).sum(-1) + laplacian

    def _derivatives(self, x):
        """grad_x log p(x) [..., 2] and laplacian_x log p(x) [...], a thousand points at a time."""
        if self.log_prob is None:
            raise ValueError(f"the density of {type(self).__name__.lower()} is not known")
        parts = []
        with torch.enable_grad():
            for some in x.reshape(-1, 2).split(1000):
                some = some.detach().requires_grad_()
                score = torch.autograd.grad(self.log_prob(some).sum(), some, create_graph=True)[0]
                laplacian = sum(torch.autograd.grad(score[:, i].sum(), some, retain_graph=True)[0][:, i] for i in range(2))
                parts.append((score.detach(), laplacian))
        score, laplacian = (torch.cat(part) for part in zip(*parts))
        return score.reshape(x.shape), laplacian.reshape(x.shape[:-1])


class Noisy(Distribution2D):
    """x + sd e for x from the distribution `clean` and e ~ N(0, I), the last two standard normals of transform."""

    def __init__(self, clean, sd):
        self.clean, self.sd, self.dim_noise = clean, sd, clean.dim_noise + 2
        self.log_prob = clean.noisy_log_prob and partial(clean.noisy_log_prob, sd=sd)

    def transform(self, u):
        return self.clean.transform(u[..., :-2]) + self.sd * u[..., -2:]


class Sparse(Distribution2D):
    """x = A' (sign(u) u^2) + 0.01 e, A = [[1, .3], [-.3, 1]] / 10; u, e ~ N(0, I)."""

    dim_noise = 4

    def transform(self, u):
        A = self._matrix(u)
        u, e = u.split(2, dim=-1)
        return (u.abs() * u) @ A + 0.01 * e

    def log_prob(self, x):
        return self.noisy_log_prob(x, 0)

    def noisy_log_prob(self, x, sd):
        """A A' = 0.0109 I, so y = x A' / 0.0109 has independent coordinates sign(u) u^2 + N(0, sd^2), each with an integral."""
        sd = math.hypot(0.01, sd) / math.sqrt(0.0109)
        return quadrature(x @ self._matrix(x).T / 0.0109, lambda u: u.abs() * u, sd).sum(-1) - math.log(0.0109)

    @staticmethod
    def _matrix(like):
        """A, without torch.tensor, whose copy from the host cannot be captured in a CUDA graph."""
        one = torch.eye(2, dtype=like.dtype, device=like.device)
        return (one + 0.3 * torch.stack((one[1], -one[0]))) / 10


class Mixture(Distribution2D):
    """An equal mixture of N((.5, .5), .04 I) and N((-.5, -.5), .04 I)."""

    dim_noise = 3
    centre, sd = 0.5, 0.2

    def transform(self, u):
        return self.centre * torch.where(u[..., 2:] > 0, 1.0, -1.0) + self.sd * u[..., :2]

    def log_prob(self, x):
        return self.noisy_log_prob(x, 0)

    def noisy_log_prob(self, x, sd):
        variance = self.sd**2 + sd**2
        logits = torch.stack([-((x - c) ** 2).sum(-1) for c in (self.centre, -self.centre)]) / (2 * variance)
        return logits.logsumexp(0) - math.log(2) - math.log(2 * math.pi * variance)


class Banana(Distribution2D):
    """x1 = .5 u1, x2 = x1^2 - .25 + .1 u2."""

    sd = (0.5, 0.1)

    def transform(self, u):
        x1 = self.sd[0] * u[..., 0]
        return torch.stack([x1, x1**2 - self.sd[0] ** 2 + self.sd[1] * u[..., 1]], dim=-1)

    def log_prob(self, x):
        u1, u2 = x[..., 0] / self.sd[0], (x[..., 1] - x[..., 0] ** 2 + self.sd[0] ** 2) / self.sd[1]
        return -(u1**2 + u2**2) / 2 - math.log(2 * math.pi * self.sd[0] * self.sd[1])

    def noisy_log_prob(self, x, sd):
        """An integral over u1, given which x is Gaussian."""
        u, log_weight = normal_nodes(x)
        x1, sd2 = self.sd[0] * u, math.hypot(self.sd[1], sd)
        squares = ((x[..., :1] - x1) / sd) ** 2 + ((x[..., 1:] - x1**2 + self.sd[0] ** 2) / sd2) ** 2
        return (log_weight - squares / 2).logsumexp(-1) - math.log(math.sqrt(2 * math.pi) * sd * sd2)


class Ring(Distribution2D):
    """A uniform direction times a radius ~ N(.7, .07^2)."""

    dim_noise = 3
    radius, sd = 0.7, 0.07

    def transform(self, u):
        direction = torch.nn.functional.normalize(u[..., :2], dim=-1)
        return direction * (self.radius + self.sd * u[..., 2:])

    def log_prob(self, x):
        r = x.norm(dim=-1)
        return -(((r - self.radius) / self.sd) ** 2) / 2 - r.log() - math.log((2 * math.pi) ** 1.5 * self.sd)

    def noisy_log_prob(self, x, sd):
        """An integral over the radius; over the direction it is I0, the modified Bessel function, here times exp(-argument)."""
        u, log_weight = normal_nodes(x)
        r, distance = (self.radius + self.sd * u).abs(), x.norm(dim=-1, keepdim=True)
        log_kernel = torch.special.i0e(r * distance / sd**2).log() - (r - distance) ** 2 / (2 * sd**2)
        return (log_weight + log_kernel).logsumexp(-1) - math.log(math.sqrt(2 * math.pi) * sd**2)


class Spiral(Distribution2D):
    """One and a half turns from the origin to radius 1: radius sqrt(t), angle 3 pi sqrt(t), t uniform, noise sd .04."""

    dim_noise = 3

    def transform(self, u):
        t = torch.special.ndtr(u[..., 2:]).sqrt()
        angle = 3 * math.pi * t
        return t * torch.cat([angle.cos(), angle.sin()], dim=-1) + 0.04 * u[..., :2]

    def log_prob(self, x):
        return self.noisy_log_prob(x, 0)

    def noisy_log_prob(self, x, sd):
        """An integral over the radius r = sqrt(t), which has the density 2 r on [0, 1], by the midpoint rule."""
        r = (torch.arange(4000, dtype=x.dtype, device=x.device) + 0.5) / 4000
        angle = 3 * math.pi * r
        centre = r[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
        variance = math.hypot(0.04, sd) ** 2
        squared = ((x[..., None, :] - centre) ** 2).sum(-1) / variance
        return ((2 * r / 4000).log() - squared / 2).logsumexp(-1) - math.log(2 * math.pi * variance)


def normal_nodes(like, nodes=4000):
    """Nodes u of the trapezoidal rule for u ~ N(0, 1), over [-8, 8], and their log weights less log sqrt(2 pi)."""
    u = torch.linspace(-8, 8, nodes, dtype=like.dtype, device=like.device)
    return u, -(u**2) / 2 - math.log(2 * math.pi) + math.log(16 / (nodes - 1))


def quadrature(y, transform, sd):
    """The log density at y [...] of transform(u) + sd e, u and e standard normal, by an integral over u."""
    u, log_weight = normal_nodes(y)
    return (log_weight - math.log(sd) - ((y[..., None] - transform(u)) / sd) ** 2 / 2).logsumexp(-1)


LEAST_NOISE = 0.003  # the 4000 nodes of `normal_nodes` are 0.002 apart in x1 of banana
DISTRIBUTIONS = {"sparse": Sparse(), "mixture": Mixture(), "banana": Banana(), "ring": Ring(), "spiral": Spiral()}


def distribution(name, noise=0):
    """The entry of DISTRIBUTIONS, with Gaussian noise of the standard deviation `noise` added where it is not 0.

    Raises UserError for a noise that the integrals of the density do not resolve.
    """
    if 0 < noise < LEAST_NOISE:
        raise UserError(f"--noise {noise:g} is too small for the density of noisy data; use 0, or {LEAST_NOISE:g} or more")
    return Noisy(DISTRIBUTIONS[name], noise) if noise else DISTRIBUTIONS[name]
