"""Audit a learning objective: is its gradient right, and where does its training end? It takes seconds.

NAME is an objective that objectives.py has, or one that you have just added to it (docs/extending.md). No data are needed:
    python audit.py swersky
    python audit.py bao --estimator unbiased

The audit prints its findings, each behind its verdict: `ok`, `note` (true of some right objectives) or `WRONG`. It writes
metrics.npz and audit.md to a folder under runs/audit. The exit code is 1 if a finding is WRONG.
"""

import math
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd import grad
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from metrics import objective_terms
from models import VAE
from objectives import ESTIMATORS, LEARN, dot, likelihood_score
from vsm import linear
from vsm.cli import Parser, command_line, count
from vsm.device import pick_device
from vsm.runs import Run
from vsm.tables import markdown_table

SAMPLES, ALPHAS = (1, 2, 5, 20), (0.5, 1.0, 2.0)
KAPPA_TOLERANCE = 0.02  # a kappa this close to 1, or a slope this close to 0, counts as exact


class Finding(NamedTuple):
    """A sentence, and whether it is `ok`, a `note` (true of some right objectives) or `WRONG`."""
    title: str
    verdict: str
    text: str


def judge(title, right, text, otherwise):
    """The result of a check without arrays: a finding that is ok with the first text where it is `right`, or WRONG."""
    return [Finding(title, "ok", text) if right else Finding(title, "WRONG", otherwise)], {}


def random_case(seed, data=5):
    """A small nonlinear VAE, random data x [B, D], their q, N = 3 samples z [N, B, Dz] of it, and a noise's score t, in float64.

    The networks are smooth. x requires a gradient, and z is detached.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
        decoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))
    vae = VAE(encoder, decoder, 2, init_sd=0.7).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(data, 3, generator=generator, dtype=torch.float64).requires_grad_()
    q = vae.encode(x)
    z = vae.sample(q, vae.noise(q, 3, generator)).detach()
    return vae, x, q, z, torch.randn(data, 3, generator=generator, dtype=torch.float64)


def check_form(name, options, seed):
    """Whether the loss is one finite number per datum."""
    vae, x, q, z, t = random_case(seed)
    loss = LEARN[name](vae, x, q, z, t=t, **options)
    finite = bool(loss.isfinite().all())
    text = f"the loss of {len(x)} data has shape {list(loss.shape)} and is {'finite' if finite else 'not finite'}"
    return judge("form", finite and loss.shape == (len(x),), "one finite number per datum, [B]", text)


def check_gradient(name, options, seed, step=1e-6):
    """Whether autograd's gradient by theta agrees with central differences of the loss, while q and z are held fixed."""
    vae, x, q, z, t = random_case(seed)
    params = [*vae.decoder.parameters(), vae.log_gamma]
    theta = parameters_to_vector(params).detach()

    def loss_at(theta):
        vector_to_parameters(theta, params)
        return LEARN[name](vae, x, q, z, t=t, **options).mean()

    exact = parameters_to_vector(grad(loss_at(theta), params))
    steps = step * torch.eye(len(theta), dtype=theta.dtype)
    measured = [(loss_at(theta + one).item() - loss_at(theta - one).item()) / (2 * step) for one in steps]
    error = (exact - torch.tensor(measured, dtype=torch.float64)).abs().max().item() / exact.abs().max().item()
    return judge("gradient", error < 1e-5, f"autograd agrees with finite differences within {error:.0e} of the largest component",
                 f"autograd differs from finite differences by {error:.1e} of the largest component; something that depends on "
                 "the decoder is detached, or is not differentiable")


def check_coupling(name, options, seed):
    """Whether a datum's loss depends on the other data of the minibatch."""
    vae, x, q, z, t = random_case(seed)
    others = (torch.arange(len(x)) > 0).double()[:, None]  # 0 for the first datum, 1 for the others
    x2 = (x + others).detach().requires_grad_()
    first = LEARN[name](vae, x, q, z, t=t, **options)[0]
    again = LEARN[name](vae, x2, vae.encode(x2), z + others, t=t + others, **options)[0]
    change = (again - first).abs().item() / max(first.abs().item(), 1e-12)
    return judge("coupling", change < 1e-10, "a datum's loss does not depend on the other data",
                 f"a datum's loss changes by {100 * change:.2g} % when the other data change: there is a mean over the minibatch "
                 "where the formula has one over posterior samples")


TERMS = {  # key of metrics.objective_terms: the term in print, with a, b, c and lap as in objectives.py
    "reconstruction": "-log p(x|z)", "kl": "KL", "half_a2": "E 1/2 |a|^2", "half_abar2": "1/2 |E a|^2", "a_dot_b": "E a.b",
    "half_b2": "E 1/2 |b|^2", "half_c2": "E 1/2 |c|^2", "laplacian": "lap"}


def check_composition(name, options, seed):
    """The weights with which the loss combines the TERMS of this family of objectives, by least squares over data and models."""
    names = TERMS | ({"a_dot_t": "E a.t"} if LEARN[name].takes("t") else {})
    rows, losses = [], []
    for i in range(6):
        vae, x, q, z, t = random_case(seed + i, data=8)
        vae.log_gamma.data.fill_(0.3 * i - 1)
        losses.append(LEARN[name](vae, x, vae.encode(x), z, t=t, **options).detach())
        terms = objective_terms(vae, x, vae.encode(x), z) | {"a_dot_t": dot(likelihood_score(vae, x, q, z)[0].mean(0), t)}
        rows.append(torch.stack([terms[term].detach() for term in names], -1))
    rows, losses = torch.cat(rows), torch.cat(losses)
    scale = rows.abs().amax(0)
    weights = torch.linalg.lstsq(rows / scale, losses[:, None], driver="gelsd").solution[:, 0]
    residual = (rows / scale @ weights - losses).abs().max().item() / losses.abs().max().item()
    weights = (weights / scale).numpy()
    arrays = {"term": list(names.values()), "weight": weights, "composition_residual": residual}
    if residual > 1e-6:
        text = (f"no combination of {', '.join(names.values())} (residual {residual:.1e}); "
                "an estimator other than the plug-in one adds terms of its own")
        return [Finding("composition", "note", text)], arrays
    text = " ".join(f"{weight:+.3g} {term}" for weight, term in zip(weights, names.values()) if abs(weight) > 1e-6)
    text = text.removeprefix("+") + (" (with N = 3)" if options.get("estimator") == "unbiased" else "")
    return [Finding("composition", "ok", text)], arrays


def check_target(name, options, seed):
    """Which function of p(x) the expected loss is where q is the exact posterior, over several one-dimensional linear VAEs.

    The candidates are the negative log-likelihood and the score-matching loss, that one also shifted by a multiple of half the
    posterior variance of a. There are so many posterior samples that an estimator's bias does not matter.
    """
    samples, v, values, noisy = 256, 4.0, [], LEARN[name].takes("t")
    kinds = 1 + samples + noisy
    x, noise, e = linear.matched_noise(4 * kinds, kinds, seed).split([1, samples, int(noisy)], 1)
    x, t = linear.noisy_data(x, e, v) if noisy else (math.sqrt(v) * x, None)
    for w, gamma in ((0.5, 0.6), (1.0, 1.0), (1.5, 0.8), (2.0, 1.5)):
        vae = linear.linear_vae(torch.full((1, 1), w, dtype=torch.float64), gamma)
        linear.set_posterior(vae)
        data = x.clone().requires_grad_()
        q = vae.encode(data)
        z = vae.sample(q, noise.T[..., None]).detach()
        loss = LEARN[name](vae, data, q, z, t=t, **options).mean().item()
        total = gamma + w**2
        a, _ = likelihood_score(vae, data, q, z)
        variance = a.var(0, correction=0).sum(-1).mean().item()
        values.append((loss, (math.log(2 * math.pi * total) + v / total) / 2, v / (2 * total**2) - 1 / total, variance / 2))
    loss, nll, score_matching, half_variance = np.array(values).T
    share = half_variance @ (loss - score_matching) / (half_variance @ half_variance)
    sign = "plus" if share > 0 else "less"
    shifted = f" {sign} {abs(share):.2g} times half the posterior variance of a" if abs(share) > 0.02 else ""
    candidates = {"the negative log-likelihood": nll,
                  f"the score-matching loss of p(x){shifted}": score_matching + share * half_variance}
    errors = {text: np.ptp(loss - values) / np.ptp(loss) for text, values in candidates.items()}
    best = min(errors, key=errors.get)
    arrays = {"target_loss": loss, "target_nll": nll, "target_score_matching": score_matching}
    if errors[best] < 0.02 and ("variance" not in best or abs(share) < 1.05):
        return [Finding("target", "note" if "variance" in best else "ok", f"with the exact posterior it is {best}")], arrays
    slope = np.polyfit(score_matching, loss, 1)[0]
    text = ("with the exact posterior it is neither the negative log-likelihood nor the score-matching loss of p(x), nor that "
            f"shifted by the posterior's variance; it changes {slope:.2f} times as much as the score-matching loss: "
            "a factor or a sign is off")
    return [Finding("target", "WRONG", text)], arrays


def check_contraction(name, options, seed):
    """kappa on a one-dimensional linear VAE for each N and alpha, and its parts: the objective's own and the estimator's.

    docs/theory.md defines kappa. alpha is the variance of q over that of the exact posterior.
    """
    fewest = 2 if options.get("estimator") == "unbiased" else 1
    measured = np.array([[linear.measured_kappa(name, samples, alpha, image=True, **options) if samples >= fewest else math.nan
                          for samples in SAMPLES] for alpha in ALPHAS])
    limit, slope, residual = linear.split_kappa(name, 1.0, image=True, **options)
    arrays = {"alpha": ALPHAS, "samples": SAMPLES, "kappa": measured, "kappa_limit": limit, "kappa_slope": slope}
    table = "; ".join(f"alpha {alpha:g}: " + ", ".join("-" if math.isnan(value) else f"{value:.3f}" for value in row)
                      for alpha, row in zip(ALPHAS, measured))
    findings = [Finding("kappa", "ok", f"for N = {', '.join(map(str, SAMPLES))}: {table}")]
    if not np.isfinite(limit) or limit <= 0 or not residual < 0.05:
        text = "the decoder's weight has no stable fixed point: it grows without bound or vanishes"
        return [*findings, Finding("bias", "WRONG", text)], arrays
    unbiased, flat = abs(limit - 1) < KAPPA_TOLERANCE, abs(slope) < KAPPA_TOLERANCE
    text = (f"the objective itself has kappa {limit:.3f} with the exact posterior: "
            f"the model gets {100 / limit:.0f} % of the data's variance")
    findings.append(Finding("bias", "ok" if unbiased else "note", text))
    text = "the estimator has no bias" if flat else f"the estimator adds {slope:+.3f} / N to kappa"
    findings.append(Finding("estimator", "ok" if flat else "note", text))
    return findings, arrays


CHECKS = (check_form, check_gradient, check_coupling, check_composition, check_target, check_contraction)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("objective", choices=LEARN, metavar="NAME", help=f"a name of objectives.LEARN: {', '.join(LEARN)}")
    flag = parser.add_argument
    flag("--estimator", choices=ESTIMATORS, default="plugin", help="how the objective estimates squared expectations under q")
    flag("--seed", type=count, default=0, help="of the random models")
    flag("--out", type=os.path.expanduser, help="the report's folder, whose audit is replaced (default: "
         "runs/audit/NAME-ESTIMATOR)")
    args = parser.parse_args(argv)
    if args.estimator not in (LEARN[args.objective].estimators if LEARN[args.objective].takes("estimator") else ("plugin",)):
        parser.error(f"{args.objective} has no estimator {args.estimator}")
    args.out = args.out or f"runs/audit/{args.objective}-{args.estimator}"
    return args


def main(args):
    device = pick_device("cpu")
    with Run(args.out, "audit", vars(args), device, overwrite=True) as run:  # it takes seconds
        options = {"estimator": args.estimator} if LEARN[args.objective].takes("estimator") else {}
        findings, arrays = [], {}
        if LEARN[args.objective].joint:
            print(f"{args.objective} trains encoder and decoder by one loss; the audit is of the decoder's part, q held fixed")
        for check in CHECKS:
            found, measured = check(args.objective, options, args.seed)
            for finding in found:
                print(f"{finding.verdict:5}  {finding.title}: {finding.text}", flush=True)
            findings, arrays = findings + found, arrays | measured
        page = f"# Audit of `{args.objective}`, estimator {args.estimator}\n\n"
        page += markdown_table(["check", "verdict", "finding"], findings) + "\n"
        run.write("audit.md", page.encode())
        run.save_metrics(**{name: np.asarray(value) for name, value in arrays.items()}, status="ok",
                         verdict=np.array([finding.verdict for finding in findings]),
                         finding=np.array([finding.text for finding in findings]))
    if wrong := [finding for finding in findings if finding.verdict == "WRONG"]:
        raise SystemExit(f"{args.objective}: {len(wrong)} of {len(findings)} findings are wrong; see {args.out}/audit.md")


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line(parse_args, main)
