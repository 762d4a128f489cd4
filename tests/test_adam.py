"""Fused Adam pairs parameters and gradients by their place in memory: the trainers must move as plain Adam, which pairs by index."""

import pytest
import torch

import train_synthetic
from models import build_vae
from training import Trainer

LR, STEPS = 1e-3, 5


def moved_alike(first, second):
    """The mean difference of two lists of parameters, in step sizes, is that of rounding; scrambled gradients give about 1."""
    difference = torch.cat([(p - q).detach().abs().flatten() for p, q in zip(first, second)])
    return difference.mean() < 0.02 * LR * STEPS


@pytest.mark.parametrize("net", ["conv", "resnet"])
def test_image_trainer_moves_as_plain_adam(net):
    pair = []
    for plain in (False, True):
        torch.manual_seed(0)
        images = torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8)
        trainer = Trainer(build_vae(net, (1, 32, 32), 4, width=4), images, learn="bao", infer="kld", estimator="plugin", samples=2,
                          inner_steps=1, noise=0.1, batch=20, lr=LR, seed=0)
        if plain:
            trainer.optimisers = [torch.optim.Adam(params, LR, fused=False, foreach=False) for params in (trainer.phi, trainer.theta)]
        for _ in range(STEPS):
            trainer.run_step()
        pair.append(trainer.phi + trainer.theta)
    assert moved_alike(*pair)


@pytest.mark.parametrize("bilevel", ["0", "1"])
def test_ensemble_moves_as_plain_adam(bilevel):
    pair = []
    for plain in (False, True):
        args = train_synthetic.parse_args(["--seeds", "3", "--batch", "50", "--lr", str(LR), "--bilevel-steps", bilevel])
        trainer = train_synthetic.EnsembleTrainer(args, torch.device("cpu"))
        if plain:
            trainer.adam = torch.optim.Adam(trainer.theta, LR, fused=False, foreach=False)
        for _ in range(STEPS):
            trainer.run_step()
        pair.append(trainer.theta)
    assert moved_alike(*pair)
