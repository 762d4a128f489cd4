"""All runs of one experiment at once: every likelihood, objective, optimiser and start advances in the same tensors.

The tensors are so small that the time of a step depends on its number of operations only; so one step of all runs takes little
longer than a step of one. All runs of a start see the same noise. `vsm.toys.gradients` names the axes of the tensors.
"""

import bisect

import numpy as np
import torch

from training import Resumable
from vsm.toys.gradients import FAMILIES, gradients
from vsm.toys.posteriors import Posterior

OPTIMISERS = ("sgd", "adam")  # the axis P
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam


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
