"""How good generated images are: FID of draws from the prior, from the aggregate posterior and from the posteriors of test images."""

from typing import NamedTuple

import torch
from torch.distributions import Bernoulli, Independent, Normal

from metrics import feature_statistics, frechet_distance, quantise
from vsm.device import evaluating
from vsm.features import Features, features_of

FIDS = ("fid", "fid_aggregate", "fid_reconstruction")


class Reference(NamedTuple):
    """Test images, uint8 [n, C, H, W] on the device, the feature network, and the mean [d] and covariance [d, d] of their features."""
    images: torch.Tensor
    network: Features
    statistics: tuple


def reference_of(images, name, root, inception_weights=None):
    """The reference of the test images of the data set `name`. Raises UserError where Inception is needed and cannot be had."""
    network = features_of(name, root, images.device, inception_weights)
    return Reference(images, network, feature_statistics(network(images)))


def aggregate_posterior(vae, mean, second_moment):
    """The factorised law with the first two moments [Dz] of the aggregate posterior E q(z|x): Gaussian, or Bernoulli for 0/1 latents."""
    if vae.latent == "bernoulli":
        return Independent(Bernoulli(probs=mean, validate_args=False), 1, validate_args=False)
    return Independent(Normal(mean, (second_moment - mean**2).clamp_min(0).sqrt(), validate_args=False), 1, validate_args=False)


def fids(vae, reference, noise, generator, block=500):
    """FIDs of n = len(reference.images) decoder means against those clean test images, 0-d CPU tensors.

    fid: z from the prior. fid_aggregate: z from N(mean, diagonal variance) of the aggregate posterior over the test images with noise of
    sd `noise`. fid_reconstruction: one z from q(z|x) of each of these noisy images. A model that reconstructs well but samples from the
    wrong prior has a low fid_reconstruction and a fid far above fid_aggregate.
    """
    def fid(z):
        images = torch.cat([quantise(vae.decode(part)) for part in z.split(block)])
        return frechet_distance(*feature_statistics(reference.network(images)), *reference.statistics)

    def draw(q, n):
        return vae.sample(q, vae.noise(q, n, generator), relaxed=False)

    n, zs, means, squares = len(reference.images), [], [], []
    with evaluating(vae):
        for clean in reference.images.split(block):
            clean = clean.float() / 255
            q = vae.encode(clean + noise * torch.randn(clean.shape, generator=generator, device=clean.device))
            zs.append(draw(q, 1)[0])
            means.append(q.mean)
            squares.append(q.mean**2 + q.variance)
        aggregate = aggregate_posterior(vae, torch.cat(means).mean(0), torch.cat(squares).mean(0))
        return dict(zip(FIDS, (fid(draw(vae.prior, n)), fid(draw(aggregate, n)), fid(torch.cat(zs)))))
