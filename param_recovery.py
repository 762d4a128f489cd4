"""Does a joint divergence recover the parameter that made the data, when q has the wrong variance? (Figure 1)

    python param_recovery.py                                               # the paper's figure, by closed forms: 4 s
    python param_recovery.py --stochastic                                  # the same minima also from samples, by Adam: 2 min
    python param_recovery.py --stochastic --iterations 200 --batch 100     # the same, not converged: 15 s

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
from tqdm import tqdm

from models import EnsembleVAE
from objectives import INFER, LEARN
from vsm.cli import Parser, add_output, command_line, count, positive, positive_float
from vsm.device import pick_device
from vsm.figures import recovery as figures
from vsm.linear import kappa
from vsm.names import run_name
from vsm.runs import Run

SWEEP = 2.0 ** np.linspace(-3, 3, 241)  # alphas of the comparison of all rules
CHECKED = np.array([0.5, 1, 1.5, 2, 3])  # the w* of the printed table and of --stochastic
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


def closed_forms(args):
    """The arrays of metrics.npz by closed forms, for R rules, A alphas and W values of w*."""
    alpha, w_star = np.array(args.alphas), np.linspace(0, args.w_star_max, args.points)

    def recovered(prefix, alpha, w_star, rules=RULES):
        w, phi = zip(*(recover(rule, alpha, args.gamma, w_star) for rule in rules))
        return {f"{prefix}w": np.stack(w), f"{prefix}phi": np.stack(phi)}

    shown = recovered("example_", args.alpha, args.w_star, ("JKLD", "JFD"))
    for name, divergence in (("jkld", joint_kld), ("jfd", joint_fd)):
        shown[f"example_{name}"] = divergence(shown["example_w"], shown["example_phi"], args.alpha, args.gamma, args.w_star)
    return {"rule": np.array(list(RULES)), "alpha": alpha, "w_star": w_star, "sweep_alpha": SWEEP, "checked_w_star": CHECKED,
            **recovered("", alpha[:, None], w_star), **recovered("sweep_", SWEEP, args.w_star),
            **recovered("checked_", alpha[:, None], CHECKED), **shown}


def stochastic(args, device):
    """The counterparts of `checked_w` and `checked_phi` [R, A, 5] that are found from samples."""
    alpha, w_star = (values.ravel() for values in np.meshgrid(args.alphas, CHECKED, indexing="ij"))
    w, phi = np.stack([recover_from_samples(rule, alpha, w_star, args, device) for rule in tqdm(RULES, desc="rules")], axis=1)
    shape = len(RULES), len(args.alphas), len(CHECKED)
    return {"sampled_w": np.abs(w).reshape(shape), "sampled_phi": (phi * np.sign(w)).reshape(shape)}


def report_recovery(arrays):
    """Print a line for every rule and alpha: the recovered w for each CHECKED w*; and how far sampled minima are from these."""
    print("w recovered from w* =", *(f"{w:7.3f}" for w in CHECKED))
    for r, rule in enumerate(RULES):
        for a, alpha in enumerate(arrays["alpha"]):
            print(f"{rule:14} alpha {alpha:<5g}", *(f"{w:7.3f}" for w in arrays["checked_w"][r, a]))
    if "sampled_w" in arrays:
        error = np.abs(arrays["sampled_w"] - arrays["checked_w"]).max((1, 2))
        print("from samples, largest |w - closed form|:", ", ".join(f"{rule} {e:.3f}" for rule, e in zip(RULES, error)))


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--alphas", type=positive_float, nargs="+", default=[0.5, 1.0, 2.0],
         help="variances of q over that of the exact posterior")
    flag("--gamma", type=positive_float, default=1.0, help="variance of p(x|z), which is not learnt")
    flag("--w-star-max", type=positive_float, default=3.0, help="largest w* of the figure")
    flag("--points", type=positive, default=121, help="number of w*, evenly spaced from 0")
    flag("--alpha", type=positive_float, default=0.5, help="alpha of the contours")
    flag("--w-star", type=positive_float, default=1.5, help="w* of the contours and of the comparison of all rules")
    flag("--stochastic", action="store_true", help="find every w also from samples, at w* = 0.5, 1, 1.5, 2, 3")
    flag("--iterations", type=positive, default=4000, help="Adam steps")
    flag("--lr", type=positive_float, default=0.2, help="Adam's step size, annealed to 0 by a cosine")
    flag("--batch", type=positive, default=500, help="data per step")
    flag("--samples", type=positive, default=4, help="posterior samples per datum, N, of the unbiased estimators, at least 2")
    flag("--seed", type=count, default=0, help="seed of the data and the posterior samples")
    add_output(flag, "runs/param_recovery", "cpu", " (the models are so small that a CPU is as fast)")
    args = parser.parse_args(argv)
    of_stochastic = ("iterations", "lr", "batch", "samples", "seed")
    if not args.stochastic and any(getattr(args, key) != parser.get_default(key) for key in of_stochastic):
        parser.error("--iterations, --lr, --batch, --samples and --seed have a meaning with --stochastic only")
    if args.samples < 2:
        parser.error("--samples must be at least 2: the unbiased estimators divide by N - 1")
    alphas = args.alpha, *args.alphas
    if max(args.w_star, args.w_star_max) > 100 or not 1e-4 <= args.gamma <= 1e4 or not all(1e-3 <= a <= 1e3 for a in alphas):
        parser.error("--w-star and --w-star-max go to 100, --gamma from 1e-4 to 1e4, --alpha and --alphas from 1e-3 to 1e3: "
                     "there the search finds w to a thousandth of the larger of w* and sqrt(gamma)")
    args.out = args.out or f"runs/param_recovery/{run_name(args, ('seed',), vars(parser.parse_args([])))}"
    return args


def main(args):
    device = pick_device(args.device)
    with Run(args.out, "param_recovery", vars(args), device, args.overwrite) as run:
        if not run.status:
            arrays = closed_forms(args) | (stochastic(args, device) if args.stochastic else {})
            finite = not args.stochastic or np.isfinite([arrays["sampled_w"], arrays["sampled_phi"]]).all()
            run.save_metrics(**arrays, status="ok" if finite else f"diverged@{args.iterations}")
            report_recovery(arrays)
        for figure in (figures.param_recovery, figures.recovery_rules):
            figure([run.path], run.path / f"{figure.__name__}.png")


if __name__ == "__main__":
    command_line(parse_args, main)
