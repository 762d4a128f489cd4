"""Fused Adam pairs parameters and gradients by their place in memory: trainers must move as plain Adam, which pairs by index."""

import pytest
import torch

import train_synthetic
from models import build_vae
from training import ImageTrainer

LR, STEPS = 1e-3, 5


def assert_moves_as_plain_adam(trainer):
    params = trainer.phi.params + trainer.theta.params if isinstance(trainer, ImageTrainer) else trainer.theta
    copies = [p.detach().clone() for p in params]
    plain = torch.optim.Adam(copies, LR, fused=False, foreach=False)
    for _ in range(STEPS):
        trainer.run_step()
        for copy, p in zip(copies, params):
            copy.grad = p.grad.clone()
        plain.step()
    for copy, p in zip(copies, params):
        torch.testing.assert_close(p.detach(), copy, rtol=1e-5, atol=1e-3 * LR)


@pytest.mark.parametrize("net", ["conv", "resnet"])
def test_image_trainer_moves_as_plain_adam(net):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8)
    assert_moves_as_plain_adam(ImageTrainer(build_vae(net, (1, 32, 32), 4, width=4), images, learn="bao", infer="kld",
                                       estimator="plugin", samples=2, inner_steps=1, noise=0.1, batch=20, lr=LR, seed=0))


@pytest.mark.parametrize("bilevel", ["0", "1"])
def test_ensemble_moves_as_plain_adam(bilevel):
    args = train_synthetic.parse_args(["--seeds", "3", "--batch", "50", "--lr", str(LR), "--bilevel-steps", bilevel])
    assert_moves_as_plain_adam(train_synthetic.EnsembleTrainer(args, torch.device("cpu")))
