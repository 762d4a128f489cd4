"""The scale of a model's latents against the closed form of linear VAEs."""

import math

import pytest
import torch

from studies.latent_scale import measure_latent_scale
from vsm.linear import linear_vae, set_posterior

SCALES = [("elbo", "plugin", 0), ("swersky", "plugin", 0.8), ("swersky", "unbiased", 1), ("bao", "plugin", 0.2),
          ("bao", "unbiased", 0)]


@pytest.mark.parametrize("learn, estimator, excess", SCALES)
def test_the_scale_of_a_linear_vae_is_that_of_the_contraction(learn, estimator, excess):
    W = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))[0] * torch.tensor([0.8, 0.4])
    vae = linear_vae(W, gamma := 0.05, (1, 4, 4))
    set_posterior(vae)
    active = (W.square().sum(0) / (W.square().sum(0) + gamma)).mean().item()  # trace(Cov_q g) / gamma and div_x E_q g, over Dz
    images = torch.randint(0, 256, (200, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    flags = {"learn": learn, "infer": "kld", "estimator": estimator, "samples": 5, "batch": 50, "noise": 0.1, "seed": 0}
    measured = measure_latent_scale(vae, images, flags)
    error = measured["predicted_moment_se"]
    assert abs(measured["predicted_moment"] - 1 - excess * active) <= 4 * error <= 0.1
    assert measured["divergence_slope"] == pytest.approx(2 * active, abs=4 * measured["divergence_slope_se"])
    assert math.isnan(measure_latent_scale(vae, images, flags | {"infer": "fd"})["predicted_moment"])
