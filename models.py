"""VAEs with a Gaussian likelihood p(x|z) = N(g(z), gamma I), and the networks of the paper: mlp, conv (DCGAN), resnet (ResNet18).

Shapes: B data, Dz = dim z, N posterior samples; an ensemble of S small models puts S before B.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence


class VAE(nn.Module):
    """A generative model p(z) p(x|z) with parameters theta = (decoder, log_gamma), and q(z|x) with parameters phi = encoder.

    encoder(x) returns [..., 2 Dz]: the mean of q and its standard deviation before `std` ("exp" or "softplus") makes it positive;
    for latent="bernoulli" it returns logits [..., Dz]. decoder(z) returns the mean of x. init_sd is the initial standard
    deviation of p(x|z), temperature that of `sample`. bf16=True runs the two networks under bfloat16 autocast; all else stays
    float32.
    """

    def __init__(self, encoder, decoder, dim_z, latent="gaussian", std="exp", init_sd=0.1, temperature=0.5, bf16=False):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.log_gamma = nn.Parameter(torch.tensor(2 * math.log(init_sd)))
        self.dim_z, self.latent, self.temperature, self.bf16 = dim_z, latent, temperature, bf16
        self.positive = {"exp": torch.exp, "softplus": F.softplus}[std]
        self.register_buffer("_zeros", torch.zeros(dim_z), persistent=False)

    @property
    def prior(self):
        """p(z), event [Dz]: N(0, I), or Bernoulli(1/2) in each dimension."""
        base = Normal(self._zeros, self._zeros + 1, validate_args=False) if self.latent == "gaussian" else \
            Bernoulli(logits=self._zeros, validate_args=False)
        return Independent(base, 1, validate_args=False)

    def encode(self, x):
        """q(z|x), batch [..., B], event [Dz]."""
        return self.posterior(self._run(self.encoder, x))

    def posterior(self, h):
        """q(z|x) from the encoder's output h."""
        if self.latent == "bernoulli":
            return Independent(Bernoulli(logits=h, validate_args=False), 1, validate_args=False)
        mean, std = h.chunk(2, dim=-1)
        return Independent(Normal(mean, self.positive(std), validate_args=False), 1, validate_args=False)

    def decode(self, z):
        """g(z), the mean of p(x|z): [..., *shape of x] for z [..., Dz]."""
        return self._run(self.decoder, z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def noise(self, q, n, generator=None):
        """Standard noise [n, *batch, Dz] for `sample`: normal, or logistic for Bernoulli latents."""
        like = q.mean
        if self.latent == "gaussian":
            return torch.randn(n, *like.shape, generator=generator, dtype=like.dtype, device=like.device)
        u = torch.rand(n, *like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return torch.logit(u, eps=torch.finfo(like.dtype).eps)

    def sample(self, q, noise, relaxed=True):
        """z ~ q(z|x) as a function of `noise`, differentiable in q.

        Gaussian latents are reparametrised. Bernoulli latents follow the Gumbel-softmax (binary concrete) relaxation; with
        relaxed=False they are exact 0/1 draws without a gradient.
        """
        if self.latent == "gaussian":
            return q.base_dist.loc + q.base_dist.scale * noise
        logits = q.base_dist.logits + noise
        return torch.sigmoid(logits / self.temperature) if relaxed else (logits > 0).to(logits.dtype)

    def kl(self, q):
        """KL(q(z|x) || p(z)) per latent dimension in closed form, [..., B, Dz], nats."""
        if self.latent == "bernoulli":
            return math.log(2) - q.base_dist.entropy()  # kl_divergence uses masks, which a CUDA graph cannot capture
        return kl_divergence(q.base_dist, self.prior.base_dist)

    def _run(self, net, v):
        if not self.bf16:
            return net(v)
        with torch.autocast(v.device.type, torch.bfloat16):
            return net(v).float()


class EnsembleVAE(VAE):
    """S independent VAEs with stacked weights: x [S, B, D], z [N, S, B, Dz], log_gamma [S]."""

    def __init__(self, encoder, decoder, dim_z, members, **options):
        super().__init__(encoder, decoder, dim_z, **options)
        self.log_gamma = nn.Parameter(self.log_gamma.detach().expand(members).clone())

    def decode(self, z):
        return self._run(self.decoder, z)


class StackedMLP(nn.Module):
    """S MLPs with ReLU between layers and stacked weights [S, in, out]: [..., S, B, in] -> [..., S, B, out].

    Weights start from N(0, weight_sd^2) and biases from 0, as in the paper's 2-D experiments. Member i draws from generators[i].
    """

    def __init__(self, sizes, generators, weight_sd=0.1):
        super().__init__()
        shapes = list(pairwise(sizes))
        draws = [[weight_sd * torch.randn(shape, generator=g) for shape in shapes] for g in generators]
        self.weights = nn.ParameterList(torch.stack(layer) for layer in zip(*draws))
        self.biases = nn.ParameterList(torch.zeros(len(generators), n_out, 1) for _, n_out in shapes)

    def forward(self, v):
        *lead, S, B, _ = v.shape
        h = v.reshape(-1, S, B, v.shape[-1]).permute(1, 3, 0, 2).flatten(2)  # [S, in, N B]: fastest with the data last
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, weight.mT, h.relu_() if i else h)
        return h.unflatten(2, (-1, B)).permute(2, 0, 3, 1).reshape(*lead, S, B, h.shape[1])


NORMS = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels), "none": nn.Identity}


def mlp(sizes):
    """Linear layers with ReLU between them."""
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_encoder(image_shape, dim_out, width, norm):
    """DCGAN's discriminator with ReLU and a linear output: convolutions halve the side down to 4, a 4x4 convolution ends it."""
    channels, side = image_shape[0], image_shape[-1]
    layers, n_in, n_out = [], channels, width
    while side > 4:
        layers += [nn.Conv2d(n_in, n_out, 4, 2, 1), norm(n_out) if layers else nn.Identity(), nn.ReLU(inplace=True)]
        n_in, n_out, side = n_out, 2 * n_out, side // 2
    return nn.Sequential(*layers, nn.Conv2d(n_in, dim_out, 4), nn.Flatten())


def conv_decoder(image_shape, dim_z, width, norm):
    """DCGAN's generator with a sigmoid output."""
    channels, side = image_shape[0], image_shape[-1]
    n_in = width * side // 8
    layers = [nn.Unflatten(-1, (dim_z, 1, 1)), nn.ConvTranspose2d(dim_z, n_in, 4), norm(n_in), nn.ReLU(inplace=True)]
    while n_in > width:
        layers += [nn.ConvTranspose2d(n_in, n_in // 2, 4, 2, 1), norm(n_in // 2), nn.ReLU(inplace=True)]
        n_in //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(n_in, channels, 4, 2, 1), nn.Sigmoid())


def resnet_encoder(image_shape, dim_out, width, norm):
    """ResNet18 of torchvision's BasicBlocks, `width` base channels, a 3x3 stride-2 stem and no max pool."""
    from torchvision.models.resnet import BasicBlock  # here, because importing torchvision takes as long as importing torch

    layers = [nn.Conv2d(image_shape[0], width, 3, 2, 1, bias=False), norm(width), nn.ReLU(inplace=True)]
    n_in = width
    for stage in range(4):
        n_out, stride = width * 2**stage, 1 if stage == 0 else 2
        shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), norm(n_out)) if stride > 1 else None
        layers += [BasicBlock(n_in, n_out, stride, shortcut, norm_layer=norm), BasicBlock(n_out, n_out, norm_layer=norm)]
        n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, dim_out))


class UpBlock(nn.Module):
    """The mirror of BasicBlock: two 3x3 convolutions and a shortcut; `up` resizes both branches by two (nearest)."""

    def __init__(self, n_in, n_out, norm, up=False):
        super().__init__()
        resize = nn.Upsample(scale_factor=2) if up else nn.Identity()
        self.branch = nn.Sequential(nn.Conv2d(n_in, n_in, 3, 1, 1, bias=False), norm(n_in), nn.ReLU(inplace=True), resize,
                                    nn.Conv2d(n_in, n_out, 3, 1, 1, bias=False), norm(n_out))
        self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), norm(n_out), resize) if up else nn.Identity()

    def forward(self, h):
        return F.relu(self.branch(h) + self.shortcut(h))


def resnet_decoder(image_shape, dim_z, width, norm):
    """The mirror of resnet_encoder, with resize-convolutions in place of strides and a sigmoid output."""
    channels, side = image_shape[0], image_shape[-1] // 16
    n_in = 8 * width
    layers = [nn.Linear(dim_z, n_in * side**2), nn.Unflatten(-1, (n_in, side, side))]
    for stage in reversed(range(4)):
        n_out = width * 2 ** max(stage - 1, 0)
        layers += [UpBlock(n_in, n_in, norm), UpBlock(n_in, n_out, norm, up=stage > 0)]
        n_in = n_out
    return nn.Sequential(*layers, nn.Upsample(scale_factor=2), nn.Conv2d(width, channels, 3, 1, 1), nn.Sigmoid())


def mlp_pair(image_shape, dim_z, dim_out, width, norm):
    """Two MLPs with two hidden layers each. The decoder has a sigmoid output for images and a linear one for vectors."""
    dim_x = math.prod(image_shape)
    encoder = nn.Sequential(nn.Flatten(), mlp([dim_x, width, width, dim_out]))
    decoder = [mlp([dim_z, width, width, dim_x])]
    if len(image_shape) > 1:
        decoder += [nn.Sigmoid(), nn.Unflatten(-1, image_shape)]
    return encoder, nn.Sequential(*decoder)


def convolutional_pair(encoder, decoder, image_shape, dim_z, dim_out, width, norm):
    """One of the two pairs of functions above, for square images of 32 or 64 pixels."""
    if len(image_shape) != 3 or image_shape[1] != image_shape[2] or image_shape[1] not in (32, 64):
        raise ValueError(f"this network takes square images of 32 or 64 pixels, not {image_shape}")
    return encoder(image_shape, dim_out, width, norm), decoder(image_shape, dim_z, width, norm)


class Network(NamedTuple):
    """An entry of NETS, a choice of `--net`.

    build(image_shape, dim_z, dim_out, width, norm) returns an encoder from x [B, *image_shape] to [B, dim_out] and a decoder from
    z [n, dim_z] to [n, *image_shape]; norm(channels) makes a normalisation layer. It raises ValueError for images that the
    network does not take.
    """
    build: Callable
    width: int  # the default of --width: hidden units, or channels after the first convolution
    has_norm: bool = True  # whether the network has normalisation layers, so that --norm has an effect


NETS = {"mlp": Network(mlp_pair, 400, has_norm=False),
        "conv": Network(partial(convolutional_pair, conv_encoder, conv_decoder), 64),
        "resnet": Network(partial(convolutional_pair, resnet_encoder, resnet_decoder), 64)}


def build_vae(net, image_shape, dim_z, width=None, norm="batch", latent="gaussian", **options):
    """A VAE for images [C, H, W] in [0, 1] or, with net="mlp", also for vectors [D].

    net: a name of NETS; conv and resnet take square images of 32 or 64 pixels. norm: a name of NORMS.
    VAE gets `options`: std, init_sd, temperature, bf16. Raises ValueError for another net, norm or image size.
    """
    if net not in NETS or norm not in NORMS:
        raise ValueError(f"net must be one of {', '.join(NETS)} and norm one of {', '.join(NORMS)}, not {net!r} and {norm!r}")
    dim_out = dim_z if latent == "bernoulli" else 2 * dim_z
    encoder, decoder = NETS[net].build(tuple(image_shape), dim_z, dim_out, width or NETS[net].width, NORMS[norm])
    return VAE(encoder, decoder, dim_z, latent, **options)


def build_ensemble(dim_x, dim_z, hidden, seeds, std="softplus", init_sd=0.1):
    """S = len(seeds) MLP VAEs with two hidden layers for vectors [D]. Member i depends on seeds[i] alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    encoder = StackedMLP([dim_x, hidden, hidden, 2 * dim_z], generators)
    decoder = StackedMLP([dim_z, hidden, hidden, dim_x], generators)
    return EnsembleVAE(encoder, decoder, dim_z, len(seeds), std=std, init_sd=init_sd)
