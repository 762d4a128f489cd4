"""Laws of z that are fitted after training, because the decoder's best images come from where the encoder puts its latents.

    from vsm.loading import load_vae
    from vsm.samplers import load_sampler
    vae, sampler = load_vae("runs/images/RUN"), load_sampler("runs/images/RUN", "mixture")
    images = vae.decode(sampler.sample(64))

A law is fitted to one posterior sample of each of 20,000 training images with the run's noise, on the CPU, from the run's seed.
It is kept beside the run as plain arrays, in sampler-<name>.npz, and fitted again when the checkpoint changes.

    prior        p(z) itself: nothing is fitted
    gaussian     one Gaussian with full covariance
    mixture      K Gaussians with full covariances, by expectation maximisation (Ghosh et al. 2020)
    two-stage    a second VAE, of z (Dai and Wipf 2019): u ~ N(0, I), then z ~ p(z|u)
"""

import contextlib
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from data import load_images
from models import build_vae
from training import ImageTrainer, seed_of
from vsm.cache import load_or_make
from vsm.cli import UserError
from vsm.device import evaluating
from vsm.fid import posterior_samples
from vsm.loading import flags_of, load_vae, place_of_images
from vsm.runs import checkpoint_hash, load_arrays, load_config

IMAGES, COMPONENTS = 20_000, 10
WIDTH, UPDATES, BATCH, RATE = 256, 3000, 200, 1e-3  # of the second VAE
STREAM = 4  # of random numbers; training has 0 to 3


class Prior:
    """The prior of a VAE as a sampler."""

    def __init__(self, vae):
        self.vae = vae

    def sample(self, n, generator=None):
        return self.vae.sample(self.vae.prior, self.vae.noise(self.vae.prior, n, generator), relaxed=False)


class Gaussians:
    """A mixture of K Gaussians with weights [K], means [K, Dz] and covariances root root', roots [K, Dz, Dz]."""

    def __init__(self, weights, means, roots):
        self.weights, self.means, self.roots = weights, means, roots

    def sample(self, n, generator=None):
        which = self.weights.multinomial(n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, device=self.means.device)
        for k, (mean, root) in enumerate(zip(self.means, self.roots)):
            z[which == k] = mean + z[which == k] @ root.T
        return z

    @staticmethod
    def fit(z, seed, components, fits=1):
        """The arrays of a mixture of `components` Gaussians, that of the largest likelihood of z [n, Dz] among so many `fits`."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a likelihood that still grows a little is no fault of a sampler
            mixture = GaussianMixture(components, n_init=fits, random_state=seed % 2**32).fit(z.double().numpy())
        return {"weights": mixture.weights_, "means": mixture.means_,
                "roots": torch.linalg.cholesky(torch.from_numpy(mixture.covariances_))}


class SecondVAE:
    """A VAE of latents, from its tensors by name."""

    def __init__(self, **tensors):
        dim_z = len(tensors["decoder.0.4.bias"])
        self.vae = build_vae("mlp", (dim_z,), dim_z, WIDTH, init_sd=1.0).to(tensors["log_gamma"].device)
        self.vae.load_state_dict(tensors)

    def sample(self, n, generator=None):
        with evaluating(self.vae):
            g = self.vae.decode(Prior(self.vae).sample(n, generator))
            return g + (self.vae.log_gamma / 2).exp() * torch.randn(g.shape, generator=generator, device=g.device)

    @staticmethod
    def fit(z, seed, components):
        """The tensors of a VAE that the ELBO trains on z [n, Dz]. It has as many latents as the first one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = build_vae("mlp", z.shape[1:], z.shape[1], WIDTH, init_sd=1.0)
        batch = min(BATCH, len(z))
        trainer = LatentTrainer(vae, z, learn="elbo", infer="kld", estimator="plugin", samples=1, inner_steps=1, noise=0.0,
                                batch=batch, lr=RATE, lr_half_life=UPDATES / 4 / (len(z) // batch), seed=seed, one_pass=True)
        for _ in range(UPDATES):
            trainer.run_step()
        return vae.state_dict()


class LatentTrainer(ImageTrainer):
    """Trains a VAE on latents, float32 [n, Dz], in place of images."""

    def minibatch(self):
        z = self.images[self.order[self.cursor]]
        self.cursor += self.batch
        return z, None


class Scaled:
    """A law of (z - centre) / scale as a law of z: latents of any scale are fitted alike."""

    def __init__(self, law, centre, scale):
        self.law, self.centre, self.scale = law, centre, scale

    def sample(self, n, generator=None):
        """z [n, Dz]."""
        return self.centre + self.scale * self.law.sample(n, generator)


LAWS = {"gaussian": Gaussians, "mixture": Gaussians, "two-stage": SecondVAE}  # law.fit(z, seed, components): arguments of law
SAMPLERS = ("prior", *LAWS)


def load_sampler(folder, name="mixture", device="cpu", components=None, data_root=None, data=None, fits=None):
    """The sampler `name` of an image run: sampler.sample(n, generator=None) returns z [n, Dz] on `device` for vae.decode.

    It is read from sampler-<name>.npz in the folder. Where that is missing or of another checkpoint, it is fitted to the run's
    training images and written there; data_root is where these are now, or data="folder:PATH". components: the number of
    Gaussians of the mixture, by default that of the file, or 10. fits: its fits from random starts, of which the likeliest is
    kept, by default as many as the file had, or 1. Raises UserError for Bernoulli latents, which have a prior only.
    """
    folder, config = Path(folder), load_config(folder)
    flags = flags_of(config)
    if name not in SAMPLERS:
        raise UserError(f"there is no sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    if config["script"] != "train_images":
        raise UserError(f"{folder} is no run of train_images.py; samplers are fitted to the latents of images")
    if name == "prior":
        return Prior(load_vae(folder, device))
    if flags["latent"] != "gaussian":
        raise UserError(f"the sampler {name} is continuous, and the latents of {folder} are 0 or 1; they have the prior only")
    path = folder / f"sampler-{name}.npz"
    options = mixture_of(folder, components, fits) if name == "mixture" else {"components": 1}

    def fit():
        place = place_of_images(folder, config, SimpleNamespace(data=data, data_root=data_root))
        return fit_sampler(LAWS[name], load_vae(folder, device), load_images(*place, flags["limit"]).train, flags, **options)

    settings = {"sampler": name, "checkpoint": checkpoint_hash(folder), **options}
    tensors = {key: torch.as_tensor(value, device=device) for key, value in load_or_make(path, fit, settings).items()}
    centre, scale = tensors.pop("centre"), tensors.pop("scale")
    return Scaled(LAWS[name](**tensors), centre, scale)


def mixture_of(folder, components=None, fits=None):
    """{"components": K, "fits": R} of a run's mixture: what is asked for, by default that of its file, or 10 and 1.

    One fit is left out, as in older files.
    """
    if not all(value is None or isinstance(value, int) and value > 0 for value in (components, fits)):
        raise UserError(f"components and fits of a mixture are whole numbers of at least 1, not {components} and {fits}")
    found = {}
    with contextlib.suppress(UserError):  # a file that is missing or damaged is made again
        found = load_arrays(Path(folder) / "sampler-mixture.npz")["config"]
    fits = fits or found.get("fits", 1)
    return {"components": components or found.get("components", COMPONENTS)} | ({"fits": fits} if fits > 1 else {})


def fit_sampler(law, vae, images, flags, components, **options):
    """The arrays of a law, fitted to posterior samples of some of the training `images` of a run with these flags, float32.

    Raises UserError for fewer images than components, and where the latents or the law are not finite.
    """
    if len(images) < max(2, components):
        raise UserError(f"{len(images)} training images are too few to fit {components} components; give fewer --components")
    seed = seed_of(flags["seed"], STREAM)
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    z = posterior_samples(vae, images[some], flags["noise"], torch.Generator(vae.log_gamma.device).manual_seed(seed))[0].cpu()
    centre, scale = z.mean(0), z.std(0).clamp_min(torch.finfo(z.dtype).tiny)
    if not scale.isfinite().all():
        raise UserError("its latents are not finite, so no sampler can be fitted to them")
    arrays = law.fit((z - centre) / scale, seed, components, **options) | {"centre": centre, "scale": scale}
    arrays = {key: torch.as_tensor(value).float() for key, value in arrays.items()}
    if not all(value.isfinite().all() for value in arrays.values()):
        raise UserError("its sampler diverged while it was fitted")
    return arrays
