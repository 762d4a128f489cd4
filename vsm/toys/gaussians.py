"""Gradients of the KL and Fisher divergences between two univariate Gaussians, in closed form and by autograd (A.5.1)."""

import torch
from torch.distributions import Normal, kl_divergence

from vsm.toys.gradients import normal_nodes


def closed_gradients(mean, sd, target_mean, target_sd):
    """Gradients by q's mean and sd of divergences of q = N(mean, sd^2) from p = N(target_mean, target_sd^2), by name.

    "kld" (29); "fd" (31), of FD = 1/2 E_q (d log q - d log p)^2; "biased", FD's with z held fixed (32). Arrays broadcast.
    """
    d_mean, d_sd = (mean - target_mean) / target_sd**2, sd / target_sd**2 - 1 / sd
    return {"kld": (d_mean, d_sd), "fd": (d_mean / target_sd**2, d_sd * (1 / target_sd**2 + 1 / sd**2)),
            "biased": (d_mean / sd**2, d_sd * 2 / sd**2)}


def autograd_gradients(mean, sd, target_mean, target_sd):
    """The same gradients by autograd, with expectations under q by quadrature."""
    e, weight = map(torch.as_tensor, normal_nodes())

    def fisher(z):
        return (weight * ((mean[..., None] - z) / sd[..., None] ** 2 - (target_mean - z) / target_sd**2) ** 2).sum(-1) / 2

    mean, sd = (value.clone().requires_grad_() for value in torch.broadcast_tensors(mean, sd))
    z = mean[..., None] + sd[..., None] * e
    target_mean, target_sd = mean.new_tensor(target_mean), mean.new_tensor(target_sd)
    kl = kl_divergence(Normal(mean, sd), Normal(target_mean, target_sd))
    losses = {"kld": kl, "fd": fisher(z), "biased": fisher(z.detach())}
    return {name: torch.autograd.grad(loss.sum(), (mean, sd), retain_graph=True) for name, loss in losses.items()}


def compare_gradients(target_sd):
    """Closed forms and autograd for p = N(0, target_sd^2), on a grid of q's mean [M] and sd [S].

    Tensors by name: "mean", "sd", "gradient" [3 (kld, fd, biased), 2 (by mean, by sd), M, S], and "autograd_error", the largest
    difference of the two relative to 1 + |gradient|.
    """
    mean, sd = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None], 2 ** torch.linspace(-2, 2, 41, dtype=torch.float64)
    closed = stack_gradients(closed_gradients(mean, sd, 0.0, target_sd))
    automatic = stack_gradients(autograd_gradients(mean, sd, 0.0, target_sd))
    error = ((closed - automatic).abs() / (1 + closed.abs())).max()
    return {"mean": mean[:, 0], "sd": sd, "gradient": closed, "autograd_error": error}


def stack_gradients(gradients):
    """One tensor [divergences, 2 (by mean, by sd), ...] of a dict of gradients."""
    return torch.stack([torch.stack(torch.broadcast_tensors(*pair)) for pair in gradients.values()])
