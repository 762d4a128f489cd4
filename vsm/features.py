"""The networks behind FID and KID, which map uint8 images [n, C, H, W] to features [n, d].

For grey 32x32 images with labels the network is a LeNet-5. It is trained here once, from a fixed seed and on one thread, and kept
in the cache. Another network gives other numbers, so every table names this one's test accuracy and hash. For all other images it
is Inception, through torch-fidelity.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import cache_folder, digest, load_images
from vsm.cli import UserError
from vsm.device import evaluating
from vsm.runs import load_arrays, save_arrays


class Features(NamedTuple):
    """A network from uint8 images [B, C, H, W] to features [B, d]; its description has its name, hash and test accuracy."""
    network: Callable
    description: dict

    def __call__(self, images, block=500):
        """Features [n, d] of uint8 images [n, C, H, W], float32 on the CPU."""
        with evaluating(self.network):
            return torch.cat([self.network(part).cpu() for part in images.split(block)])


def features_of(name, root, device, inception_weights=None):
    """The features for the data set `name`. Raises UserError where Inception is needed and cannot be had."""
    one = load_images(name, root, limit=1, test_limit=1)
    digits = one.train_labels is not None and one.train.shape[1:] == (1, 32, 32)
    network, description = lenet5(name, root) if digits else inception(inception_weights)
    return Features(network.to(device), {**description, "hash": digest(*network.state_dict().values())})


def load_or_make(path, make):
    """The arrays at `path` as a dict, or those that make() returns, which are written there; stderr says if writing fails."""
    with contextlib.suppress(UserError):
        return load_arrays(path)
    arrays = {key: np.asarray(value) for key, value in make().items()}
    try:
        save_arrays(path, {}, **arrays)
    except UserError as error:
        print(f"the result is not cached and will be computed again next time: {error}", file=sys.stderr)
    return arrays


# -------------------------------------------------------------------------------------------------------------- LeNet-5


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling: 32x32 images, whose 2 pixels of padding it crops, to 84 features."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                  nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        self.head = nn.Linear(84, 10)

    def forward(self, images):
        return self.body(images[..., 2:-2, 2:-2].float() / 255)

    @torch.no_grad()
    def rescale(self, images):
        """Divide the features by their root mean square over `images`; the class scores do not change.

        Training leaves the scale of the features to chance, and KID's kernel (u.v/d + 1)^3 is made for features of order one.
        """
        scale = self(images).square().mean().sqrt()
        self.body[-2].weight /= scale
        self.body[-2].bias /= scale
        self.head.weight *= scale


def lenet5(name, root):
    """LeNet-5 for a labelled data set, from the cache or trained and cached, and its description."""
    data = load_images(name, root)
    low, high = torch.cat([data.train_labels, data.test_labels]).aminmax()
    if low < 0 or high > 9:
        raise UserError(f"the labels of {name} lie in {low}..{high}; the LeNet-5 behind its FID has ten classes, 0..9")

    def make():
        network = train_lenet5(data.train, data.train_labels, name)
        with torch.no_grad():
            right = network.head(network(data.test)).argmax(1) == data.test_labels
        return {"accuracy": right.double().mean(), **network.state_dict()}

    arrays = load_or_make(cache_folder() / f"lenet5-{name}-{digest(data.train, data.train_labels)}.npz", make)
    network = LeNet5()
    network.load_state_dict({key: torch.from_numpy(arrays[key]) for key in network.state_dict()})
    return network, {"name": f"LeNet-5 on {name}", "accuracy": float(arrays["accuracy"])}


def train_lenet5(images, labels, name, epochs=6, batch=100, lr=2e-3, seed=0):
    """Train a LeNet-5 on the CPU with one thread, so that its weights do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = LeNet5()
            optimiser = torch.optim.Adam(network.parameters(), lr)
            steps = epochs * (len(images) // batch)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
            with tqdm(total=steps, desc=f"LeNet-5 on {name}, once", unit="step", dynamic_ncols=True) as bar:
                for _ in range(epochs):
                    for rows in torch.randperm(len(images)).split(batch)[:steps // epochs]:
                        optimiser.zero_grad()
                        F.cross_entropy(network.head(network(images[rows])), labels[rows]).backward()
                        optimiser.step()
                        schedule.step()
                        bar.update()
            network.rescale(images[:10_000])
    finally:
        torch.set_num_threads(threads)
    return network


# ------------------------------------------------------------------------------------------------------------- Inception


class Inception(nn.Module):
    """torch-fidelity's port of TensorFlow's 2015 Inception: resizing as TensorFlow 1 did, grey as RGB, 2048 features."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.expand(-1, 3, -1, -1))[0]


def inception(weights=None):
    """Inception and its description, with weights from a file or, without one, fetched by torch-fidelity."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    try:
        if weights:
            torch.load(weights, weights_only=True)  # torch-fidelity itself would run a pickle's code
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights, verbose=False)
    except Exception as error:  # by what fails: URLError, RuntimeError, UnpicklingError, EOFError, KeyError, ...
        where = f"{weights} does not hold" if weights else "torch-fidelity could not fetch"
        raise UserError(f"FID and KID of colour images: {where} Inception's weights ({type(error).__name__}); "
                        f"get {URL_INCEPTION_V3} and name it with --inception-weights") from error
    return Inception(network), {"name": "Inception (torch-fidelity)", "accuracy": None}
