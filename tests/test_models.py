"""The networks and draws of models.py against what their docstrings say."""

import math

import pytest
import torch
from torch import nn

from models import NORMS, StackedMLP, UpBlock, build_ensemble, build_vae


def test_stacked_mlps_are_plain_ones():
    stacked = StackedMLP([3, 40, 50, 2], [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    v = torch.randn(4, 2, 5, 3)
    for bias in stacked.biases:
        bias.data.normal_()
    for i in range(2):
        h = v[:, i]
        for layer, (weight, bias) in enumerate(zip(stacked.weights, stacked.biases)):
            h = (h.clamp(min=0) if layer else h) @ weight[i] + bias[i, :, 0]
        torch.testing.assert_close(stacked(v)[:, i], h)
    assert stacked.weights[1].std().item() == pytest.approx(0.1, rel=0.05)


def test_models_start_as_documented():
    assert build_vae("mlp", (3,), 2, width=4, init_sd=0.5).log_gamma.exp().item() == pytest.approx(0.25)
    ensemble = build_ensemble(2, 2, 4, [0, 1, 2], init_sd=0.3)
    assert ensemble.log_gamma.exp().tolist() == pytest.approx([0.09] * 3)
    zero = torch.zeros(3, 1, 4)
    assert ensemble.posterior(zero).stddev.unique().item() == pytest.approx(math.log(2))
    assert build_vae("mlp", (3,), 2, width=4).posterior(zero).stddev.unique().item() == 1


@pytest.mark.parametrize("net, side", [("mlp", 32), ("conv", 32), ("conv", 64), ("resnet", 32), ("resnet", 64)])
@pytest.mark.parametrize("latent", ["gaussian", "bernoulli"])
def test_shapes_and_range_of_every_network(net, side, latent):
    vae = build_vae(net, (3, side, side), 5, width=2, latent=latent)
    q = vae.encode(torch.rand(2, 3, side, side))
    assert q.batch_shape == (2,) and q.event_shape == (5,)
    images = vae.decode(100 * torch.randn(4, 2, 5))
    assert images.shape == (4, 2, 3, side, side) and images.min() >= 0 and images.max() <= 1


def norms(network):
    return [type(module).__name__ for module in network.modules() if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm))]


def test_where_the_norms_stand():
    for norm, name in (("batch", "BatchNorm2d"), ("group", "GroupNorm")):
        for net, counts in (("conv", (2, 3)), ("resnet", (20, 19))):
            vae = build_vae(net, (1, 32, 32), 2, width=2, norm=norm)
            assert (norms(vae.encoder), norms(vae.decoder)) == tuple([name] * count for count in counts)
    assert [NORMS["group"](channels).num_groups for channels in (2, 48, 64)] == [2, 16, 32]


def test_the_resnet_halves_the_side_at_the_stem_and_at_three_of_its_stages():
    encoder = build_vae("resnet", (1, 32, 32), 2, width=2).encoder
    assert encoder[:-3](torch.rand(2, 1, 32, 32)).shape == (2, 16, 2, 2)
    for up, side in ((False, 4), (True, 8)):
        h = UpBlock(4, 4, NORMS["batch"], up)(torch.randn(3, 4, 4, 4))
        assert h.shape == (3, 4, side, side) and h.min() == 0


def test_bf16_is_of_the_networks_alone():
    vae = build_vae("mlp", (3,), 2, width=4, bf16=True)
    x = torch.randn(5, 3)
    assert vae.encode(x).mean.dtype == vae.decode(torch.randn(1, 5, 2)).dtype == torch.float32
    assert not torch.equal(vae.encode(x).mean, vae.encoder(x)[:, :2])


def test_logistic_noise_is_the_logit_of_a_uniform_number(monkeypatch):
    vae = build_vae("mlp", (3,), 2, width=4, latent="bernoulli", temperature=0.3)
    q = vae.posterior(torch.full((1, 2), 0.2))
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 0.01))
    noise = vae.noise(q, 1)
    assert noise.unique().item() == pytest.approx(math.log(0.01 / 0.99), rel=1e-5)
    for given, hard in ((-0.25, 0), (-0.15, 1)):
        assert vae.sample(q, torch.full((1, 1, 2), given), relaxed=False).unique().item() == hard
        soft = 1 / (1 + math.exp(-(0.2 + given) / 0.3))
        assert vae.sample(q, torch.full((1, 1, 2), given)).unique().item() == pytest.approx(soft, rel=1e-5)
