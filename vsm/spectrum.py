"""Linear VAEs on real images: which variances does each learning objective give its model? (`python param_recovery.py --spectrum mnist`)

The data are the pixels less their mean, without those that never change; gamma is given and held.
Every model starts at the PCA solution, the maximum of the likelihood, so that a spectrum that departs from it is the objective's doing.
"""

import math

import numpy as np
import torch
from tqdm import tqdm

from data import load_images
from objectives import LEARN
from vsm.cli import UserError
from vsm.linear import expected_slope, kappa, linear_vae, set_posterior

SAMPLES = (1, 2, 5, 20)
OBJECTIVES = (("elbo", "plugin"), ("fd", "plugin"), ("swersky", "plugin"), ("swersky", "unbiased"), ("bao", "plugin"), ("bao", "unbiased"))
DECAY = 100  # steps after which the step has halved; it falls as 1 / (1 + step / DECAY)
EXPECTED_UPDATES = 1000


def spectrum(args, device):
    """The arrays of metrics.npz: M models of K = `--latents` latents, D pixels. Eigenvalues are sorted, the largest first.

    objective, estimator, samples, kappa [M]; gamma; eigenvalues [D] of the data; learnt [M, K], those of gamma I + W W' after
    training, and expected [M, K], after expected updates from a random start; second_moment [M, K], E z^2 of the aggregate posterior of
    the latent with the j-th largest weights.
    """
    pixels = load_pixels(args).to(device)
    gamma = args.gamma
    C = (pixels.T.double() @ pixels.double()) / len(pixels)
    models = [(objective, estimator, N) for objective, estimator in OBJECTIVES for N in SAMPLES if estimator != "unbiased" or N > 1]
    bar = tqdm(models, desc="models", disable=None)
    rows = [one_model(pixels, C, args, *model) for model in bar]
    objective, estimator, samples = (np.array(column) for column in zip(*models))
    return {"objective": objective, "estimator": estimator, "samples": samples, "gamma": gamma,
            "kappa": np.array([kappa(*model) for model in models]), "eigenvalues": descending(C),
            **{key: np.stack([row[key] for row in rows]) for key in rows[0]}}


def load_pixels(args):
    """The training images as float32 rows less their mean, without the pixels that never change."""
    pixels = load_images(args.spectrum, args.data_root, limit=args.limit).train.flatten(1)
    pixels = pixels[:, (pixels != pixels[0]).any(0)].float() / 255
    if args.latents > pixels.shape[1]:
        raise UserError(f"--latents {args.latents} are more than the {pixels.shape[1]} pixels of {args.spectrum} that change")
    return pixels - pixels.mean(0)


def descending(C):
    return torch.linalg.eigvalsh(C).flip(0).cpu().numpy()


def one_model(pixels, C, args, objective, estimator, N):
    gamma, K = args.gamma, args.latents
    W = train(pixels, C, args, objective, estimator, N)
    W = W[:, W.square().sum(0).argsort(descending=True)]
    vae = linear_vae(W, gamma)
    set_posterior(vae)
    phi, s2 = vae.encoder.phi.data, (2 * vae.encoder.log_std.data).exp()
    expected = torch.randn(len(C), K, generator=torch.Generator().manual_seed(args.seed), dtype=torch.float64).to(C) / math.sqrt(len(C))
    for _ in range(EXPECTED_UPDATES):
        expected = expected - 0.5 * expected_slope(expected, C, gamma, objective, estimator, N)
    learnt, expected = (gamma + torch.linalg.svdvals(weight).square().cpu().numpy() for weight in (W, expected))
    return {"learnt": learnt, "expected": expected, "second_moment": ((phi @ C * phi).sum(1) + s2).cpu().numpy()}


def train(pixels, C, args, objective, estimator, N):
    """W [D, K], float64: gradient steps of the objective on minibatches, q held at the exact posterior of the W before each step.

    Each image is in its minibatch twice, with posterior noise of either sign, so that the terms of the gradient that are linear in the
    noise cancel. The step is `--lr` times gamma^2 (gamma for the ELBO, in whose gradient gamma appears
    once) and falls as one over the number of
    steps. W is the average over the last half of the steps.
    """
    gamma, device = args.gamma, pixels.device
    values, vectors = torch.linalg.eigh(C)
    start = vectors[:, -args.latents:] * (values[-args.latents:] - gamma).clamp(min=0).sqrt()
    vae = linear_vae(start.float(), gamma, (1, 1, len(C)))  # as an image, for the released estimator's sake
    vae.encoder.requires_grad_(False)
    optimiser = torch.optim.SGD(vae.decoder.parameters(), lr=args.lr * (gamma if objective == "elbo" else gamma**2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step / DECAY))
    options = {"estimator": estimator} if objective in ("swersky", "bao") else {}
    generator = torch.Generator(device).manual_seed(args.seed)
    average, averaged = torch.zeros_like(vae.decoder.weight), args.iterations - args.iterations // 2
    for step in range(args.iterations):
        set_posterior(vae)
        x = pixels[torch.randint(len(pixels), (args.batch,), generator=generator, device=device)]
        x = torch.cat((x, x)).view(-1, 1, 1, len(C)).requires_grad_(objective == "bao")
        q = vae.encode(x)
        noise = torch.randn(N, args.batch, args.latents, generator=generator, device=device)
        z = vae.sample(q, torch.cat((noise, -noise), 1)).detach()
        optimiser.zero_grad()
        LEARN[objective](vae, x, q, z, **options).mean().backward(inputs=[vae.decoder.weight])
        optimiser.step()
        schedule.step()
        if step >= args.iterations // 2:
            average += vae.decoder.weight.detach() / averaged
    return average.double()
