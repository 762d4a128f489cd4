"""Mixtures of Gaussians fitted to the toy posteriors by the Fisher divergence with z held fixed (Figure 5, appendix A.5.2).

Axes: 2 coordinates of z, L likelihoods, R repeats (independent fits), C components, N samples.
"""

import math

import torch

from training import Resumable
from vsm.tables import markdown_table, with_error
from vsm.toys.gradients import normal_noise
from vsm.toys.posteriors import Posterior

BLOCK = 100  # steps of one call of advance(), after which the loop may save a checkpoint


def log_components(z, logits, mean, log_sd):
    """log (weight_c N(z; mean_c, sd_c^2)), [..., C, N], from z [2, ..., N], logits [..., C], mean and log_sd [2, ..., C]."""
    u = (z.unsqueeze(-2) - mean[..., None]) / log_sd[..., None].exp()
    return (logits.log_softmax(-1)[..., None] - (u**2 / 2 + log_sd[..., None]).sum(0)) - math.log(2 * math.pi)


def mixture_score(z, logits, mean, log_sd):
    """grad_z log q(z), [2, ..., N]; the arguments have the shapes of `log_components`."""
    responsibility = log_components(z, logits, mean, log_sd).softmax(-2)
    return (responsibility * (mean[..., None] - z.unsqueeze(-2)) / (2 * log_sd[..., None]).exp()).sum(-2)


class Mixtures(Resumable):
    """R mixtures of C Gaussians for each likelihood, fitted together. z is held fixed, so no component needs reparametrising.

    `args` holds the flags likelihoods, x, repeats, components, samples, lr, iterations and seed.
    """

    def __init__(self, args, device):
        self.args, self.posterior = args, Posterior(args.likelihoods, args.x, device)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        means = normal_noise((2, 1, args.repeats, args.components), self.generator, device)
        self.mean = means.repeat(1, len(args.likelihoods), 1, 1).requires_grad_()  # [2, L, R, C]
        self.log_sd = torch.zeros_like(self.mean, requires_grad=True)
        self.logits = torch.zeros_like(self.mean[0], requires_grad=True)  # [L, R, C]
        self.adam = torch.optim.Adam(self.fit(), lr=args.lr)
        for p in self.fit():  # the state is made now, so that a checkpoint can be copied into it
            self.adam.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.generators, self.seeds = [self.generator], [args.seed]

    def fit(self):
        """The parameters: logits, mean and log_sd."""
        return [self.logits, self.mean, self.log_sd]

    def samples(self):
        """Samples z [2, L, R, N] of every mixture, without a gradient."""
        with torch.no_grad():
            N = self.args.samples
            weight = self.logits.softmax(-1).nan_to_num(1.0)  # a mixture that diverged must not stop the others
            component = torch.multinomial(weight.flatten(0, 1), N, replacement=True, generator=self.generator)
            component = component.view(1, *weight.shape[:2], N).expand(2, -1, -1, -1)
            noise = normal_noise(component.shape, self.generator, weight.device)
            return self.mean.gather(-1, component) + self.log_sd.gather(-1, component).exp() * noise

    def run_step(self):
        """Do the next block of steps."""
        for _ in range(min(BLOCK, self.args.iterations - self.step)):
            z = self.samples()
            self.adam.zero_grad()
            gap = mixture_score(z, *self.fit()) - self.posterior.score(z)
            ((gap**2).sum(0).mean(-1) / 2).sum().backward()
            self.adam.step()
            self.step += 1

    def state(self):
        named = {"logits": self.logits, "mean": self.mean, "log_sd": self.log_sd}
        moments = {f"{name}.{moment}": tensor for name, p in named.items() for moment, tensor in self.adam.state[p].items()}
        return {name: tensor.detach() for name, tensor in (named | moments).items()}

    def arrays(self):
        logits, mean, log_sd = (value.detach() for value in self.fit())
        return {"weight": logits.softmax(-1), "mean": mean, "sd": log_sd.exp()}


@torch.no_grad()
def how_well_mixtures_fit(fit, posterior, grid):
    """Arrays [L, R] over all fits, as sums over the grid, and log_q, the log density [L, R, G', G'].

    kl: KL(q || p(z|x)) in nats. Its part kl_between_sides is that of the masses of the sides z1 + z2 > 0 (right) and < 0, and
    kl_within_sides is the rest. right_mass: q's mass on the right; exact_right_mass [L]: the posterior's. fd: the Fisher
    divergence. `fit` is logits [L, R, C], mean and log_sd [2, L, R, C]. The numbers are NaN for a fit that diverged, or whose
    mass on the grid differs from 1 by a hundredth or more: such a fit lies beyond the grid, or is too narrow for it.
    """
    right = grid.z.sum(0) > 0
    columns = []
    for r in range(fit[0].shape[1]):
        z = grid.z.flatten(1)[:, None].expand(-1, len(posterior.variance), -1)
        one = [fit[0][:, r], fit[1][:, :, r], fit[2][:, :, r]]
        log_q = log_components(z, *one).logsumexp(-2).view_as(grid.log_posterior)
        gap = ((mixture_score(z, *one) - posterior.score(z)) ** 2).sum(0).view_as(log_q) / 2
        q, p = log_q.exp() * grid.cell, grid.log_posterior.exp() * grid.cell
        kl = (q * (log_q - grid.log_posterior)).sum((1, 2))
        q_right, p_right = q[:, right].sum(-1), p[:, right].sum(-1)
        sides = (q_right, p_right), ((1 - q_right).clamp(min=0), 1 - p_right)
        between = sum(torch.xlogy(a, a / b) for a, b in sides)
        numbers = torch.stack((kl, between, kl - between, q_right, (q * gap).sum((1, 2))))
        on_grid = (q.sum((1, 2)) - 1).abs() < 0.01  # False for NaN
        columns.append((*numbers.masked_fill(~on_grid, math.nan), log_q[:, ::2, ::2].half()))
    names = ("kl", "kl_between_sides", "kl_within_sides", "right_mass", "fd", "log_q")
    exact = (grid.log_posterior.exp() * right).sum((1, 2)) * grid.cell
    return {**{name: torch.stack(column, 1) for name, column in zip(names, zip(*columns))}, "exact_right_mass": exact}


def print_mixtures(arrays, args):
    """Print a table with a row for each likelihood: the numbers of fits, and mean ± standard deviation over those on the grid."""
    keys, rows = ("kl", "kl_between_sides", "kl_within_sides", "right_mass", "fd"), []
    for l, likelihood in enumerate(args.likelihoods):
        known = arrays["kl"][l].isfinite()
        columns = [arrays[key][l][known] for key in keys]
        cells = [with_error(values.mean(), values.std() if len(values) > 1 else math.nan, ".3f") for values in columns]
        rows.append([likelihood, int(known.sum()), int((~known).sum()), *cells, f"{arrays['exact_right_mass'][l]:.3f}"])
    print(markdown_table(["", "fits", "diverged or off the grid", *keys, "exact right mass"], rows, "l" + "r" * (len(keys) + 3)))
