"""The quality of generated images: FID and KID against test images, whose features are computed once and kept."""

from functools import cache
from typing import NamedTuple

import torch
from torch.distributions import Bernoulli, Independent, Normal

import metrics
from data import load_images, noisy
from vsm.cache import cache_folder, digest, load_or_make
from vsm.device import evaluating
from vsm.features import Features, features_of

NEIGHBOURS = 1000  # images whose nearest training image is sought, in all training images
FIDS = ("fid", "fid_aggregate", "fid_reconstruction")


class Reference(NamedTuple):
    """Test images, uint8 [n, C, H, W] on the device, and their features [n, d] with mean and covariance.

    floor: FID and KID of as many training images against the test images. settings: the data and the network, for the table.
    """
    images: torch.Tensor
    network: Features
    features: torch.Tensor
    statistics: tuple
    floor: dict
    settings: dict


def reference_of(images, name, root):
    """The reference of the test images of the data set `name`, without a floor. Raises UserError without its network."""
    network = features_of(name, root, images.device)
    features = network(images)
    return Reference(images, network, features, metrics.feature_statistics(features), {}, network.description)


@cache
def reference_set(name, root, test_limit, inception_weights, device):
    """The reference of a data set's test images, with its floor, from the cache; it is computed and cached where it is not there.

    Raises UserError where the data are missing or the feature network cannot be had.
    """
    data = load_images(name, root, test_limit, test_limit)
    train, test = (part[:len(data.test)].to(device) for part in (data.train, data.test))
    network = features_of(name, root, device, inception_weights)

    def make():
        features = network(test)
        return {"features": features, **{f"{key}_floor": value for key, value in distances(network(train), features).items()}}

    arrays = load_or_make(cache_folder() / f"quality-{digest(train, test)}-{network.description['hash']}.npz", make)
    features = torch.from_numpy(arrays["features"])
    floor = {key: value for key, value in arrays.items() if key.endswith("_floor")}
    settings = {"data": name, "test_images": len(test), "digest": digest(test), "features": network.description}
    return Reference(test, network, features, metrics.feature_statistics(features), floor, settings)


def distances(features1, features2):
    """FID, KID and precision to coverage of features [n, d] against those of test images: a dict of 0-d tensors.

    FID is that of n samples and of infinitely many. KID is the mean and sd over subsets, and that over all pairs, not multiplied
    by 1000.
    """
    fid = metrics.frechet_distance(*metrics.feature_statistics(features1), *metrics.feature_statistics(features2))
    kid, sd = metrics.kernel_distance(features1, features2)
    return {"fid": fid, "fid_infinite": metrics.frechet_distance_at_infinity(features1, features2), "kid": kid,
            "kid_subset_sd": sd, "kid_full": metrics.latent_mmd(features1, features2, scaled=True),
            **metrics.precision_recall(features2, features1)}


def sampler_metrics(vae, samplers, reference, train, seed, draws=1, shown=64):
    """`distances` of n decoder means for each of the `samplers`, {name: sampler}; keys end with the name, but for the prior.

    They are means over `draws` times n images, and fid_draws has the FID of each draw, [draws]. With one draw the prior's are
    those of `fids`. A sampler's numbers do not depend on the others'.
    nearest: the median distance, in pixels, of 1000 of these to their nearest of the `train` images, divided by that of as many
    test images. samples: the first `shown` images of each sampler but the prior.
    """
    def draw(sampler, generator):
        with evaluating(vae):
            zs = sampler.sample(len(reference.images), generator).split(500)
            return torch.cat([metrics.quantise(vae.decode(z)) for z in zs])

    def to_nearest(images):
        return metrics.nearest_distances(images[:NEIGHBOURS], train).median()

    result, of_test = {}, to_nearest(reference.images)
    for name, sampler in samplers.items():
        generator = torch.Generator(reference.images.device).manual_seed(seed)
        images = draw(sampler, generator)
        measured = {"nearest": to_nearest(images) / of_test}
        if name != "prior":
            measured["samples"] = images[:shown]
        if name != "prior" or draws > 1:
            found = [distances(reference.network(images), reference.features)]
            found += [distances(reference.network(draw(sampler, generator)), reference.features) for _ in range(draws - 1)]
            measured |= {key: torch.stack([each[key] for each in found]).mean() for key in found[0]}
        if draws > 1:
            measured["fid_draws"] = torch.stack([each["fid"] for each in found])
        result |= {f"{key}{ending_of(name)}": value.cpu() for key, value in measured.items()}
    return result


def ending_of(sampler):
    """What the keys of a sampler end with: nothing for the prior, else as in fid_two_stage."""
    return "" if sampler == "prior" else f"_{sampler.replace('-', '_')}"


def mmd_nulls(vae, n, generator):
    """The sd of the latent MMD of n latents of the prior against n others, for the paper's kernel and for the scaled one."""
    z1, z2 = (vae.sample(vae.prior, vae.noise(vae.prior, min(n, 2000), generator), relaxed=False) for _ in range(2))
    return {"latent_mmd_null_sd": metrics.mmd_null_sd(z1, z2, n).cpu(),
            "latent_mmd_scaled_null_sd": metrics.mmd_null_sd(z1, z2, n, scaled=True).cpu()}


def aggregate_posterior(vae, mean, second_moment):
    """The factorised law, Gaussian or Bernoulli, with the mean and second moment [Dz] of the aggregate posterior E q(z|x)."""
    if vae.latent == "bernoulli":
        return Independent(Bernoulli(probs=mean, validate_args=False), 1, validate_args=False)
    return Independent(Normal(mean, (second_moment - mean**2).clamp_min(0).sqrt(), validate_args=False), 1, validate_args=False)


def posterior_samples(vae, images, noise, generator, block=500):
    """One z ~ q(z|x) of each uint8 image [n, C, H, W] with noise of sd `noise`; mean and E z^2 of q(z|x): [n, Dz] each."""
    parts, device = [], vae.log_gamma.device
    with evaluating(vae):
        for part in images.split(block):
            q = vae.encode(noisy(part.to(device), noise, generator)[0])
            parts.append((vae.sample(q, vae.noise(q, 1, generator), relaxed=False)[0], q.mean, q.mean**2 + q.variance))
    return [torch.cat(part) for part in zip(*parts)]


def fids(vae, reference, noise, generator, kid=False, block=500):
    """FIDs of n = len(reference.images) decoder means against those clean test images, 0-d CPU tensors.

    Training and evaluate.py call this with equal generators, so that their FIDs are equal to the bit. With `kid`, the images of
    the prior have all `distances`.

    fid: z from the prior. fid_aggregate: z from `aggregate_posterior` over the test images with noise of sd `noise`.
    fid_reconstruction: one z from q(z|x) of each of these noisy images. A model that reconstructs well, but whose aggregate
    posterior is far from the prior, has a low fid_reconstruction and a fid far above fid_aggregate.
    """
    def features(z):
        return reference.network(torch.cat([metrics.quantise(vae.decode(part)) for part in z.split(block)]))

    def fid(features):
        return metrics.frechet_distance(*metrics.feature_statistics(features), *reference.statistics)

    def sample_latents(q, n):
        return vae.sample(q, vae.noise(q, n, generator), relaxed=False)

    n, (z, means, squares) = len(reference.images), posterior_samples(vae, reference.images, noise, generator, block)
    with evaluating(vae):
        aggregate = aggregate_posterior(vae, means.mean(0), squares.mean(0))
        generated = features(sample_latents(vae.prior, n))
        result = distances(generated, reference.features) if kid else {"fid": fid(generated)}
        return result | {"fid_aggregate": fid(features(sample_latents(aggregate, n))),
                         "fid_reconstruction": fid(features(z))}
