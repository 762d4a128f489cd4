"""All runs of one experiment at once: every likelihood, objective, optimiser and start advances in the same tensors; their ends.

The tensors are so small that the time of a step depends on its number of operations only; so one step of all runs takes little
longer than a step of one. All runs of a start see the same noise. `vsm.toys.gradients` names the axes of the tensors.
"""

import bisect
import itertools
import math

import numpy as np
import torch

from training import Resumable
from vsm.tables import markdown_table, number_text
from vsm.toys.gradients import FAMILIES, gradients, sample
from vsm.toys.posteriors import Posterior

OPTIMISERS = ("sgd", "adam")  # the axis P
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam
LOW_DENSITY = 0.99  # a start is caught if this much of the posterior's mass has a higher density than its end point


class Descent(Resumable):
    """Parameters, Adam's moments, the noise generator, and the frames of the trajectories that are kept.

    `args` holds the flags family, likelihoods, x, objectives, extent, grid, samples, lr, iterations, frames and seed.
    """

    def __init__(self, args, device):
        self.args, self.family = args, FAMILIES[args.family]
        self.posterior = Posterior(args.likelihoods, args.x, device)
        axis = torch.linspace(-args.extent, args.extent, args.grid, dtype=torch.float64, device=device)
        self.starts = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)  # [2, K]
        runs = (2, len(args.likelihoods), len(args.objectives), len(OPTIMISERS), self.starts.shape[1])
        location = self.starts[:, None, None, None].expand(runs)
        self.params = torch.stack((location, torch.zeros_like(location)))  # [2, 2, L, I, P, K]
        self.moment1, self.moment2 = (torch.zeros_like(self.params[..., 1, :]) for _ in range(2))
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.generators, self.seeds = [self.generator], [args.seed]
        kept = np.geomspace(1, args.iterations, args.frames).round()
        self.frames = sorted({0, args.iterations // 2, args.iterations, *kept.astype(int).tolist()})
        self.trajectory = torch.zeros(len(self.frames), *self.params.shape, device=device)  # float32: for pictures
        self.keep_frame()

    def noise(self):
        """Noise of the next block of steps, [steps, 2, 1, N, 1, 1, K]; the sizes of blocks depend on the flags alone."""
        N, K = self.args.samples, self.starts.shape[1]
        steps = min(max(1, min(1000, 4_000_000 // (2 * N * K))), self.args.iterations - self.step)
        return self.family.noise((steps, 2, 1, N, 1, 1, K), self.generator, self.params.device)

    def run_step(self, noise=None):
        """One step for each entry of `noise`, by default a block of new noise."""
        noise = self.noise() if noise is None else noise
        for e, score in zip(noise, self.family.score(noise)):
            self.update(gradients(self.params, e, score, self.family, self.posterior, self.args.objectives).mean(3))
            self.keep_frame()

    def update(self, gradient):
        """One step of both optimisers by the gradients [2, 2, L, I, P, K]."""
        self.step += 1
        lr, adam = self.args.lr, gradient[..., 1, :]
        self.params[..., 0, :].sub_(gradient[..., 0, :], alpha=lr)
        self.moment1.lerp_(adam, 1 - BETA1)
        self.moment2.mul_(BETA2).addcmul_(adam, adam, value=1 - BETA2)
        sd = (self.moment2 / (1 - BETA2**self.step)).sqrt_().add_(EPS)
        self.params[..., 1, :].addcdiv_(self.moment1, sd, value=-lr / (1 - BETA1**self.step))

    def keep_frame(self):
        """Store the parameters if the present step is one of the frames."""
        index = bisect.bisect_left(self.frames, self.step)
        if index < len(self.frames) and self.frames[index] == self.step:
            self.trajectory[index] = self.params

    def state(self):
        return {name: getattr(self, name) for name in ("params", "moment1", "moment2", "trajectory")}

    @property
    def status(self):
        """`ok`, or `diverged@` and the first frame in which no run has finite parameters left."""
        lost = ~self.trajectory.isfinite().flatten(1).any(1)
        return f"diverged@{self.frames[int(lost.int().argmax())]}" if lost.any() else "ok"

    def arrays(self):
        """Starts, ends and trajectories, by their names in metrics.npz."""
        return {"location": self.params[0], "log_scale": self.params[1], "starts": self.starts,
                "iteration": torch.tensor(self.frames), "trajectory": self.trajectory.half()}


def noise_quadrature(family, device):
    """Nodes e [2, 1, n, 1, 1, 1] and weights [n, 1, 1, 1] of a quadrature over both coordinates of the noise e."""
    nodes, weights = (torch.as_tensor(value, device=device) for value in family.nodes())
    pairs = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij")).flatten(1)
    return pairs.view(2, 1, -1, 1, 1, 1), torch.outer(weights, weights).view(-1, 1, 1, 1)


def kl_and_fd(params, family, posterior, grid):
    """KL(q || p(z|x)) in nats and the Fisher divergence E_q 1/2 ||c||^2, [L, I, P, K] each, by quadrature over e. Differentiable.

    `params` is [2 (location, log scale), 2, L, I, P, K].
    """
    e, weight = noise_quadrature(family, params.device)
    samples = sample(params, e, family.score(e), posterior)
    entropy = 2 * family.entropy + params[1].sum(0)
    evidence = grid.log_evidence.view(-1, 1, 1, 1)
    kl = evidence - entropy - (weight * posterior.log_joint(samples.z)).sum(1)
    return kl, (weight * (samples.c**2).sum(0)).sum(1) / 2


def best_fits(family, posterior, grid, starts=3):
    """The ends of LBFGS on the KL divergence from S = starts^2 starts: location and scale [2, 2, L, S], and KL [L, S] in nats.

    Those with the lowest KL are the best fits of the family.
    """
    axis = torch.linspace(-1.5, 1.5, starts, dtype=torch.float64, device=grid.axis.device)
    location = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1) + 0.01  # off the axes of symmetry
    location = location[:, None, None, None].repeat(1, len(posterior.variance), 1, 1, 1)
    params = torch.stack((location, torch.zeros_like(location))).requires_grad_()
    optimiser = torch.optim.LBFGS([params], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = kl_and_fd(params, family, posterior, grid)[0].sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    params = params.detach()
    kl, _ = kl_and_fd(params, family, posterior, grid)
    return torch.stack((params[0], params[1].exp()))[:, :, :, 0, 0], kl[:, 0, 0]


def where_runs_ended(descent, grid):
    """Arrays [L, I, P, K] for every run's end, and the best fits of the family; docs/files.md defines them by name."""
    family, posterior, params = descent.family, descent.posterior, descent.params
    chunks = [kl_and_fd(some, family, posterior, grid) for some in params.split(8, dim=-1)]  # 8 starts each, to bound the memory
    kl, fisher = (torch.cat(parts, -1) for parts in zip(*chunks))
    best, best_kl = best_fits(family, posterior, grid)
    lowest = best_kl.min(-1, keepdim=True).values
    is_best = best_kl < lowest + 1e-3  # sym has two best fits, by symmetry
    distance, nearest = wasserstein_distance(params, best, family).masked_fill(~is_best[:, None, None, None], math.inf).min(-1)
    diverged = ~params.isfinite().all(0).all(0)
    mass_above = grid.mass_above(posterior.log_joint(params[0]) - grid.log_evidence.view(-1, 1, 1, 1))
    location_at_half, _ = descent.trajectory[descent.frames.index(descent.args.iterations // 2)]
    return {"kl": kl, "fd": fisher, "best_kl": lowest[:, 0], "excess_kl": kl - lowest[..., None, None],
            "distance": distance, "nearest": nearest, "best": best, "is_best": is_best,
            "mass_above": mass_above, "diverged": diverged, "caught": (mass_above > LOW_DENSITY) & ~diverged,
            "moved": (params[0] - location_at_half).norm(dim=0)}


def wasserstein_distance(params, fits, family):
    """2-Wasserstein distances [L, I, P, K, S] between the runs' q, `params` [2, 2, L, I, P, K], and the S `fits` [2, 2, L, S]."""
    q = torch.stack((params[0], params[1].exp()))
    gap = q[..., None] - fits[:, :, :, None, None, None]
    return (gap[0] ** 2 + family.variance * gap[1] ** 2).sum(0).sqrt()


def location_gradients(descent, grid):
    """Gradients of the Fisher divergence with respect to q's location at the starts, [3, 2, L, K].

    The first is the expectation of the biased estimator (z held fixed), the second that of the unbiased one (z reparametrised),
    the third is by finite differences.
    """
    family, posterior = descent.family, descent.posterior
    params = descent.trajectory[0].double()[:, :, :, :1]  # the starts are the same for all objectives and optimisers
    e, weight = noise_quadrature(family, params.device)
    biased, unbiased = ((weight * gradients(params, e, family.score(e), family, posterior, [name])[0]).sum(2)[:, :, 0, 0]
                        for name in ("fd", "fd-repar"))
    differences = []
    for coordinate in range(2):
        step = torch.zeros_like(params)
        step[0, coordinate] = 1e-4
        up, down = (kl_and_fd(params + sign * step, family, posterior, grid)[1] for sign in (1, -1))
        differences.append((up - down)[:, 0, 0] / 2e-4)
    return torch.stack((biased, unbiased, torch.stack(differences)))


def print_ends(arrays, args):
    """Print a table with a row for each likelihood, objective and optimiser, and the meaning of its columns."""
    keys, rows = ("kl", "excess_kl", "distance", "fd", "moved"), []
    names = itertools.product(*map(enumerate, (args.likelihoods, args.objectives, OPTIMISERS)))
    for (l, likelihood), (i, objective), (p, optimiser) in names:
        ended = ~arrays["diverged"][l, i, p]
        medians = [number_text(arrays[key][l, i, p][ended].median(), ".3f") for key in keys]
        rows.append([likelihood, objective, optimiser, int(arrays["caught"][l, i, p].sum()), int((~ended).sum()), *medians])
    print(f"{arrays['starts'].shape[1]} starts:")
    print(markdown_table(["", "", "", "caught", "diverged", *keys], rows, "lll" + "r" * (len(keys) + 2)))
    print(f"caught: starts that end where {LOW_DENSITY:.0%} of the posterior is denser. The other columns are medians over the\n"
          f"starts that did not diverge. kl: KL divergence from the posterior, nats; excess_kl: the same less that of the best\n"
          f"{args.family} fit; distance: 2-Wasserstein distance from that fit; fd: Fisher divergence from the posterior;\n"
          "moved: distance that q's location moved in the second half of the steps.")
    if "location_gradient" in arrays:
        biased, unbiased, differences = arrays["location_gradient"]
        print(f"gradient of FD by the location at the starts: biased at most {biased.abs().max():g}, unbiased "
              f"{unbiased.abs().mean():.3g} on average, within {(unbiased - differences).abs().max():.1e} of finite differences")
