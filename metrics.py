"""Metrics of a trained VAE.

Metrics of a model are computed in eval mode and return one float64 number per datum; the caller averages. Metrics of samples
(FID, KID, MMD) compare two arrays of features or latents [n, d] and return one number. Likelihoods and KL are in nats. Fisher
divergences carry the factor 1/2 and sum over dimensions. Lower is better for all but log likelihoods. Random numbers come from
the `generator` argument; without one they come from PyTorch's global generator.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from data import noisy
from objectives import INFER, LEARN, dot, latent_score_gap, likelihood_score, posterior_score
from vsm.device import evaluating


def negative_elbo(vae, x, samples=5, generator=None):
    """-E_q log p(x|z) + KL(q(z|x) || p(z)), [B], nats: the first term by `samples` draws, the second in closed form."""
    return _of_objective(LEARN["elbo"], vae, x, samples, generator)


def posterior_fd(vae, x, samples=5, generator=None):
    """E_q 1/2 ||grad_z log q(z|x) - grad_z log p(z|x)||^2, [B]. It is heavy-tailed over data, so report the median too."""
    return _of_objective(INFER["fd"], vae, x, samples, generator)


def _of_objective(objective, vae, x, samples, generator):
    with evaluating(vae):
        q = vae.encode(x)
        z = vae.sample(q, vae.noise(q, samples, generator), relaxed=False)
        return objective(vae, x, q, z).double()


def reconstruction_mse(vae, x, target=None):
    """The mean over pixels of (target - g(E_q z))^2, [B]. The target is x by default; pass the clean image for a noisy x."""
    with evaluating(vae):
        error = vae.decode(vae.encode(x).mean) - (x if target is None else target)
        return error.flatten(1).double().pow(2).mean(1)


def latent_mmd(z1, z2, scaled=False):
    """MMD^2 between two samples [n, d], [m, d] with the paper's cubic kernel (u.v + 1)^3, or (u.v/d + 1)^3 if `scaled`.

    This is the unbiased U-statistic. For equal distributions its mean is zero, so it may be negative. A 0-d float64 tensor.
    """
    z1, z2 = z1.double(), z2.double()
    scale = 1 / z1.shape[1] if scaled else 1.0
    return _within(z1, scale) + _within(z2, scale) - 2 * _kernel_sum(z1, z2, scale) / (len(z1) * len(z2))


def _within(u, scale):
    diagonal = _kernel(dot(u, u) * scale).sum()
    return (_kernel_sum(u, u, scale) - diagonal) / (len(u) * (len(u) - 1))


def _kernel_sum(u, v, scale, block=2048):
    return sum(_kernel(rows @ v.T * scale).sum() for rows in u.split(block))


def _kernel(products):
    return (products + 1).pow(3)


def mmd_null_sd(z1, z2, n, scaled=False):
    """The sd of latent_mmd between two samples of size n from one distribution, given samples z1, z2 [m, d] of it.

    For equal distributions the U-statistic is degenerate: its variance is (4 / (n (n - 1)) + 4 / n^2) E kc^2, where kc is the
    kernel centred in both arguments.
    """
    z1, z2 = z1.double(), z2.double()
    kernel = _kernel(z1 @ z2.T / (z1.shape[1] if scaled else 1))
    centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    return ((4 / (n * (n - 1)) + 4 / n**2) * centred.pow(2).mean()).sqrt()


def feature_statistics(features):
    """Mean [d] and covariance [d, d] (divisor n - 1) of features [n, d], float64."""
    features = features.double()
    return features.mean(0), features.T.cov().reshape(2 * features.shape[1:])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The Frechet distance of FID, ||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), from means [d], covariances [d, d].

    A 0-d float64 tensor, nan for input that is not finite. The eigenvalues are those of a symmetric matrix, so the result is real
    also for fewer samples than dimensions.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (mu1, sigma1, mu2, sigma2))
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    if not all(v.isfinite().all() for v in (mu1, sigma1, mu2, sigma2)):
        return nan
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt()  # sigma1 = root root'
    product = root.T @ sigma2 @ root  # it has the eigenvalues of S1^1/2 S2 S1^1/2
    if not product.isfinite().all():
        return nan
    cross = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    return (dot(mu1 - mu2, mu1 - mu2) + sigma1.trace() + sigma2.trace() - 2 * cross).clamp_min(0)


def feature_distance(features1, features2):
    """The frechet_distance of the Gaussians of features [n, d], [m, d]. For n, m < d it needs only a matrix [n, m]."""
    if max(len(features1), len(features2)) >= features1.shape[1] or not all(f.isfinite().all() for f in (features1, features2)):
        return frechet_distance(*feature_statistics(features1), *feature_statistics(features2))
    mu1, mu2 = features1.double().mean(0), features2.double().mean(0)
    root1, root2 = ((f - mu) / (len(f) - 1)**0.5 for f, mu in ((features1, mu1), (features2, mu2)))  # S1 = root1' root1
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()
    return (dot(mu1 - mu2, mu1 - mu2) + root1.square().sum() + root2.square().sum() - 2 * cross).clamp_min(0)


def frechet_distance_at_infinity(features1, features2, seed=0):
    """The FID of infinitely many samples, extrapolated from features [n, d], [m, d] (Chong and Forsyth 2020): 0-d float64 tensor.

    The FID of s samples against s others exceeds it by about c/s, where s is well above d. The result is on the line through the
    FID of the first s = min(n, m) rows and that of s/2 rows, the mean over both halves of a random split. It may be below zero by
    chance. Equal seeds give equal numbers; nan for fewer than 4 rows.
    """
    size = min(len(features1), len(features2)) // 2 * 2
    if size < 4:
        return torch.tensor(torch.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [features[torch.randperm(size, generator=generator)] for features in (features1, features2)]
    halves = [feature_distance(*pair) for pair in zip(*(features.chunk(2) for features in shuffled))]
    return 2 * feature_distance(*shuffled) - sum(halves) / 2


def kernel_distance(features1, features2, subsets=100, subset_size=1000, seed=2020):
    """KID: mean and sd, over random subsets, of the unbiased MMD^2 of features [n, d], [m, d] with kernel (u.v/d + 1)^3.

    Each subset has min(subset_size, n, m) rows, drawn without replacement as torch-fidelity draws them, so that equal seeds give
    equal numbers. The sd is not a standard error. latent_mmd(features1, features2, scaled=True) uses all features at once; it has
    the same mean and less variance.
    """
    u, v = features1.double(), features2.double()
    size, rng = min(subset_size, len(u), len(v)), np.random.RandomState(seed)
    chosen = [[rng.choice(len(f), size, replace=False) for f in (u, v)] for _ in range(subsets)]
    if len(u) * len(v) > 10 * size**2:
        values = torch.stack([latent_mmd(u[i], v[j], scaled=True) for i, j in chosen])
    else:  # the subsets overlap, so one kernel matrix serves all
        in_u, in_v = u.new_zeros(subsets, len(u)), v.new_zeros(subsets, len(v))  # 1 where a subset has the row
        for s, rows in enumerate(chosen):
            in_u[s, rows[0]] = in_v[s, rows[1]] = 1
        uu, vv, uv = (_kernel(a @ b.T / a.shape[1]) for a, b in ((u, u), (v, v), (u, v)))
        within = sum(((rows @ k) * rows).sum(1) - rows @ k.diagonal() for k, rows in ((uu, in_u), (vv, in_v)))
        values = within / (size * (size - 1)) - 2 * ((in_u @ uv) * in_v).sum(1) / size**2
    return values.mean(), values.std(correction=0)


def nearest_distances(u, v, k=1, block=1000):
    """The Euclidean distance from each row of u [n, ...] to its k-th nearest row of v [m, ...]: [n], float64."""
    u = u.flatten(1).double()
    nearest = u.new_empty(len(u), 0)
    for rows in v.split(block):
        nearest = torch.cat([nearest, torch.cdist(u, rows.flatten(1).double())], 1)
        nearest = nearest.topk(min(k, nearest.shape[1]), largest=False).values
    return nearest[:, -1]


def precision_recall(real, fake, k=5, block=1000):
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of features [n, d], [m, d]: a dict.

    The ball of a row reaches to its k-th nearest other row of its own set. precision: the share of fake rows in a real ball.
    recall: the share of real rows in a fake ball. density: the mean over fake rows of the number of real balls that hold it,
    divided by k; its mean is 1 for equal laws, and it may exceed 1. coverage: the share of real balls that hold a fake row.
    Higher is better. Sets of k rows or fewer have a smaller k.
    """
    k = min(k, len(real) - 1, len(fake) - 1)
    real_radius, fake_radius = (nearest_distances(rows, rows, k + 1) for rows in (real, fake))
    held, recalled, covered = [], torch.zeros_like(real_radius, dtype=bool), torch.zeros_like(real_radius, dtype=bool)
    for rows, radius in zip(fake.split(block), fake_radius.split(block)):
        distance = torch.cdist(real.double(), rows.double())  # [n, block]
        held.append((distance < real_radius[:, None]).sum(0))
        covered |= (distance < real_radius[:, None]).any(1)
        recalled |= (distance < radius).any(1)
    held = torch.cat(held).double()
    return {"precision": (held > 0).double().mean(), "recall": recalled.double().mean(), "density": held.mean() / k,
            "coverage": covered.double().mean()}


def quantise(images):
    """Images in [0, 1] as uint8, rounded. nan and -inf become black, +inf becomes white."""
    return (images.nan_to_num().clamp(0, 1) * 255).round().byte()


def objective_terms(vae, x, q, z):
    """The terms, each [B], whose sums are the objectives of objectives.py, so that any loss can be computed from a finished run.

    reconstruction  -E_q log p(x|z), nats        half_abar2  1/2 ||E_q a||^2 (plug-in estimator)
    kl              KL(q || p(z)), nats          a_dot_b     E_q[a . b]
    half_a2         1/2 E_q ||a||^2              half_b2     1/2 E_q ||b||^2
    laplacian       -D / gamma                   half_c2     1/2 E_q ||c||^2, the posterior FD (Gaussian latents only)
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
    """Every metric that a run records of one evaluation, on uint8 test images [n, C, H, W] with noise from `seed`: CPU tensors.

    Scalars: negative_elbo; reconstruction_mse (noisy input, clean target); latent_mmd (the paper's kernel); latent_mmd_scaled;
    posterior_fd and posterior_fd_median; the means of `objective_terms`; log_gamma; active_units, the number of latents whose
    posterior mean has a variance above 0.01 over the data (Burda et al. 2016); active_second_moment, the mean of second_moment
    over the active units (nan without any).

    Per latent [Dz]: kl_per_dim; second_moment, E z^2 under the aggregate posterior, computed from q, which is 1 where that agrees
    with a Gaussian prior, and E z for Bernoulli latents; posterior_sd, or posterior_mean for Bernoulli latents, averaged over the
    data.

    Histograms: aggregate_histogram [80], the share of all (image, active unit) pairs with a posterior sample in each 80th of
    [-4, 4]; for Bernoulli latents also posterior_mean_histogram [40], the share of all (image, latent) pairs with a posterior
    mean in each 40th of [0, 1].
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    rows, latents = [], []
    with evaluating(vae):
        for part in images.split(block):
            x, clean, _ = noisy(part, noise, generator)
            q = vae.encode(x)
            z = vae.sample(q, vae.noise(q, samples, generator), relaxed=False)
            row = objective_terms(vae, x, q, z)
            row["reconstruction_mse"] = reconstruction_mse(vae, x, clean)
            rows.append(row)
            latents.append({"z": z[0], "mean": q.mean, "sd": q.variance.sqrt(), "kl": vae.kl(q)})
        rows, latents = _concatenate(rows), _concatenate(latents)
        prior = vae.sample(vae.prior, vae.noise(vae.prior, len(images), generator), relaxed=False)
    active, second_moment = latents["mean"].var(0) > 0.01, (latents["mean"] ** 2 + latents["sd"] ** 2).mean(0)
    result = {name: value.mean() for name, value in rows.items()}
    result["negative_elbo"] = (rows["reconstruction"] + rows["kl"]).mean()
    if "half_c2" in rows:
        result |= {"posterior_fd": rows["half_c2"].mean(), "posterior_fd_median": rows["half_c2"].median()}
    result |= {"latent_mmd": latent_mmd(latents["z"], prior), "latent_mmd_scaled": latent_mmd(latents["z"], prior, scaled=True),
               "kl_per_dim": latents["kl"].mean(0), "active_units": active.sum(), "second_moment": second_moment,
               "active_second_moment": second_moment[active].mean(),
               "aggregate_histogram": torch.histc(latents["z"][:, active], 80, -4, 4) / (len(images) * active.sum()),
               "log_gamma": vae.log_gamma.detach().double()}
    if vae.latent == "gaussian":
        result["posterior_sd"] = latents["sd"].mean(0)
    else:
        result["posterior_mean"] = latents["mean"].mean(0)
        result["posterior_mean_histogram"] = torch.histc(latents["mean"], 40, 0, 1) / latents["mean"].numel()
    return {name: value.cpu() for name, value in result.items()}


def _concatenate(rows):
    return {name: torch.cat([row[name] for row in rows]).double() for name in rows[0]}


class Importance(NamedTuple):
    """log p(x) and its derivatives per datum, float64: [B], or [S, B] for an ensemble.

    By the delta method the standard error of log_likelihood is sqrt(1 / ess - 1 / samples). It is unreliable where ess is
    only a few.
    """
    log_likelihood: torch.Tensor  # log p(x), nats
    score: torch.Tensor  # grad_x log p(x) = E[a] under p(z|x) (Fisher's identity), [..., D]
    laplacian: torch.Tensor  # laplacian_x log p(x) = E[lap + ||a||^2] - ||E a||^2
    ess: torch.Tensor  # effective sample size, (sum w)^2 / sum w^2

    @property
    def score_matching_loss(self):
        """1/2 ||grad log p(x)||^2 + laplacian log p(x) (Hyvarinen 2005).

        Its mean over the data is the Fisher divergence from the data to the model, less a constant of the data.
        """
        return 1 / 2 * dot(self.score, self.score) + self.laplacian


def iw_log_likelihood(vae, x, samples, proposal="prior", generator=None, chunk=200):
    """log p(x) = log E_r[p(x|z) p(z) / r(z)] with r the prior or q(z|x), [B] or [S, B], nats; on average a lower bound."""
    return importance(vae, x, samples, proposal, generator, chunk).log_likelihood


def importance(vae, x, samples, proposal="prior", generator=None, chunk=200):
    """Importance sampling of p(x), x [B, ...] or [S, B, D], by z from the prior (the same for all data) or from q(z|x).

    The samples come in chunks, so memory does not grow with `samples`: it is O(B chunk) for the prior, O(B chunk D) for q.
    Raises ValueError for another proposal.
    """
    if proposal not in ("prior", "posterior"):
        raise ValueError(f"the proposal is prior or posterior, not {proposal!r}")
    shared = proposal == "prior"
    with evaluating(vae):
        gammas, batch = vae.log_gamma.double().exp().flatten(), x.shape[:vae.log_gamma.dim() + 1]  # [S]; [B] or [S, B]
        S = len(gammas)  # 1 without an ensemble
        P = S if shared else batch.numel()  # sets of samples: each serves all data of one model, or one datum
        q = vae.prior if shared else vae.encode(x)
        data = x.double().reshape(P, batch.numel() // P, -1)  # [P, Q, D]
        moments = [_PosteriorMoments(*model) for model in zip(data.chunk(S), gammas)]
        for start in range(0, samples, chunk):
            n = min(chunk, samples - start)
            z = vae.sample(q, vae.noise(q, n, generator), relaxed=False)  # [n, Dz], or [n, *batch, Dz]
            if shared:
                g = vae.decode(z.expand(*vae.log_gamma.shape, *z.shape)).reshape(P, n, -1)
                log_ratio = g.new_zeros(P, n)
            else:
                g = vae.decode(z).reshape(n, P, -1).transpose(0, 1)
                log_ratio = (vae.prior.log_prob(z) - q.log_prob(z)).reshape(n, P).T
            for model, g_i, log_ratio_i in zip(moments, g.double().chunk(S), log_ratio.double().chunk(S)):
                model.add(g_i, log_ratio_i)
        fields = zip(*(model.result(samples) for model in moments))
        return Importance(*(torch.cat(field).reshape(*batch, *field[0].shape[2:]) for field in fields))


class _PosteriorMoments:
    """The moments of g(z) under p(z|x) of one model, from samples that come in parts.

    P sets of samples serve Q data each: x [P, Q, D], g [P, n, D], log_ratio = log p(z) / r(z) [P, n]. The importance weights
    w = p(x|z) p(z) / r(z) are held relative to the largest so far. One matmul gives the squared distances of x and g less
    ||x||^2, another the sums of w g, w ||g||^2 and w. All is float64, because the first adds terms of order 1 / gamma that
    nearly cancel.
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
