"""The evaluation of an ensemble of VAEs on 2-D data: while it trains, and at its end by importance sampling."""

import numpy as np
import torch

from metrics import importance, negative_elbo, posterior_fd
from objectives import dot
from training import EVALUATION, seed_of
from vsm.device import evaluating


def evaluation_generator(device):
    """A generator with the same seed in every run, so that all runs and members share test data, posterior and prior samples."""
    return torch.Generator(device).manual_seed(seed_of(0, EVALUATION))


def measure(trainer, test, importance_samples, log_density=None, samples=5):
    """The test metrics of one evaluation during training: means over the test data per member [S], and posterior_sd [S, Dz].

    nll_curve is the negative log likelihood of the first 500 test points, by `importance_samples` draws from the prior.
    excess_curve, where the law's log density [B] at the test points is given, is nll_curve less the law's own. They show whether
    training has converged.
    """
    vae, x = trainer.vae, test.expand(len(trainer.vae.log_gamma), -1, -1)
    generator = evaluation_generator(test.device)
    with evaluating(vae):
        row = {"posterior_sd": vae.encode(x).stddev.mean(1), "log_gamma": vae.log_gamma.detach().clone()}
    row |= {"negative_elbo": negative_elbo(vae, x, samples, generator).mean(1),
            "posterior_fd": posterior_fd(vae, x, samples, generator).mean(1)}
    row["nll_curve"] = -importance(vae, x[:, :500], max(importance_samples, 1), generator=generator).log_likelihood.mean(1)
    if log_density is not None:
        row["excess_curve"] = row["nll_curve"] + log_density[:500].mean()
    return {name: value.cpu() for name, value in row.items()}


def evaluate(trainer, test, samples):
    """The final evaluation of every member, by importance sampling: NumPy arrays, [S] unless stated, nan if a member diverged.

    Means over the test data, each with its standard error over the data in <name>_se:
    nll                   negative log likelihood by `samples` draws from the prior, nats
    nll_posterior         the same by samples / 100 draws from q(z|x) per datum, as a check
    sm_loss               score matching loss, the Fisher divergence less a constant
    fisher_divergence     only where the law's density is known, as the next two
    nll_excess, sm_excess nll and sm_loss less the law's own at the same points; their standard errors are of paired differences
    Others: ess [S, 3], the quantiles 0, 0.01 and 0.5 of the effective sample size over the data; model_samples [S, 1000, 2];
    variance_ratio and second_moment [S, Dz] of `moments`; diverged_at, the step or -1; member_status.
    """
    vae, law, S = trainer.vae, trainer.law, len(trainer.vae.log_gamma)
    x, generator = test.expand(S, -1, -1), evaluation_generator(test.device)
    prior = importance(vae, x, samples, generator=generator)
    posterior = importance(vae, x, -(-samples // 100), "posterior", generator, chunk=8)
    per_datum = {"nll": -prior.log_likelihood, "nll_posterior": -posterior.log_likelihood, "sm_loss": prior.score_matching_loss}
    if law.log_prob:
        points = test.double()
        gap = law.score(points) - prior.score
        per_datum |= {"fisher_divergence": 1 / 2 * dot(gap, gap), "nll_excess": per_datum["nll"] + law.log_prob(points),
                      "sm_excess": per_datum["sm_loss"] - law.score_matching_loss(points)}
    diverged_at = torch.where(trainer.diverged_at < trainer.clock, trainer.diverged_at, -1)
    result = {name: value.mean(1) for name, value in per_datum.items()}
    result |= {f"{name}_se": value.std(1) / value.shape[1] ** 0.5 for name, value in per_datum.items()}
    result["ess"] = prior.ess.quantile(torch.tensor([0, 0.01, 0.5], dtype=prior.ess.dtype, device=test.device), dim=1).T
    with evaluating(vae):
        z, noise = (torch.randn(1000, 2, generator=generator, device=test.device) for _ in range(2))
        result["model_samples"] = vae.decode(z.expand(S, -1, -1)) + (vae.log_gamma / 2).exp()[:, None, None] * noise
    result |= moments(vae, law, x)
    for value in result.values():  # the values of a diverged member depend on when the loop noticed the divergence
        value[diverged_at >= 0] = torch.nan
    result = {name: value.cpu().numpy() for name, value in result.items()} | {"diverged_at": diverged_at.cpu().numpy()}
    result["member_status"] = np.array(["ok" if step < 0 else f"diverged@{step}" for step in result["diverged_at"]])
    return result


def moments(vae, law, x, samples=20_000):
    """What the theory of linear VAEs predicts: 1 / kappa and, for active latents, kappa.

    variance_ratio [S] is the total variance of the model over that of the data; second_moment [S, Dz] is E z^2 of the aggregate
    posterior over the data x [S, B, 2].
    """
    generator = evaluation_generator("cpu")  # the same draws on every device
    data_variance = law.sample(100_000, generator).var(0).sum()
    with evaluating(vae):
        g = vae.decode(torch.randn(samples, vae.dim_z, generator=generator).to(x.device).expand(len(x), -1, -1))
        q = vae.encode(x)
        model_variance = g.var(1).sum(-1) + x.shape[-1] * vae.log_gamma.exp()
        return {"variance_ratio": model_variance / data_variance.to(x.device), "second_moment": (q.mean**2 + q.variance).mean(1)}
