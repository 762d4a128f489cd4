"""The checks of audit.py. Each takes an objective's name, its options and a seed, and returns its findings and the arrays behind them."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metrics import objective_terms
from models import VAE, mlp
from objectives import LEARN, likelihood_score
from training import joint_loss, learn_loss
from vsm import linear
from vsm.spectrum import load_pixels, one_model
from vsm.tables import markdown_table, mean_and_error, mean_and_error_text

SAMPLES, ALPHAS = (1, 2, 5, 20), (0.5, 1.0, 2.0)
KAPPA_TOLERANCE = 0.02


class Finding(NamedTuple):
    """A sentence, and whether it is `ok`, a `note` (true of some right objectives) or `WRONG`."""
    title: str
    verdict: str
    text: str


def random_vae(seed, dim_x=3, dim_z=2, hidden=6):
    """A small nonlinear VAE with smooth networks, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(dim_x, hidden), nn.Tanh(), nn.Linear(hidden, 2 * dim_z))
        decoder = nn.Sequential(nn.Linear(dim_z, hidden), nn.Tanh(), nn.Linear(hidden, dim_x))
        return VAE(encoder, decoder, dim_z, init_sd=0.7).double()


def draw(vae, seed, data=5, samples=3, dim_x=3):
    """x [B, D], q and z [N, B, Dz], of a model; x requires a gradient and z is reparametrised."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(data, dim_x, generator=generator, dtype=torch.float64).requires_grad_()
    q = vae.encode(x)
    return x, q, vae.sample(q, vae.noise(q, samples, generator))


def form(name, options, seed):
    """One number per datum, finite."""
    vae = random_vae(seed)
    x, q, z = draw(vae, seed)
    loss = LEARN[name](vae, x, q, z.detach(), **options)
    right = loss.shape == (len(x),) and bool(loss.isfinite().all())
    text = "one finite number per datum, [B]" if right else f"shape {list(loss.shape)} for {len(x)} data, and {'' if loss.isfinite().all() else 'not '}finite"
    return [Finding("form", "ok" if right else "WRONG", text)], {}


def gradient(name, options, seed, step=1e-6):
    """autograd's gradient of theta against central differences of the loss, q and z held."""
    vae = random_vae(seed)
    x, q, z = draw(vae, seed)
    z = z.detach()
    params = [*vae.decoder.parameters(), vae.log_gamma]

    def loss():
        return LEARN[name](vae, x, q, z, **options).mean()

    exact = torch.cat([g.flatten() for g in grad(loss(), params)])
    measured = []
    for p in params:
        flat = p.data.view(-1)
        for i in range(len(flat)):
            kept = flat[i].item()
            sides = []
            for sign in (1, -1):
                flat[i] = kept + sign * step
                sides.append(loss().item())
            flat[i] = kept
            measured.append((sides[0] - sides[1]) / (2 * step))
    error = (exact - torch.tensor(measured, dtype=torch.float64)).abs().max().item() / exact.abs().max().item()
    if error < 1e-5:
        return [Finding("gradient", "ok", f"autograd agrees with finite differences within {error:.0e} of the largest component")], {}
    return [Finding("gradient", "WRONG", f"autograd differs from finite differences by {error:.1e} of the largest component; "
                                         "something that depends on the decoder is detached, or is not differentiable")], {}


def coupling(name, options, seed):
    """Whether a datum's loss depends on the other data of the minibatch."""
    vae = random_vae(seed)
    x, q, z = draw(vae, seed)
    x2 = torch.cat([x[:1], x[1:] + 1]).detach().requires_grad_()
    z2 = torch.cat([z[:, :1], z[:, 1:] + 1], 1).detach()
    first = LEARN[name](vae, x, q, z.detach(), **options)[0]
    again = LEARN[name](vae, x2, vae.encode(x2), z2, **options)[0]
    change = (again - first).abs().item() / max(first.abs().item(), 1e-12)
    if change < 1e-10:
        return [Finding("coupling", "ok", "a datum's loss does not depend on the other data")], {}
    return [Finding("coupling", "WRONG", f"a datum's loss changes by {100 * change:.2g} % when the other data change: there is a mean over the "
                                         "minibatch where the formula has one over posterior samples")], {}


TERMS = {"reconstruction": "-log p(x|z)", "kl": "KL", "half_a2": "E 1/2 |a|^2", "half_abar2": "1/2 |E a|^2", "a_dot_b": "E a.b",
         "half_b2": "E 1/2 |b|^2", "half_c2": "E 1/2 |c|^2", "laplacian": "lap"}


def composition(name, options, seed):
    """The loss as a combination of the terms that objectives of this family are made of, by least squares over data and models."""
    rows, losses = [], []
    for i in range(6):
        vae = random_vae(seed + i)
        vae.log_gamma.data.fill_(0.3 * i - 1)
        x, q, z = draw(vae, seed + i, data=8)
        x, q, z = x.detach().requires_grad_(), q, z.detach()
        losses.append(LEARN[name](vae, x, vae.encode(x), z, **options).detach())
        terms = objective_terms(vae, x, vae.encode(x), z)
        rows.append(torch.stack([terms[term].detach() for term in TERMS], -1))
    rows, losses = torch.cat(rows), torch.cat(losses)
    scale = rows.abs().amax(0)
    weights = torch.linalg.lstsq(rows / scale, losses[:, None], driver="gelsd").solution[:, 0]
    residual = (rows / scale @ weights - losses).abs().max().item() / losses.abs().max().item()
    weights = (weights / scale).numpy()
    arrays = {"term": list(TERMS.values()), "weight": weights, "composition_residual": residual}
    if residual > 1e-6:
        return [Finding("composition", "note", f"no combination of {', '.join(TERMS.values())} (residual {residual:.1e}); the plug-in and the "
                                               "other estimators differ in this")], arrays
    text = " ".join(f"{weight:+.3g} {term}" for weight, term in zip(weights, TERMS.values()) if abs(weight) > 1e-6)
    return [Finding("composition", "ok", text.removeprefix("+") + " (with N = 3)" * (options.get("estimator") == "unbiased"))], arrays


def target(name, options, seed):
    """What the expected loss is on linear VAEs with the exact posterior: the negative log-likelihood, or the score-matching loss of p(x).

    Many posterior samples, so that an estimator's bias does not matter; models of another noise and another weight.
    """
    samples, v, values = 256, 4.0, []
    x, noise = np.split(linear.matched_noise(4 * (1 + samples), 1 + samples, seed).numpy(), [1], axis=1)
    for w, gamma in ((0.5, 0.6), (1.0, 1.0), (1.5, 0.8), (2.0, 1.5)):
        vae = linear.linear_vae(torch.full((1, 1), w, dtype=torch.float64), gamma)
        linear.set_posterior(vae)
        data = torch.tensor(math.sqrt(v) * x).requires_grad_()
        q = vae.encode(data)
        z = vae.sample(q, torch.tensor(noise.T[..., None])).detach()
        loss = LEARN[name](vae, data, q, z, **options).mean().item()
        t = gamma + w**2
        a, _ = likelihood_score(vae, data, q, z)
        variance = a.var(0, correction=0).sum(-1).mean().item()
        values.append((loss, (math.log(2 * math.pi * t) + v / t) / 2, v / (2 * t**2) - 1 / t, variance / 2))
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
    return [Finding("target", "WRONG", "with the exact posterior it is neither the negative log-likelihood nor the score-matching loss of "
                                       "p(x), nor that shifted by the posterior's variance; it changes "
                                       f"{slope:.2f} times as much as the score-matching loss: a factor or a sign is off")], arrays


def contraction(name, options, seed):
    """kappa on a one-dimensional linear VAE by N and alpha, and what of it is the objective's own and what its estimator's."""
    measured = np.full((len(ALPHAS), len(SAMPLES)), np.nan)
    for i, alpha in enumerate(ALPHAS):
        for j, samples in enumerate(SAMPLES):
            if not (samples == 1 and options.get("estimator") == "unbiased"):
                measured[i, j] = linear.measured_kappa(name, samples, alpha, image=True, **options)
    limit, slope, residual = linear.split_kappa(name, 1.0, image=True, **options)
    arrays = {"alpha": ALPHAS, "samples": SAMPLES, "kappa": measured, "kappa_limit": limit, "kappa_slope": slope}
    table = "; ".join(f"alpha {alpha:g}: " + ", ".join(f"{value:.3f}" for value in row) for alpha, row in zip(ALPHAS, measured))
    findings = [Finding("kappa", "ok", f"for N = {', '.join(map(str, SAMPLES))}: {table}")]
    if not np.isfinite(limit) or limit <= 0 or not residual < 0.05:
        findings.append(Finding("bias", "WRONG", "the decoder's weight has no stable fixed point: it grows without bound or vanishes"))
        return findings, arrays
    unbiased = abs(limit - 1) < KAPPA_TOLERANCE
    findings.append(Finding("bias", "ok" if unbiased else "note",
                            f"the objective itself has kappa {limit:.3f} with the exact posterior: the model gets {100 / limit:.0f} % of the data's variance"))
    flat = abs(slope) < KAPPA_TOLERANCE
    findings.append(Finding("estimator", "ok" if flat else "note",
                            "the estimator has no bias" if flat else f"the estimator adds {slope:+.3f} / N to kappa"))
    return findings, arrays


class CountFlops(TorchDispatchMode):
    """Floating-point operations of the matrix products and convolutions that run inside, those of autograd.grad too."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(function):
    with CountFlops() as count:
        function()
    return count.flops


def cost(name, options, seed, samples=5, data=50):
    """One decoder update in forward passes: of B data through the encoder and of N B samples through the decoder.

    The operations of three models, whose encoder and decoder are of different sizes, give the two numbers by least squares.
    """
    passes, updates = [], []
    for encoder_width, decoder_width in ((64, 64), (128, 64), (64, 128)):
        vae = VAE(mlp([32, encoder_width, encoder_width, 16]), mlp([8, decoder_width, decoder_width, 32]), 8)
        x, noise = torch.randn(data, 32), torch.randn(samples, data, 8)
        joint = LEARN[name].joint
        vae.encoder.requires_grad_(joint)
        moving = [p for p in vae.parameters() if p.requires_grad]

        def update(vae=vae, x=x, noise=noise, joint=joint, moving=moving):
            loss = joint_loss(vae, x.clone(), name, lambda q: noise) if joint else \
                learn_loss(vae, x.clone(), name, lambda q: noise, options.get("estimator", "plugin"))
            grad(loss.mean(), moving)

        with torch.no_grad():
            passes.append([flops_of(lambda: vae.encode(x)), flops_of(lambda: vae.decode(noise))])  # noqa: B023
        updates.append(flops_of(update))
    encoder, decoder = np.linalg.lstsq(np.array(passes, float), np.array(updates, float), rcond=None)[0]
    arrays = {"cost_encoder_passes": encoder, "cost_decoder_passes": decoder}
    return [Finding("cost", "ok", f"a decoder update costs {encoder:.1f} forward passes of the minibatch through the encoder and {decoder:.1f} of its "
                                  f"N = {samples} posterior samples through the decoder (ELBO: 0.9 and 3.0)")], arrays


def spectrum(name, options, data, root, samples=5, shown=10):
    """The variances that a linear VAE learns from images, against PCA's, by gradient steps of the objective from the PCA solution."""
    args = SimpleNamespace(spectrum=data, data_root=root, limit=20_000, latents=16, gamma=0.25, lr=0.1, iterations=300, batch=200, seed=0)
    pixels = load_pixels(args)
    C = pixels.T.double() @ pixels.double() / len(pixels)
    values, vectors = torch.linalg.eigh(C)
    start = vectors[:, -args.latents:] * (values[-args.latents:] - args.gamma).clamp(min=0).sqrt()
    row = one_model(pixels, C, start, args, name, options.get("estimator", "plugin"), samples)
    values = values.flip(0)[:args.latents].numpy()
    arrays = {"spectrum_data": values, "spectrum_learnt": row["learnt"], "spectrum_second_moment": row["second_moment"]}
    if not np.isfinite(row["learnt"]).all():
        return [Finding("spectrum", "WRONG", f"the linear VAE of {data} diverges")], arrays
    share = (row["learnt"] / values)[:shown]
    near = abs(share.mean() - 1) < 0.1
    return [Finding("spectrum", "ok" if near else "note",
                    f"a linear VAE of {data} (N = {samples}) gives its {shown} largest directions {100 * share.mean():.0f} % of the data's variance "
                    f"({100 * share.min():.0f} to {100 * share.max():.0f} %); E z^2 of the aggregate posterior is {row['second_moment'][:shown].mean():.2f}")], arrays


def short_run(args):
    """NLL of a short 2-D run above the true law's, beside the ELBO's by the same budget and seeds."""
    import train_synthetic
    excess = {}
    for name in dict.fromkeys(("elbo", args.objective)):
        flags = ["--data", args.law, "--learn", name, "--samples", "5", "--batch", "100", "--lr", "1e-3", "--inner-steps", "2", "--seeds",
                 str(args.seeds), "--test-size", "500", "--importance-samples", "5000"]
        if name == args.objective and LEARN[name].has_estimator:
            flags += ["--estimator", args.estimator] if args.estimator != "released" else ["--estimator", "released", "--samples", "1"]
        trainer = train_synthetic.EnsembleTrainer(train_synthetic.parse_args(flags), torch.device("cpu"))
        for _ in range(args.updates):
            trainer.run_step()
        test = trainer.law.sample(500, train_synthetic.evaluation_generator("cpu"))
        excess[name] = train_synthetic.evaluate(trainer, test, 5000)["nll_excess"]  # nan for a member that diverged
    text = ", ".join(f"{LEARN[name].letter} {mean_and_error_text(*mean_and_error(values)[:2])}" for name, values in excess.items())
    verdict = "ok" if np.isfinite(excess[args.objective]).any() else "WRONG"
    return [Finding("2-D run", verdict, f"NLL above the truth after {args.updates} updates on {args.law}, n = {args.seeds}: {text} nats (not converged)")], \
        {f"excess_{name}": values for name, values in excess.items()}


def page(name, estimator, findings):
    """The report as Markdown."""
    return f"# Audit of `{name}`, estimator {estimator}\n\n" + markdown_table(
        ["check", "verdict", "finding"], [[finding.title, finding.verdict, finding.text] for finding in findings]) + "\n"
