"""Gradients of the KL and Fisher divergences between two univariate Gaussians, in closed form (A.5.1)."""

import torch


def closed_gradients(mean, sd, target_mean, target_sd):
    """Gradients by q's mean and sd of divergences of q = N(mean, sd^2) from p = N(target_mean, target_sd^2), by name.

    "kld" (29); "fd" (31), of FD = 1/2 E_q (d log q - d log p)^2; "biased", FD's with z held fixed (32). Arrays broadcast.
    """
    d_mean, d_sd = (mean - target_mean) / target_sd**2, sd / target_sd**2 - 1 / sd
    return {"kld": (d_mean, d_sd), "fd": (d_mean / target_sd**2, d_sd * (1 / target_sd**2 + 1 / sd**2)),
            "biased": (d_mean / sd**2, d_sd * 2 / sd**2)}


def gradients_on_a_grid(target_sd):
    """Closed forms for p = N(0, target_sd^2), on a grid of q's mean [M] and sd [S].

    Tensors by name: "mean", "sd", "gradient" [3 (kld, fd, biased), 2 (by mean, by sd), M, S].
    """
    mean, sd = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None], 2 ** torch.linspace(-2, 2, 41, dtype=torch.float64)
    pairs = [torch.stack(torch.broadcast_tensors(*pair)) for pair in closed_gradients(mean, sd, 0.0, target_sd).values()]
    return {"mean": mean[:, 0], "sd": sd, "gradient": torch.stack(pairs)}
