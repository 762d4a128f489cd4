"""The scale of a trained model's latents: E z^2, and the value at which the theory says that training would end.

    python -m studies.latent_scale runs/images/RUN

docs/theory.md has the proposition (equation 6) under "The scale of the latents, for any decoder". Each image run is
measured at its last checkpoint; its folder gets latent_scale.npz.
"""

import math

import torch

from studies.gradient_snr import differentiable_decoder, measure_models, noisy_minibatch, parser_of_runs
from training import EVALUATION, seed_of
from vsm.cli import UserError, command_line

MINIBATCHES, SAMPLES = 40, 16  # minibatches of training images; posterior samples of each image


def measure_latent_scale(vae, images, flags):
    """Statistics of a model with Gaussian latents over minibatches of training images, scalars by name.

    second_moment: the mean over the latents of E z^2. predicted_moment: equation (6) at this model, which second_moment equals
    where encoder and decoder are stationary; NaN for pairs without a formula. Three are derivatives at t = 1 with respect to
    log t, with t z in place of z: reconstruction_slope of E ||x - g||^2 / (2 gamma), variance_slope of E tr Cov_q g / (2 gamma)
    and divergence_slope of E div_x E_q g. Each has its standard error over minibatches in a key that ends in _se.

    images: uint8 on the model's device. flags: those of the run. Batch norm is in training mode; the model is left as it was.
    """
    generator = torch.Generator(images.device).manual_seed(seed_of(flags["seed"], EVALUATION, 1))
    vae = differentiable_decoder(vae, "train")
    rows = torch.tensor([slopes(vae, images, flags, generator) for _ in range(MINIBATCHES)], dtype=torch.float64)
    names = ("second_moment", "reconstruction_slope", "variance_slope", "divergence_slope", "predicted_moment")
    predicted = predicted_moment(flags, vae.dim_z, rows[:, 2], rows[:, 3])
    columns = dict(zip(names, [*rows.T, predicted]))
    return {name: values.mean().item() for name, values in columns.items()} | \
        {f"{name}_se": values.std().item() / len(values) ** 0.5 for name, values in columns.items()}


def slopes(vae, images, flags, generator):
    """E z^2 (mean over latents) and the slopes of reconstruction, variance and divergence of one minibatch, four numbers."""
    x = noisy_minibatch(images, flags, generator)[0].requires_grad_()
    q = vae.encode(x)
    t = torch.ones((), device=x.device, requires_grad=True)
    g = vae.decode(t * vae.sample(q, vae.noise(q, SAMPLES, generator)))  # [SAMPLES, B, C, H, W]
    gamma = vae.log_gamma.detach().exp()
    reconstruction = (x.detach() - g).square().flatten(2).sum(-1).mean() / (2 * gamma)
    variance = g.flatten(2).var(0).sum(-1).mean() / (2 * gamma)
    probe = torch.randn(x.shape, generator=generator, device=x.device)  # Hutchinson: E probe' J probe = tr J
    jacobian = torch.autograd.grad((g.mean(0) * probe).sum(), x, create_graph=True)[0]
    divergence = (jacobian * probe).flatten(1).sum(-1).mean()
    slopes = [torch.autograd.grad(value, t, retain_graph=True)[0].item() for value in (reconstruction, variance, divergence)]
    return [(q.mean.square() + q.stddev.square()).mean().item(), *slopes]


def predicted_moment(flags, dim_z, variance_slope, divergence_slope):
    """Equation (6): the mean E z^2 where KLD inference and the decoder's objective are stationary; NaN for other pairs."""
    share = 1 - (0 if flags["estimator"] == "unbiased" else 1 / flags["samples"])
    excess = {"elbo": 0, "fd": 0, "swersky": share * variance_slope, "bao": divergence_slope - share * variance_slope}
    known = flags["infer"] == "kld" and flags["learn"] in excess
    return 1 + (excess[flags["learn"]] if known else math.nan) * torch.ones_like(variance_slope) / dim_z


parse_args = parser_of_runs(__doc__).parse_args


def main(args):
    def measure(run, vae, images, flags):
        if vae.latent != "gaussian":
            raise UserError("its latents are not Gaussian, so their scale is fixed")
        arrays = measure_latent_scale(vae, images, flags)
        moment, predicted, error = (arrays[key] for key in ("second_moment", "predicted_moment", "predicted_moment_se"))
        end = f"where training is stationary it equals {predicted:.3g} ± {error:.1g}" if math.isfinite(predicted) else \
            "no end point is known for this pair of objectives"
        print(f"{run}: the mean E z^2 is {moment:.3g}; {end}", flush=True)
        return arrays

    measure_models(args, "latent_scale", {"minibatches": MINIBATCHES, "samples": SAMPLES}, measure)


if __name__ == "__main__":
    command_line(parse_args, main)
