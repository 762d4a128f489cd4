"""Metrics of a trained VAE. Model metrics return one number per datum, float64, in eval mode; means are the caller's.

Metrics of samples (FID, KID, MMD) compare two arrays of features or latents [n, d] and return one number.
Units: nats for likelihoods and KL; the Fisher divergence carries the factor 1/2 and sums over dimensions; lower is better
for all but log-likelihoods. Random numbers come from the generator given, never from the global one.
"""

import math
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from objectives import INFER, LEARN, dot, latent_score_gap, likelihood_score, posterior_score


@contextmanager
def evaluating(vae):
    """Eval mode, no parameter gradients, deterministic float32 kernels without TF32; everything restored at the end."""
    training, flags = vae.training, [p.requires_grad for p in vae.parameters()]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    vae.eval().requires_grad_(False)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        vae.train(training)
        for p, flag in zip(vae.parameters(), flags):
            p.requires_grad_(flag)


def negative_elbo(vae, x, samples=5, generator=None):
    """-E_q log p(x|z) by `samples` draws + KL(q || p(z)) in closed form, with the full Gaussian constant: [B], nats per datum."""
    return _of_objective(LEARN["elbo"], vae, x, samples, generator)


def posterior_fd(vae, x, samples=5, generator=None):
    """E_q 1/2 ||grad_z log q(z|x) - grad_z log p(z|x)||^2, [B], summed over Dz; heavy-tailed: report the median too."""
    return _of_objective(INFER["fd"], vae, x, samples, generator)


def _of_objective(objective, vae, x, samples, generator):
    with evaluating(vae):
        q = vae.encode(x)
        z = vae.sample(q, vae.noise(q, samples, generator), relaxed=False)
        return objective(vae, x, q, z).double()


def reconstruction_mse(vae, x, target=None):
    """Mean over pixels of (target - g(E_q z))^2, [B]; the target is x itself unless another (clean) image is given."""
    with evaluating(vae):
        error = vae.decode(vae.encode(x).mean) - (x if target is None else target)
        return error.flatten(1).double().pow(2).mean(1)


def latent_mmd(z1, z2, scaled=False):
    """MMD^2 between two samples [n, d], [m, d] with the cubic kernel (u.v + 1)^3 of the paper, or (u.v/d + 1)^3 if `scaled`.

    The unbiased U-statistic, so it may be negative: its mean is zero for equal laws. A 0-d float64 tensor.
    """
    z1, z2 = z1.double(), z2.double()
    scale = 1 / z1.shape[1] if scaled else 1.0
    return _within(z1, scale) + _within(z2, scale) - 2 * _kernel_sum(z1, z2, scale) / (len(z1) * len(z2))


def _within(u, scale):
    diagonal = (dot(u, u) * scale + 1).pow(3).sum()
    return (_kernel_sum(u, u, scale) - diagonal) / (len(u) * (len(u) - 1))


def _kernel_sum(u, v, scale, block=2048):
    return sum((rows @ v.T * scale + 1).pow(3).sum() for rows in u.split(block))


def mmd_null_sd(z1, z2, n, scaled=False):
    """The sd of latent_mmd between two samples of size n of one law, from two independent draws z1, z2 [m, d] of that law.

    The U-statistic is degenerate there: its variance is (4 / (n (n - 1)) + 4 / n^2) E kc^2, kc the kernel centred in both arguments.
    """
    z1, z2 = z1.double(), z2.double()
    kernel = (z1 @ z2.T / (z1.shape[1] if scaled else 1) + 1).pow(3)
    centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    return ((4 / (n * (n - 1)) + 4 / n**2) * centred.pow(2).mean()).sqrt()


def feature_statistics(features):
    """Mean [d] and covariance [d, d] (divisor n - 1) of features [n, d], float64."""
    features = features.double()
    return features.mean(0), features.T.cov().reshape(2 * features.shape[1:])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2): FID, from means [d] and covariances [d, d]. A 0-d float64 tensor.

    Symmetric eigenvalue form: real by construction, also for n < d or one-point samples. nan for input that is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (mu1, sigma1, mu2, sigma2))
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    if not all(v.isfinite().all() for v in (mu1, sigma1, mu2, sigma2)):
        return nan
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt()  # sigma1 = root root'
    product = root.T @ sigma2 @ root  # of the same eigenvalues as S1^1/2 S2 S1^1/2
    if not product.isfinite().all():
        return nan
    cross = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    return (dot(mu1 - mu2, mu1 - mu2) + sigma1.trace() + sigma2.trace() - 2 * cross).clamp_min(0)


def kernel_distance(features1, features2, subsets=100, subset_size=1000, seed=2020):
    """KID: mean and sd over random subsets of the unbiased MMD^2 of features [n, d], [m, d] with kernel (u.v/d + 1)^3, 0-d tensors.

    Subsets of min(subset_size, n, m), drawn without replacement as torch-fidelity draws them: equal seeds, equal numbers. The sd
    is no standard error. latent_mmd(features1, features2, scaled=True) takes all features at once: the same mean, less variance.
    """
    size = min(subset_size, len(features1), len(features2))
    rng = np.random.RandomState(seed)
    values = torch.stack([latent_mmd(*(f[rng.choice(len(f), size, replace=False)] for f in (features1, features2)), scaled=True)
                          for _ in range(subsets)])
    return values.mean(), values.std(correction=0)


def sample_images(vae, n, generator, block=500):
    """Decoder means of n draws from the prior, without the likelihood's pixel noise: uint8 [n, C, H, W]."""
    with evaluating(vae):
        z = vae.sample(vae.prior, vae.noise(vae.prior, n, generator), relaxed=False)
        return torch.cat([quantise(vae.decode(part)) for part in z.split(block)])


def quantise(images):
    """Images in [0, 1] as uint8, rounded; what is not finite becomes black, or white for +inf."""
    return (images.nan_to_num().clamp(0, 1) * 255).round().byte()


def objective_terms(vae, x, q, z):
    """The terms that all objectives are sums of, each [B]: with them every loss can be put together after the fact.

    reconstruction -E log p(x|z), kl, half_a2 1/2 E||a||^2, half_abar2 1/2 ||E a||^2 (plug-in), a_dot_b E[a.b], half_b2 1/2 E||b||^2,
    half_c2 1/2 E||c||^2 (the posterior FD; Gaussian latents only), laplacian.
    """
    a, lap = likelihood_score(vae, x, q, z)
    b, abar, kl = posterior_score(vae, x, q, z), a.mean(0), vae.kl(q).sum(-1)
    terms = {"reconstruction": LEARN["elbo"](vae, x, q, z) - kl, "kl": kl, "half_a2": dot(a, a).mean(0) / 2,
             "half_abar2": dot(abar, abar) / 2, "a_dot_b": dot(a, b).mean(0), "half_b2": dot(b, b).mean(0) / 2,
             "laplacian": lap.expand_as(kl)}
    if vae.latent == "gaussian":
        c = latent_score_gap(vae, x, q, z)
        terms["half_c2"] = dot(c, c).mean(0) / 2
    return terms


def evaluate_images(vae, images, noise, samples=5, seed=0, block=100):
    """Every metric of a run's row on uint8 test images [n, C, H, W], with fresh noise of the same seed at every call.

    Returns CPU tensors. Scalars: negative_elbo, reconstruction_mse (noisy input, clean target), latent_mmd (the paper's kernel),
    latent_mmd_scaled, posterior_fd, posterior_fd_median, the means of `objective_terms`, log_gamma, active_units (latents whose
    posterior mean varies by more than 0.01 over the data: Burda et al. 2016). Per latent [Dz]: kl_per_dim, posterior_sd
    (mean over data; of Bernoulli latents posterior_mean). Of Bernoulli latents also posterior_mean_histogram [40]: the share of all
    (image, latent) pairs with a posterior mean in each 40th of [0, 1]; the mean over data of a latent in use may be 1/2 as well.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    rows, latents = [], []
    with evaluating(vae):
        for clean in images.split(block):
            clean = clean.float() / 255
            x = clean + noise * torch.randn(clean.shape, generator=generator, device=clean.device)
            q = vae.encode(x)
            z = vae.sample(q, vae.noise(q, samples, generator), relaxed=False)
            row = objective_terms(vae, x, q, z)
            row["reconstruction_mse"] = reconstruction_mse(vae, x, clean)
            rows.append(row)
            latents.append({"z": z[0], "mean": q.mean, "sd": q.variance.sqrt(), "kl": vae.kl(q)})
        rows, latents = _concatenate(rows), _concatenate(latents)
        prior = vae.sample(vae.prior, vae.noise(vae.prior, len(images), generator), relaxed=False)
    result = {name: value.mean() for name, value in rows.items()}
    result["negative_elbo"] = (rows["reconstruction"] + rows["kl"]).mean()
    if "half_c2" in rows:
        result |= {"posterior_fd": rows["half_c2"].mean(), "posterior_fd_median": rows["half_c2"].median()}
    result |= {"latent_mmd": latent_mmd(latents["z"], prior), "latent_mmd_scaled": latent_mmd(latents["z"], prior, scaled=True),
               "kl_per_dim": latents["kl"].mean(0), "active_units": (latents["mean"].var(0) > 0.01).sum(),
               "log_gamma": vae.log_gamma.detach().double()}
    if vae.latent == "gaussian":
        result["posterior_sd"] = latents["sd"].mean(0)
    else:
        result["posterior_mean"] = latents["mean"].mean(0)
        result["posterior_mean_histogram"] = torch.histc(latents["mean"], 40, 0, 1) / latents["mean"].numel()
    return {name: value.cpu() for name, value in result.items()}


def _concatenate(rows):
    return {name: torch.cat([row[name] for row in rows]).double() for name in rows[0]}


# ---------------------------------------------------------------------------------------------------- importance sampling


class Importance(NamedTuple):
    """p(x) and its derivatives per datum, float64: [B], or [S, B] of an ensemble.

    The standard error of log_likelihood is sqrt(1 / ess - 1 / samples) by the delta method; no guide where ess is a few.
    """
    log_likelihood: torch.Tensor  # log p(x), nats
    score: torch.Tensor  # grad_x log p(x) = E[a] under p(z|x) (Fisher's identity), [..., D]
    laplacian: torch.Tensor  # laplacian_x log p(x) = E[lap + ||a||^2] - ||E a||^2
    ess: torch.Tensor  # effective sample size, (sum w)^2 / sum w^2

    @property
    def score_matching_loss(self):
        return 1 / 2 * dot(self.score, self.score) + self.laplacian


def iw_log_likelihood(vae, x, samples, proposal="prior", generator=None, chunk=200):
    """log p(x) = log E_r[p(x|z) p(z) / r(z)], r the prior or q(z|x): [B] or [S, B], nats; on average a lower bound."""
    return importance(vae, x, samples, proposal, generator, chunk).log_likelihood


def score_matching_loss(vae, x, samples, proposal="prior", generator=None, chunk=200):
    """1/2 ||grad log p(x)||^2 + laplacian log p(x) (Hyvarinen 2005), [B] or [S, B]: the Fisher divergence but for a constant."""
    return importance(vae, x, samples, proposal, generator, chunk).score_matching_loss


def importance(vae, x, samples, proposal="prior", generator=None, chunk=200):
    """Importance sampling of p(x), x [B, ...] or [S, B, D], by z from the prior (the same for all data) or from q(z|x).

    Streamed, `chunk` samples at a time: memory O(B chunk) for the prior, O(B chunk D) for q, whatever `samples` is.
    Raises ValueError for another proposal.
    """
    if proposal not in ("prior", "posterior"):
        raise ValueError(f"the proposal is prior or posterior, not {proposal!r}")
    shared = proposal == "prior"
    with evaluating(vae):
        S, batch = vae.log_gamma.numel(), x.shape[:vae.log_gamma.dim() + 1]  # [B] or [S, B]
        q = vae.prior if shared else vae.encode(x)
        rows = x.double().reshape(S, *((1, batch[-1]) if shared else (batch[-1], 1)), -1)
        streams = [_Stream(x_i, gamma) for x_i, gamma in zip(rows, vae.log_gamma.double().exp().reshape(S))]
        for start in range(0, samples, chunk):
            n = min(chunk, samples - start)
            z = vae.sample(q, vae.noise(q, n, generator), relaxed=False)  # [n, Dz], or [n, *batch, Dz]
            if shared:
                g = vae.decode(z.expand(*vae.log_gamma.shape, *z.shape)).reshape(S, 1, n, -1)
                log_ratio = torch.zeros_like(g[..., 0])
            else:
                g = vae.decode(z).reshape(n, *rows.shape[:2], -1).movedim(0, 2)
                log_ratio = (vae.prior.log_prob(z) - q.log_prob(z)).reshape(n, *rows.shape[:2]).movedim(0, 2)
            for stream, g_i, log_ratio_i in zip(streams, g.double(), log_ratio.double()):
                stream.add(g_i, log_ratio_i)
        fields = zip(*(stream.result(samples) for stream in streams))
        return Importance(*(torch.stack(field).reshape(*batch, *field[0].shape[2:]) for field in fields))


class _Stream:
    """Moments of g under the weights w = p(x|z) p(z) / r(z) of one model, held relative to the largest weight so far.

    P sets of samples, Q data each: x [P, Q, D], g [P, n, D], log_ratio [P, n]. One matmul gives the squared distances of x and g
    less ||x||^2, another the sums of w g, w ||g||^2 and w; float64, because the first of these cancel by up to 1 / gamma.
    """

    def __init__(self, x, gamma):
        self.x, self.gamma = x, gamma
        self.peak = torch.full_like(x[..., 0], -torch.inf)
        self.sums, self.squares = x.new_zeros(*x.shape[:-1], x.shape[-1] + 2), torch.zeros_like(self.peak)

    def add(self, g, log_ratio):
        norms = dot(g, g)
        log_w = torch.baddbmm((log_ratio - norms / (2 * self.gamma))[:, None], self.x / self.gamma, g.mT)  # [P, Q, n]
        peak = torch.maximum(self.peak, log_w.amax(-1))
        w, decay = log_w.sub_(peak[..., None]).exp_(), (self.peak - peak).exp()
        columns = torch.cat([g, norms[..., None], torch.ones_like(norms)[..., None]], dim=-1)
        self.sums = torch.baddbmm(decay[..., None] * self.sums, w, columns)
        self.squares = decay**2 * self.squares + torch.linalg.vecdot(w, w)
        self.peak = peak

    def result(self, samples):
        D = self.x.shape[-1]
        total = self.sums[..., -1]
        g, norm = self.sums[..., :D] / total[..., None], self.sums[..., D] / total  # E g, E ||g||^2 under p(z|x)
        log_p = self.peak - dot(self.x, self.x) / (2 * self.gamma) + total.log() - math.log(samples)
        return (log_p - D / 2 * (2 * math.pi * self.gamma).log(), (g - self.x) / self.gamma,
                (norm - dot(g, g)) / self.gamma**2 - D / self.gamma, total**2 / self.squares)
