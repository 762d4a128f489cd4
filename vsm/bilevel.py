"""Bi-level training: encoder updates through which the decoder's gradient flows (Section B.1 of the paper)."""

from torch.autograd import grad
from torch.func import functional_call

from objectives import INFER, LEARN


def kept_step(vae, phi, x, infer, noise, lr, **options):
    """phi after an SGD step whose graph is kept: a function of theta and of phi before the step, as dicts of tensors by name.

    The step takes its gradient with respect to `here`, a view of phi. An objective that takes z (`--infer fd`) or z and its
    weight (`fd-weighted`) as constants gets them from phi itself, so the outer gradient still flows through them.
    """
    x, here = x.detach().requires_grad_(), {name: p.view_as(p) for name, p in phi.items()}
    q = vae.posterior(functional_call(vae.encoder, here, x))
    held = q if INFER[infer].reparametrised else vae.posterior(functional_call(vae.encoder, phi, x))
    loss = INFER[infer](vae, x, q, vae.sample(held, noise), weight=held.base_dist.scale, **options).mean(-1).sum()
    gradient = grad(loss, list(here.values()), create_graph=True)
    return {name: p - lr * g for (name, p), g in zip(phi.items(), gradient)}


def bilevel_loss(vae, phi, x, learn, noise, **options):
    """theta_loss [S, B] where phi is a function of theta; z is reparametrised, so that the gradient is exact."""
    x = x.detach().requires_grad_()  # a new leaf, because phi depends on x too, but b_n is the derivative at fixed phi
    q = vae.posterior(functional_call(vae.encoder, phi, x))
    return LEARN[learn](vae, x, q, vae.sample(q, noise), **options)
