"""Fit q(z) to the posterior of a two-dimensional toy by KLD and by Fisher divergence, from many starts at once (Figures 2 and 5, A.5).

    python toy_inference.py                                   # the paper's Figure 2: step 1e-4, one sample, 10^6 steps; 4 min
    python toy_inference.py --lr 1e-3 --iterations 30000      # a look, 10 s (Adam ends as above; SGD on reparametrised FD does not)
    python toy_inference.py --grid 31 --iterations 100000 --frames 20       # basins of attraction: 961 starts, 2 min
    python toy_inference.py --family mixture                  # Figure 5: ten mixtures of ten Gaussians, FD without reparametrisation
    python toy_inference.py --family laplace                  # A.5.3: the biased gradient never moves a Laplace's location
    python toy_inference.py --gradients                       # A.5.1: KLD, FD and biased FD gradients between two Gaussians

p(z) = N(0, I_2), p(x|z) = N(h(z1) z2, sd^2): sym h = z1, sd 1/2; soft h = log(1 + e^{10 z1}) / 10, relu h = max(z1, 0),
bias h = 2 z1 + 1, all sd 1. q factorises, with a location and a log scale per coordinate (log sd of a Gaussian, from 0).

Axes: 2 coordinates of z, L likelihoods, N samples, I objectives (fd-repar, fd, kld), P optimisers (SGD, Adam), K starts. Every
run is independent of the others; all advance together in tensors [2, L, N, I, P, K], with gradients written out by hand, because a
step on such small tensors costs what its number of operations costs. All runs of a start see the same noise.
"""

import argparse
import bisect
import itertools
import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

import plots
from models import VAE
from objectives import INFER
from vsm.cli import Formatter, command_line, count, positive, positive_float
from vsm.device import pick_device
from vsm.posteriors import LIKELIHOODS, Grid, Posterior
from vsm.runs import Run, flag_name, run_name

OBJECTIVES = ("fd-repar", "fd", "kld")
OPTIMISERS = ("sgd", "adam")
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam
CHECKPOINT_SECONDS = 60
LOW_DENSITY = 0.99  # a start is caught where this much of the posterior's mass has a higher density than the end point


# ----------------------------------------------------------------------------------------------- families and gradients


class Family(NamedTuple):
    """A location-scale family, z = location + scale * e: what it adds to the gradients is its standard law."""

    noise: object  # (shape, generator, device) -> e
    score: object  # d log density / de
    slope: float  # its derivative, almost everywhere
    variance: float
    entropy: float  # nats, at scale 1
    nodes: object  # () -> nodes and weights of a quadrature over e


def normal_noise(shape, generator, device):
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)


def laplace_noise(shape, generator, device):
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=device) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).log()


def normal_nodes():
    e = np.linspace(-7, 7, 71)  # trapezoidal: exact to rounding for smooth integrands
    return e, np.exp(-(e**2) / 2) / np.exp(-(e**2) / 2).sum()


def laplace_nodes():
    e, weight = np.polynomial.laguerre.laggauss(40)
    return np.concatenate((-e[::-1], e)), np.concatenate((weight[::-1], weight)) / 2


FAMILIES = {"gaussian": Family(normal_noise, lambda e: -e, -1.0, 1.0, (1 + math.log(2 * math.pi)) / 2, normal_nodes),
            "laplace": Family(laplace_noise, lambda e: -e.sign(), 0.0, 2.0, 1 + math.log(2), laplace_nodes)}


class Draw(NamedTuple):
    """What the three gradients share, of samples z = location + scale e: [2, L, N, I, P, K], or without its first axis."""

    location: torch.Tensor
    scale: torch.Tensor
    e: torch.Tensor
    z: torch.Tensor
    h1: torch.Tensor  # h'(z1)
    h2: torch.Tensor  # h''(z1)
    r: torch.Tensor  # (x - g) / sd^2
    slope: torch.Tensor  # grad_z g
    likelihood: torch.Tensor  # grad_z log p(x|z)
    score: torch.Tensor  # of the standard law at e
    c: torch.Tensor  # grad_z log q(z) - grad_z log p(z) - grad_z log p(x|z)


def draw(params, e, score, posterior):
    location, scale = params[0].unsqueeze(2), params[1].exp().unsqueeze(2)
    z = location + scale * e
    _, h1, h2, r, slope = posterior.likelihood(z)
    likelihood = r * slope
    return Draw(location, scale, e, z, h1, h2, r, slope, likelihood, score, score / scale + z - likelihood)


# Gradients of the losses of objectives.INFER for one sample, with respect to the location and the log scale.


def kld(d, family, posterior):
    # -E_q log p(x|z) + KL(q || p(z)), the first term reparametrised, the second in closed form
    return d.location - d.likelihood, family.variance * d.scale**2 - 1 - d.likelihood * d.scale * d.e


def fd(d, family, posterior):
    # E_q 1/2 ||c||^2 with z held fixed: only grad_z log q(z) moves, by e = (z - location) / scale and by 1 / scale
    return -family.slope * d.c / d.scale**2, -(d.score + family.slope * d.e) * d.c / d.scale


def fd_repar(d, family, posterior):
    # E_q 1/2 ||c||^2 with e held fixed: z moves through the posterior's score, whose derivative is the Hessian H
    c1, c2 = d.c
    mixed = d.r * d.h1
    curvature = torch.stack((mixed * c2 + d.r * d.h2 * d.z[1] * c1, mixed * c1))
    Hc = curvature - d.slope * ((d.slope * d.c).sum(0) / posterior.like(c1)) - d.c
    return -Hc, -d.score / d.scale * d.c - Hc * d.scale * d.e


GRADIENTS = {"fd-repar": fd_repar, "fd": fd, "kld": kld}


def gradients(params, e, score, family, posterior):
    """Gradients for every sample, [2 (location, log scale), 2, L, N, I, P, K], from params [2, 2, L, I, P, K] and noise [2, 1, N, 1, 1, K]."""
    shared = draw(params, e, score, posterior)
    each = zip(*(field.unbind(-3) if field.shape[-3] > 1 else len(GRADIENTS) * (field.squeeze(-3),) for field in shared))
    location, log_scale = zip(*(gradient(Draw(*d), family, posterior) for gradient, d in zip(GRADIENTS.values(), each)))
    return torch.stack((torch.stack(location, -3), torch.stack(log_scale, -3)))


# ------------------------------------------------------------------------------------------------------ all runs together


class Descent:
    """Every run at once: parameters, Adam's moments, the noise generator, and the frames that are kept of the way."""

    def __init__(self, args, device):
        self.args, self.family = args, FAMILIES[args.family]
        self.posterior = Posterior(args.likelihoods, args.x, device)
        axis = torch.linspace(-args.extent, args.extent, args.grid, dtype=torch.float64, device=device)
        self.starts = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)  # [2, K]
        runs = (2, len(args.likelihoods), len(OBJECTIVES), len(OPTIMISERS), self.starts.shape[1])
        location = self.starts[:, None, None, None].expand(runs)
        self.params = torch.stack((location, torch.zeros_like(location)))  # [2, 2, L, I, P, K]
        self.moment1, self.moment2 = (torch.zeros_like(self.params[..., 1, :]) for _ in range(2))
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.step, self.seconds = 0, 0.0
        kept = np.geomspace(1, args.iterations, args.frames).round()
        self.frames = sorted({0, args.iterations // 2, args.iterations, *kept.astype(int).tolist()})
        self.trajectory = torch.zeros(len(self.frames), *self.params.shape, device=device)  # float32: for pictures
        self.keep()

    def noise(self):
        """For the next block of steps, [steps, 2, 1, N, 1, 1, K]; where blocks end depends on the flags alone."""
        N, K = self.args.samples, self.starts.shape[1]
        steps = min(max(1, min(1000, 4_000_000 // (2 * N * K))), self.args.iterations - self.step)
        return self.family.noise((steps, 2, 1, N, 1, 1, K), self.generator, self.params.device)

    def advance(self, noise):
        began = time.perf_counter()
        for e, score in zip(noise, self.family.score(noise)):
            self.update(gradients(self.params, e, score, self.family, self.posterior).mean(3))
            self.keep()
        self.seconds += time.perf_counter() - began

    def update(self, gradient):
        self.step += 1
        lr, adam = self.args.lr, gradient[..., 1, :]
        self.params[..., 0, :].sub_(gradient[..., 0, :], alpha=lr)
        self.moment1.lerp_(adam, 1 - BETA1)
        self.moment2.mul_(BETA2).addcmul_(adam, adam, value=1 - BETA2)
        sd = (self.moment2 / (1 - BETA2**self.step)).sqrt_().add_(EPS)
        self.params[..., 1, :].addcdiv_(self.moment1, sd, value=-lr / (1 - BETA1**self.step))

    def keep(self):
        index = bisect.bisect_left(self.frames, self.step)
        if index < len(self.frames) and self.frames[index] == self.step:
            self.trajectory[index] = self.params

    def state(self):
        return {name: getattr(self, name) for name in ("params", "moment1", "moment2", "trajectory", "step", "seconds")} | {
            "generator": self.generator.get_state()}

    def load(self, state):
        self.generator.set_state(state.pop("generator").cpu())
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def rate(self):
        """Runs x iterations per second."""
        return self.params[0, 0].numel() * self.step / self.seconds


def descend(args, device, run):
    """The arrays of metrics.npz for a Gaussian or Laplace q."""
    descent = Descent(args, device)
    state = run.load_checkpoint(device)
    if state:
        descent.load(state)
        print(f"{run.path}: resumed at iteration {descent.step}")
    saved = time.monotonic()
    with tqdm(total=args.iterations, initial=descent.step, unit="it") as bar:
        while descent.step < args.iterations:
            before = descent.step
            descent.advance(descent.noise())
            bar.update(descent.step - before)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                run.save_checkpoint(descent.state())
                saved = time.monotonic()
    grid = Grid(descent.posterior, device)
    arrays = {"location": descent.params[0], "log_scale": descent.params[1], "starts": descent.starts,
              "iteration": torch.tensor(descent.frames), "trajectory": descent.trajectory.half(), **grid.picture(),
              "rate": torch.tensor(descent.rate), **judge(descent, grid)}
    if args.family == "laplace":
        arrays["location_gradient"] = location_gradients(descent, grid)
    if args.compare_loop:
        arrays.update(compare_with_loop(args, device))
    report(arrays, args)
    lost = ~descent.trajectory.isfinite().flatten(1).any(1)  # frames in which no run is left
    status = f"diverged@{descent.frames[int(lost.int().argmax())]}" if lost.any() else "ok"
    return {"status": status, **to_numpy(arrays)}


# ------------------------------------------------------------------------------------------------------ numbers for claims


def quadrature(family, device):
    """Nodes e [2, 1, n, 1, 1, 1] and weights [n, 1, 1, 1] of expectations over both coordinates of e."""
    nodes, weights = (torch.as_tensor(value, device=device) for value in family.nodes())
    return torch.stack(torch.meshgrid(nodes, nodes, indexing="ij")).flatten(1).view(2, 1, -1, 1, 1, 1), torch.outer(weights, weights).view(-1, 1, 1, 1)


def kl_and_fd(params, family, posterior, grid):
    """KL(q || p(z|x)) in nats and FD(q || p(z|x)) = E_q 1/2 ||c||^2, [L, I, P, K], by quadrature over e. Differentiable."""
    e, weight = quadrature(family, params.device)
    d = draw(params, e, family.score(e), posterior)
    entropy = 2 * family.entropy + params[1].sum(0)
    evidence = grid.log_evidence.view(-1, 1, 1, 1)
    return evidence - entropy - (weight * posterior.log_joint(d.z)).sum(1), (weight * (d.c**2).sum(0)).sum(1) / 2


def best_fits(family, posterior, grid, starts=3):
    """The q of smallest KLD: location and scale [2, 2, L, S] and KL [L, S] where LBFGS ends from S starts; the lowest are the optima."""
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


def judge(descent, grid):
    """Where every run ended, [L, I, P, K]: see the README's table of keys."""
    family, posterior, params = descent.family, descent.posterior, descent.params
    chunks = (kl_and_fd(some, family, posterior, grid) for some in params.split(8, dim=-1))  # of starts, for memory
    kl, fd = (torch.cat(parts, -1) for parts in zip(*chunks))
    best, best_kl = best_fits(family, posterior, grid)
    lowest = best_kl.min(-1, keepdim=True).values
    optimum = best_kl < lowest + 1e-3  # sym has two, by symmetry
    q = torch.stack((params[0], params[1].exp()))
    gap = q[..., None] - best[:, :, :, None, None, None]  # [2, 2, L, I, P, K, S]
    distance = (gap[0] ** 2 + family.variance * gap[1] ** 2).sum(0).sqrt()
    distance = distance.masked_fill(~optimum[:, None, None, None], math.inf)
    distance, nearest = distance.min(-1)
    diverged = ~params.isfinite().all(0).all(0)
    mass_above = grid.mass_above(posterior.log_joint(params[0]) - grid.log_evidence.view(-1, 1, 1, 1))
    half = descent.trajectory[descent.frames.index(descent.args.iterations // 2)]
    return {"kl": kl, "fd": fd, "best_kl": lowest[:, 0], "excess_kl": kl - lowest[..., None, None], "distance": distance,
            "nearest": nearest, "best": best, "is_best": optimum, "mass_above": mass_above, "diverged": diverged,
            "caught": (mass_above > LOW_DENSITY) & ~diverged, "moved": (params[0] - half[0]).norm(dim=0)}


def location_gradients(descent, grid):
    """Gradients of FD(q || p(z|x)) by location at the starts, [3, 2, L, K]: expected biased, expected unbiased, finite differences."""
    family, posterior, params = descent.family, descent.posterior, descent.trajectory[0].double()
    e, weight = quadrature(family, params.device)
    expected = (weight * gradients(params, e, family.score(e), family, posterior)[0]).sum(2)  # [2, L, I, P, K]
    unbiased, biased = (expected[:, :, OBJECTIVES.index(name), 0] for name in ("fd-repar", "fd"))
    differences = []
    for coordinate in range(2):
        step = torch.zeros_like(params)
        step[0, coordinate] = 1e-4
        up, down = (kl_and_fd(params + sign * step, family, posterior, grid)[1] for sign in (1, -1))
        differences.append((up - down)[:, 0, 0] / 2e-4)
    return torch.stack((biased, unbiased, torch.stack(differences)))


class Product(nn.Module):
    """g(z) = h(z1) z2 as a decoder, [..., 2] -> [..., 1]."""

    def __init__(self, h):
        super().__init__()
        self.h = h

    def forward(self, z):
        return self.h(z[..., 0])[0][..., None] * z[..., 1:]


class Unamortised(nn.Module):
    """An encoder that does not look at x: its parameters are q's mean and log sd, [4]."""

    def __init__(self, start):
        super().__init__()
        self.q = nn.Parameter(torch.cat((start, torch.zeros_like(start))))

    def forward(self, x):
        return self.q.expand(len(x), 4)


def compare_with_loop(args, device):
    """The first steps again, run after run, by autograd, objectives.INFER and torch.optim: its rate, and how far it ends from ours.

    Numbers that are finite in neither agree; one that is finite in one alone is a difference of inf.
    """
    batched = Descent(argparse.Namespace(**{**vars(args), "iterations": args.compare_loop}), device)
    noise = []
    while batched.step < args.compare_loop:
        noise.append(batched.noise())
        batched.advance(noise[-1])
    noise = torch.cat(noise)[:, :, 0, :, 0, 0]  # [steps, 2, N, K]
    began, difference = time.perf_counter(), 0.0
    axes = (args.likelihoods, OBJECTIVES, OPTIMISERS, range(batched.starts.shape[1]))
    for (l, likelihood), (i, objective), (p, optimiser), (k, _) in itertools.product(*map(enumerate, axes)):
        alone = plain_run(likelihood, objective, optimiser, batched.starts[:, k], noise[..., k], args)
        ours = batched.params[:, :, l, i, p, k].flatten()
        lost = ~(alone.isfinite() | ours.isfinite())
        difference = max(difference, (alone - ours).abs().masked_fill(lost, 0).nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    rate = batched.params[0, 0].numel() * args.compare_loop / (time.perf_counter() - began)
    return {"loop_rate": torch.tensor(rate), "loop_difference": torch.tensor(difference)}


def plain_run(likelihood, objective, optimiser, start, noise, args):
    """Location and log scale [4] of one Gaussian q after descending with noise [steps, 2, N]."""
    h, sd = LIKELIHOODS[likelihood]
    encoder = Unamortised(start)
    vae = VAE(encoder, Product(h), 2, init_sd=sd).to(start)
    vae.log_gamma.requires_grad_(False)
    x = start.new_full((1, 1), args.x)
    descent = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser]([encoder.q], lr=args.lr)
    for e in noise:
        q = vae.encode(x)
        z = vae.sample(q, e.T[:, None])  # [N, 1, 2]
        if objective == "fd":
            z = z.detach()
        descent.zero_grad()
        INFER[objective](vae, x, q, z).mean().backward()
        descent.step()
    return encoder.q.detach()


def report(arrays, args):
    K = arrays["starts"].shape[1]
    print(f"{'':5} {'':8} {'':4} starts caught where {LOW_DENSITY:.0%} of the posterior is denser | medians: KLD to the posterior (nats), its excess\n"
          f"{'':5} {'':8} {'':4} over the best {args.family}'s, Wasserstein distance to that one, FD to the posterior, way gone in the second half of the run")
    names = itertools.product(*map(enumerate, (args.likelihoods, OBJECTIVES, OPTIMISERS)))
    for (l, likelihood), (i, objective), (p, optimiser) in names:
        ended = ~arrays["diverged"][l, i, p]
        medians = [arrays[key][l, i, p][ended].median().item() for key in ("kl", "excess_kl", "distance", "fd", "moved")] if ended.any() else []
        print(f"{likelihood:5} {objective:8} {optimiser:4} {int(arrays['caught'][l, i, p].sum()):4}/{K}"
              + (f", {K - int(ended.sum())} diverged" if not ended.all() else "") + " |", *(f"{value:7.3f}" for value in medians))
    print(f"{arrays['rate']:,.0f} runs x iterations per second" + (
        f", {arrays['loop_rate']:,.0f} one run after another (they differ by at most {arrays['loop_difference']:.1e})" if args.compare_loop else ""))
    if "location_gradient" in arrays:
        biased, unbiased, differences = arrays["location_gradient"]
        print(f"location gradient of the FD at the starts: biased at most {biased.abs().max():g}, unbiased {unbiased.abs().mean():.3g} on "
              f"average, within {(unbiased - differences).abs().max():.1e} of finite differences")


# ---------------------------------------------------------------------------------------------------- mixtures (Figure 5)


def log_components(z, logits, mean, log_sd):
    """log (weight_c N(z; mean_c, sd_c^2)): z [2, ..., N], logits [..., C], mean and log_sd [2, ..., C] to [..., C, N]."""
    u = (z.unsqueeze(-2) - mean[..., None]) / log_sd[..., None].exp()
    return (logits.log_softmax(-1)[..., None] - (u**2 / 2 + log_sd[..., None]).sum(0)) - math.log(2 * math.pi)


def mixture_score(z, logits, mean, log_sd):
    """grad_z log q(z), [2, ..., N]."""
    responsibility = log_components(z, logits, mean, log_sd).softmax(-2)
    return (responsibility * (mean[..., None] - z.unsqueeze(-2)) / (2 * log_sd[..., None]).exp()).sum(-2)


def fit_mixtures(args, device, run):
    """R mixtures of C Gaussians per likelihood by FD with z held fixed, so that nothing discrete is reparametrised. Arrays [L, R, ...]."""
    posterior, generator = Posterior(args.likelihoods, args.x, device), torch.Generator(device).manual_seed(args.seed)
    L, R, C, N = len(args.likelihoods), args.repeats, args.components, args.samples
    mean = normal_noise((2, 1, R, C), generator, device).repeat(1, L, 1, 1).requires_grad_()
    log_sd = torch.zeros_like(mean, requires_grad=True)
    logits = torch.zeros_like(mean[0], requires_grad=True)
    adam = torch.optim.Adam([logits, mean, log_sd], lr=args.lr)
    for _ in tqdm(range(args.iterations), unit="it"):
        with torch.no_grad():
            weight = logits.softmax(-1).nan_to_num(1.0)  # a diverged mixture stays so, and holds up no other
            component = torch.multinomial(weight.flatten(0, 1), N, replacement=True, generator=generator).view(1, L, R, N)
            component = component.expand(2, -1, -1, -1)
            z = mean.gather(-1, component) + log_sd.gather(-1, component).exp() * normal_noise((2, L, R, N), generator, device)
            target = posterior.score(z)
        adam.zero_grad()
        (((mixture_score(z, logits, mean, log_sd) - target) ** 2).sum(0).mean(-1) / 2).sum().backward()
        adam.step()
    fit = [value.detach() for value in (logits, mean, log_sd)]
    arrays = {"weight": fit[0].softmax(-1), "mean": fit[1], "sd": fit[2].exp(), **judge_mixtures(fit, posterior, Grid(posterior, device))}
    report_mixtures(arrays, args)
    return {"status": "ok" if arrays["kl"].isfinite().any() else f"diverged@{args.iterations}", **to_numpy(arrays)}


def judge_mixtures(fit, posterior, grid):
    """KL(q || p(z|x)) of every fit [L, R], split by the sides z1 + z2 > 0 and < 0: KL between their masses, and the mean KL within them.

    All by sums over the grid, and so nan for a fit that diverged or whose mass there is not 1 to a hundredth: it lies beyond the grid, or is too
    narrow for it.
    """
    right = grid.z.sum(0) > 0
    columns = []
    for r in range(fit[0].shape[1]):
        z = grid.z.flatten(1)[:, None].expand(-1, len(posterior.variance), -1)
        one = [fit[0][:, r], fit[1][:, :, r], fit[2][:, :, r]]
        log_q = log_components(z, *one).logsumexp(-2).view_as(grid.log_posterior)
        FD = ((mixture_score(z, *one) - posterior.score(z)) ** 2).sum(0).view_as(log_q) / 2
        q, p = log_q.exp() * grid.cell, grid.log_posterior.exp() * grid.cell
        kl = (q * (log_q - grid.log_posterior)).sum((1, 2))
        q_right, p_right = q[:, right].sum(-1), p[:, right].sum(-1)
        sides = (q_right, p_right), ((1 - q_right).clamp(min=0), 1 - p_right)
        between = sum(torch.xlogy(a, a / b) for a, b in sides)
        numbers = torch.stack((kl, between, kl - between, q_right, (q * FD).sum((1, 2))))
        on_grid = (q.sum((1, 2)) - 1).abs() < 0.01  # false for nan
        columns.append((*numbers.masked_fill(~on_grid, math.nan), log_q[:, ::2, ::2].half()))
    names = ("kl", "kl_between_sides", "kl_within_sides", "right_mass", "fd", "log_q")
    exact = (grid.log_posterior.exp() * right).sum((1, 2)) * grid.cell
    return {**{name: torch.stack(column, 1) for name, column in zip(names, zip(*columns))}, "exact_right_mass": exact,
            **grid.picture()}


def report_mixtures(arrays, args):
    for l, likelihood in enumerate(args.likelihoods):
        known = arrays["kl"][l].isfinite()
        n, lost = int(known.sum()), int((~known).sum())
        columns = {key: arrays[key][l][known] for key in ("kl", "kl_between_sides", "kl_within_sides", "right_mass", "fd")}
        line, fitted = f"{likelihood}: {n} run{'s' * (n != 1)}" + (f" ({lost} more diverged or left the grid)" if lost else ""), ""
        if n == 1:
            line += ", " + ", ".join(f"{key} {value.item():.3f}" for key, value in columns.items())
        elif n > 1:
            line += ", mean +- sd of " + ", ".join(f"{key} {value.mean():.3f} +- {value.std():.3f}" for key, value in columns.items())
            fitted = f", fitted {columns['right_mass'].min():.2f} to {columns['right_mass'].max():.2f}"
        print(line, f"(exact right mass {arrays['exact_right_mass'][l]:.3f}{fitted})")


# -------------------------------------------------------------------------- gradients between two Gaussians (appendix A.5.1)


def closed_gradients(mean, sd, target_mean, target_sd):
    """Gradients with respect to q's mean and sd, by name, of divergences of q = N(mean, sd^2) from p = N(target_mean, target_sd^2).

    "kld" (29); "fd" (31), of FD = 1/2 E_q (d log q - d log p)^2; "biased", FD's with z held fixed (32). Arrays broadcast.
    """
    d_mean, d_sd = (mean - target_mean) / target_sd**2, sd / target_sd**2 - 1 / sd
    return {"kld": (d_mean, d_sd), "fd": (d_mean / target_sd**2, d_sd * (1 / target_sd**2 + 1 / sd**2)),
            "biased": (d_mean / sd**2, d_sd * 2 / sd**2)}


def autograd_gradients(mean, sd, target_mean, target_sd):
    """The same by autograd, with the expectation under q by quadrature."""
    e, weight = map(torch.as_tensor, normal_nodes())

    def fisher(z):
        return (weight * ((mean[..., None] - z) / sd[..., None] ** 2 - (target_mean - z) / target_sd**2) ** 2).sum(-1) / 2

    mean, sd = (value.clone().requires_grad_() for value in torch.broadcast_tensors(mean, sd))
    z = mean[..., None] + sd[..., None] * e
    target_mean, target_sd = mean.new_tensor(target_mean), mean.new_tensor(target_sd)
    kl = kl_divergence(Normal(mean, sd), Normal(target_mean, target_sd))
    losses = {"kld": kl, "fd": fisher(z), "biased": fisher(z.detach())}
    return {name: torch.autograd.grad(loss.sum(), (mean, sd), retain_graph=True) for name, loss in losses.items()}


def compare_gradients(args, device, run):
    """Arrays [3 (kld, fd, biased), 2 (mean, sd), M, S] over q's mean and sd, for p = N(0, target_sd^2)."""
    mean, sd = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None], 2 ** torch.linspace(-2, 2, 41, dtype=torch.float64)
    closed, automatic = (torch.stack([torch.stack(torch.broadcast_tensors(*pair)) for pair in gradient(mean, sd, 0.0, args.target_sd).values()])
                         for gradient in (closed_gradients, autograd_gradients))
    error = ((closed - automatic).abs() / (1 + closed.abs())).max()
    print(f"closed forms agree with autograd to {error:.1e}, relative to 1 + |gradient|")
    return {"status": "ok", **to_numpy({"mean": mean[:, 0], "sd": sd, "gradient": closed, "autograd_error": error})}


# ------------------------------------------------------------------------------------------------------------ command line


def to_numpy(arrays):
    return {name: value.cpu().numpy() for name, value in arrays.items()}


EXPERIMENTS = {"gaussian": (descend, ("toy_trajectories", "toy_basins")), "laplace": (descend, ("toy_trajectories",)),
               "mixture": (fit_mixtures, ("toy_mixtures",)), "gradients": (compare_gradients, ("toy_gradients",))}
BELONGS = {  # flags that only some experiments read
    **dict.fromkeys(("grid", "extent", "frames"), ("gaussian", "laplace")), **dict.fromkeys(("components", "repeats"), ("mixture",)),
    "target_sd": ("gradients",), **dict.fromkeys(("family", "likelihoods", "x", "seed", "lr", "samples", "iterations"), ("gaussian", "laplace", "mixture"))}
DEFAULTS = {"gaussian": {"lr": 1e-4, "samples": 1, "iterations": 1_000_000}, "laplace": {"lr": 1e-4, "samples": 1, "iterations": 300_000},
            "mixture": {"lr": 1e-3, "samples": 10, "iterations": 5000}, "gradients": {}}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--family", choices=FAMILIES.keys() | {"mixture"}, default="gaussian", help="of q")
    flag("--gradients", action="store_true", help="A.5.1 in place of a fit: gradients between two univariate Gaussians")
    flag("--likelihoods", nargs="+", choices=LIKELIHOODS, default=["sym", "soft"], help="p(x|z)")
    flag("--x", type=float, default=2.0, help="the observed x")
    flag("--target-sd", type=positive_float, default=0.5, help="of p in --gradients")
    flag("--seed", type=count, default=0, help="of the noise, and of a mixture's first means")
    flag = parser.add_argument_group("model").add_argument
    flag("--grid", type=positive, default=6, help="starts per coordinate (gaussian, laplace)")
    flag("--extent", type=positive_float, default=2.5, help="starts lie in [-extent, extent]^2 (gaussian, laplace)")
    flag("--components", type=positive, default=10, help="Gaussians in a mixture")
    flag("--repeats", type=positive, default=10, help="mixtures fitted, each from its own first means")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--lr", type=positive_float, default=None, help="step size (default: 1e-4; mixture 1e-3)")
    flag("--samples", type=positive, default=None, help="samples of q per step, N (default: 1; mixture 10)")
    flag("--iterations", type=positive, default=None, help="steps (default: 1000000; laplace 300000, mixture 5000)")
    flag = parser.add_argument_group("output").add_argument
    flag("--frames", type=positive, default=200, help="points kept of every trajectory, evenly spaced in log iterations")
    flag("--compare-loop", type=count, default=0, help="time so many steps also as a plain loop over runs with autograd (gaussian)")
    flag("--device", default="cpu", help="auto | cpu | cuda | cuda:1 ... (a GPU pays for thousands of starts only)")
    flag("--out", default=None, help="the run's folder (default: runs/toy/ and the flags that matter)")
    flag("--overwrite", action="store_true", help="redo a run that is there")
    flag("--dry-run", action="store_true", help="say what would run, compute nothing, write nothing")
    args = parser.parse_args(argv)
    if not abs(args.x) <= 10:
        parser.error(f"--x must lie between -10 and 10, where the posteriors lie on the grid of the quadratures, not at {args.x}")
    if args.compare_loop and (args.gradients or args.family != "gaussian"):
        parser.error("--compare-loop runs the objectives of objectives.py, whose q is Gaussian: it goes with --family gaussian")
    if len(set(args.likelihoods)) < len(args.likelihoods):
        parser.error("--likelihoods names one twice")
    if not 0.01 <= args.target_sd <= 100:
        parser.error(f"--target-sd must lie between 0.01 and 100, not at {args.target_sd:g}")
    experiment = "gradients" if args.gradients else args.family
    for name, experiments in BELONGS.items():
        if experiment not in experiments and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{flag_name(name)} has no meaning for {experiment}; it goes with {', '.join(experiments)}")
    for name, value in DEFAULTS[experiment].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    name = f"gradients-sd{args.target_sd:g}" if args.gradients else run_name(
        args, ("family", "likelihoods", "seed"), vars(parser.parse_args([])) | DEFAULTS[experiment])
    args.out = args.out or f"runs/toy/{name}"
    return args


def main(args):
    device = pick_device(args.device)
    experiment, figures = EXPERIMENTS["gradients" if args.gradients else args.family]
    if args.dry_run:
        describe(args, device)
        return
    with Run(args.out, "toy_inference", vars(args), device, args.overwrite) as run:
        if not run.status:
            run.save_metrics(**experiment(args, device, run))
        for name in figures:
            plots.FIGURES[name]([run.path], run.path / f"{name}.png")


def describe(args, device):
    if args.gradients:
        what = "gradients between two univariate Gaussians"
    elif args.family == "mixture":
        what = f"{args.repeats} mixtures of {args.components} Gaussians, {args.iterations:,} steps"
    else:
        what = (f"{len(OBJECTIVES)} objectives x {len(OPTIMISERS)} optimisers x {args.grid**2} starts of a {args.family} q, "
                f"{args.iterations:,} steps of {args.lr:g}")
    print(f"{what}; likelihoods {', '.join(args.likelihoods)}, on {device}\nwould write {args.out}")


if __name__ == "__main__":
    command_line(parse_args, main)
