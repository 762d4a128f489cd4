"""The toy posteriors of Figure 2, exactly: p(z) = N(0, I_2), p(x|z) = N(h(z1) z2, sd^2), and quadrature over z on a grid."""

import math

import torch
import torch.nn.functional as F

HALF_WIDTH, CELLS = 5.0, 401  # the grid of the exact posterior: 401 x 401 points in [-5, 5]^2, 0.025 apart


def linear(slope, intercept):
    return lambda t: (slope * t + intercept, torch.full_like(t, slope), torch.zeros_like(t))


def relu(t):
    return t.relu(), (t > 0).to(t.dtype), torch.zeros_like(t)


def soft(t):
    gate = torch.sigmoid(10 * t)
    return F.softplus(t, beta=10), gate, 10 * gate * (1 - gate)


# name: t -> h, h', h'', and the sd of p(x|z)
LIKELIHOODS = {"sym": (linear(1, 0), 0.5), "soft": (soft, 1.0), "relu": (relu, 1.0), "bias": (linear(2, 1), 1.0)}


class Posterior:
    """p(z|x) under L likelihoods at once. z has shape [2, L, ...], where the first two axes are coordinate and likelihood."""

    def __init__(self, names, x, device):
        self.x, self.h = x, [LIKELIHOODS[name][0] for name in names]
        self.variance = torch.tensor([LIKELIHOODS[name][1] ** 2 for name in names], dtype=torch.float64, device=device)

    def likelihood(self, z):
        """For g = h(z1) z2: h, h', h'', the residual r = (x - g) / sd^2, all [L, ...], and grad_z g = (h' z2, h), [2, L, ...]."""
        h, h1, h2 = (torch.stack(parts) for parts in zip(*(f(t) for f, t in zip(self.h, z[0].unbind()))))
        r = (self.x - h * z[1]) / self.like(h)
        return h, h1, h2, r, torch.stack((h1 * z[1], h))

    def score(self, z):
        """grad_z log p(z|x), [2, L, ...]."""
        *_, r, slope = self.likelihood(z)
        return r * slope - z

    def log_joint(self, z):
        """log p(z) + log p(x|z), [L, ...], nats."""
        h, *_ = self.likelihood(z)
        variance = self.like(h)
        log_likelihood = -(self.x - h * z[1]) ** 2 / (2 * variance) - (2 * math.pi * variance).log() / 2
        return log_likelihood - (z**2).sum(0) / 2 - math.log(2 * math.pi)

    def like(self, value):
        """sd^2 in the shape of value [L, ...]."""
        return self.variance.view(-1, *[1] * (value.dim() - 1))


class Grid:
    """The exact posteriors on a square grid, which every quadrature over z uses."""

    def __init__(self, posterior, device):
        self.axis = torch.linspace(-HALF_WIDTH, HALF_WIDTH, CELLS, dtype=torch.float64, device=device)
        self.z = torch.stack(torch.meshgrid(self.axis, self.axis, indexing="ij"))  # [2, G, G]
        self.cell = float(self.axis[1] - self.axis[0]) ** 2
        L = len(posterior.variance)
        log_joint = posterior.log_joint(self.z[:, None].expand(-1, L, -1, -1))
        self.log_evidence = log_joint.flatten(1).logsumexp(1) + math.log(self.cell)  # [L]
        self.log_posterior = log_joint - self.log_evidence[:, None, None]  # [L, G, G]

    def mass_above(self, log_density):
        """The posterior's mass where its log density exceeds log_density [L, ...]: 0 at the mode, 1 far away from it."""
        levels = []
        for exact, value in zip(self.log_posterior, log_density):
            ordered = exact.flatten().sort(descending=True).values
            mass = torch.cat((ordered.new_zeros(1), ordered.exp().cumsum(0) * self.cell))
            levels.append(mass[torch.searchsorted(-ordered, -value.contiguous())])
        return torch.stack(levels)

    def picture(self):
        """Arrays for figures: `log_posterior` [L, G', G'] at every other point of the `axis` [G'], in half precision."""
        return {"log_posterior": self.log_posterior[:, ::2, ::2].half(), "axis": self.axis[::2]}
