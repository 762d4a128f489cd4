"""The training step written down directly, by log densities and autograd: the benchmark's rival and the tests' oracle."""

import itertools

import torch
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

# the loss that each choice of --infer minimises
INFERENCE = {"kld": "elbo", "fd": "posterior_fd", "fd-weighted": "posterior_fd_weighted", "fd-repar": "posterior_fd"}
OBJECTIVES = ("elbo", "fd", "swersky", "bao", "dsm", "fae", "posterior_fd", "posterior_fd_weighted")


def reference_loss(vae, x, noise, objective, reparametrised, t=None):
    """The mean loss over x [B, C, H, W] by log densities and autograd alone; noise [N, B, Dz]. Every score keeps its graph.

    objective: a name of OBJECTIVES, as in objectives.py. t [B, C, H, W]: the score of the data's noise, for dsm.
    Raises ValueError for another name.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"the reference step knows {', '.join(OBJECTIVES)}, not {objective}")

    def encode(x):
        mean, log_std = vae.encoder(x).chunk(2, dim=-1)
        return Normal(mean, log_std.exp())

    x = x.detach().requires_grad_(objective == "bao")
    q, prior = encode(x), Normal(0.0, 1.0)
    z = q.loc + q.scale * noise
    z = z if reparametrised else z.detach().requires_grad_()
    xs = x.detach().expand(len(z), *x.shape).clone().requires_grad_()  # an x for each posterior sample, to differentiate a_n by
    log_likelihood = Normal(vae.decoder(z.flatten(0, 1)).view_as(xs), (vae.log_gamma / 2).exp()).log_prob(xs).flatten(2).sum(-1)
    if objective == "elbo":
        return (kl_divergence(q, prior).sum(-1) - log_likelihood.mean(0)).mean()

    def likelihood_scores():  # a_n
        return grad(log_likelihood.sum(), xs, create_graph=True)[0].flatten(2)

    def posterior_scores(x, q):  # b_n
        return torch.stack([grad(q.log_prob(z_n).sum(), x, create_graph=True)[0] for z_n in z]).flatten(2)

    def latent_gaps():  # c_n
        return grad((q.log_prob(z) - prior.log_prob(z)).sum() - log_likelihood.sum(), z, create_graph=True)[0]

    if objective == "posterior_fd":
        return half_square(latent_gaps())
    if objective == "posterior_fd_weighted":
        return half_square(q.scale.detach() * latent_gaps())
    a, lap = likelihood_scores(), -x[0].numel() / vae.log_gamma.exp()
    if objective == "fd":
        return half_square(a) + lap
    if objective == "swersky":
        return 2 * half_square(a) + lap - half_square(a.mean(0))
    if objective == "bao":
        return half_square(a.mean(0)) + (a * posterior_scores(x, q)).sum(-1).mean() + lap
    if objective == "dsm":
        return half_square(a.mean(0) - t.flatten(1)) - half_square(t.flatten(1))
    x = x.detach().requires_grad_()  # fae: b_n holds z fixed, so it differentiates by another x than the one that z came from
    return half_square(a) + half_square(posterior_scores(x, encode(x))) + half_square(latent_gaps()) + lap


def half_square(u):
    """1/2 |u|^2, summed over the last axis and averaged over the others."""
    return (u**2).sum(-1).mean() / 2


class ReferenceStep:
    """Algorithm 1 written down directly: a DataLoader, scores by autograd, gradients of all weights at every update, and Adam."""

    def __init__(self, vae, images, device, *, learn, infer, samples, inner_steps, noise, batch, lr):
        self.vae, self.device, self.learn, self.infer = vae, device, learn, infer
        self.samples, self.inner_steps, self.noise, self.step = samples, inner_steps, noise, 0
        self.phi = torch.optim.Adam(vae.encoder.parameters(), lr)
        self.theta = torch.optim.Adam([*vae.decoder.parameters(), vae.log_gamma], lr)
        loader = DataLoader(TensorDataset(images), batch, shuffle=True, drop_last=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))  # one pass over the images after another

    def run_step(self):
        self.step += 1
        x = next(self.batches)[0].to(self.device).float() / 255
        e = torch.randn_like(x)
        x, t = x + self.noise * e, -e / self.noise
        if self.learn == "fae":
            self.descend(x, t, "fae", True, self.phi, self.theta)
            return
        self.descend(x, t, INFERENCE[self.infer], self.infer in ("kld", "fd-repar"), self.phi)
        if self.step % self.inner_steps == 0:
            self.descend(x, t, self.learn, False, self.theta)

    def descend(self, x, t, objective, reparametrised, *optimisers):
        noise = torch.randn(self.samples, len(x), self.vae.dim_z, device=self.device)
        loss = reference_loss(self.vae, x, noise, objective, reparametrised, t)
        self.phi.zero_grad()
        self.theta.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
