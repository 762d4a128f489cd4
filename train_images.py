"""Train one VAE on images with one pair of learning and inference objectives.

The paper's run (a GPU; Table 1, KLD-F on MNIST):
    python train_images.py --data mnist --net conv --learn fd --infer kld
A small run, seconds on a CPU; it draws the data set `glyphs` at its first call and downloads nothing:
    python train_images.py --data glyphs --limit 1000 --test-limit 200 --width 8 \\
        --samples 1 --inner-steps 1 --epochs 2 --eval-every 1

Flags with several values train every combination, on a CPU --jobs at once, on a GPU all in lockstep:
    python train_images.py --data mnist --learn elbo swersky bao --seed 0 1 2 --jobs 4

A run writes config.json, checkpoint.pt, metrics.npz and PNGs into a folder under runs/images. The same command resumes it.
"""

import vsm.quiet  # noqa: F401  # isort: skip
import argparse
import math

import torch

import plots
from data import data_name, data_names, load_images
from metrics import evaluate_images, quantise
from models import NETS, NORMS
from objectives import ESTIMATORS, INFER, LEARN, label
from training import EVALUATION, INIT, ImageTrainer, announce, decay, drain, resolve_pair, seed_of, stack, updates
from vsm.cli import (
    Formatter,
    UserError,
    command_line,
    count,
    nonnegative,
    positive,
    positive_float,
    progress,
    seed_number,
    stopping,
)
from vsm.device import evaluating, pick_device, set_precision
from vsm.fid import FIDS, fids, reference_of
from vsm.gamma import GAMMA_HELP, MODES
from vsm.loading import vae_of
from vsm.many_runs import combinations, in_lockstep, in_processes
from vsm.names import run_name, short_name
from vsm.runs import Run

AXES = ("data", "net", "infer", "learn", "seed")
DISTANCE = 5  # log gamma goes about 4 from an initial standard deviation of 1 to its end on MNIST


def image_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--data", type=data_name, default="mnist", metavar="NAME", help=data_names())
    flag("--data-root", default="data", help="folder of the data sets, also for downloads")
    flag("--limit", type=count, default=0, help="number of training images, the first ones; 0: all")
    flag("--test-limit", type=count, default=0, help="number of test images, the first ones; 0: all")
    flag("--learn", choices=LEARN, default="fd", help="objective of the decoder")
    flag("--infer", choices=INFER, default=None, help="objective of the encoder (default: kld; fae with --learn fae)")
    flag("--estimator", choices=ESTIMATORS, default="plugin", help="how swersky and bao estimate squared expectations under q")
    flag("--samples", type=positive, default=5, help="posterior samples per image, N")
    flag("--infer-samples", type=positive, default=None, metavar="M",
         help="posterior samples per image in the encoder's loss (default: N)")
    flag("--noise", type=nonnegative, default=0.1, help="sd of the Gaussian noise added to training and test images")
    flag("--seed", type=seed_number, default=0, help="seed of weights, data order and noise")
    flag = parser.add_argument_group("model").add_argument
    flag("--net", choices=NETS, default="conv", help="mlp, conv (DCGAN) or resnet (ResNet18)")
    flag("--width", type=positive, default=None,
         help="base channels of conv and resnet (default: 64), hidden units of mlp (default: 400)")
    flag("--norm", choices=NORMS, default="batch", help="normalisation in conv and resnet; batch couples the data of a minibatch")
    flag("--dim-z", type=positive, default=100, help="latent dimensions")
    flag("--latent", choices=("gaussian", "bernoulli"), default="gaussian",
         help="family of prior and posterior; bernoulli: latents are 0 or 1, with prior probability 1/2")
    flag("--temperature", type=positive_float, default=0.5,
         help="temperature of the Gumbel-softmax relaxation of Bernoulli latents")
    flag("--init-sd", type=positive_float, default=1.0, help="initial standard deviation of p(x|z)")
    flag("--gamma", choices=MODES, default="learned", help=GAMMA_HELP)
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--inner-steps", type=positive, default=5, help="encoder updates per decoder update, K (no effect with fae)")
    flag("--one-pass", action="store_true",
         help="one forward pass of a minibatch serves encoder and decoder, and the decoder moves by the samples from before the "
         "encoder's step; goes with --infer kld, --inner-steps 1 and a --learn that does not differentiate the encoder by x")
    flag("--batch", type=positive, default=100, help="images per minibatch")
    flag("--lr", type=positive_float, default=1e-4, help="Adam's step size, for encoder and decoder")
    flag("--lr-half-life", type=positive_float, default=None, metavar="EPOCHS",
         help="the step size halves every EPOCHS epochs (default: it is constant)")
    flag("--epochs", type=positive, default=1000, help="passes over the training images")
    flag("--precision", choices=("float32", "tf32", "bf16"), default="float32",
         help="arithmetic of the networks' convolutions and matrix products; all else is float32; tf32 needs a GPU")
    flag = parser.add_argument_group("output").add_argument
    flag("--eval-every", type=positive, default=10, help="epochs between evaluations on the test images")
    flag("--fid-every", type=count, default=0, metavar="EPOCHS",
         help="epochs between FIDs, a multiple of --eval-every; 0: no FID during training")
    flag("--device", default="auto", help="auto | cpu | cuda | cuda:1 ...")
    flag("--no-graph", action="store_true", help="on a GPU, do not capture the updates in CUDA graphs")
    flag("--out", default=None, help="the run's folder (default: a name made of the flags, under runs/images)")
    flag("--overwrite", action="store_true", help="replace a run that exists in the folder")
    flag("--tensorboard", action="store_true", help="also write scalars and samples for TensorBoard into the run's folder")
    flag("--dry-run", action="store_true", help="print what would run, then stop (data may be downloaded or converted)")
    flag("--jobs", type=positive, default=1, help="on a CPU, runs at once, where flags have several values")
    return parser


def parse_args(argv=None):
    parser = image_parser()
    args = parser.parse_args(argv)
    resolve_pair(parser, args)
    args.width = args.width or NETS[args.net].width
    if args.latent == "bernoulli" and args.infer != "kld":
        parser.error(f"--infer {args.infer} needs gradients in z, which Bernoulli latents do not have; "
                     "--latent bernoulli goes with --infer kld")
    if args.latent == "gaussian" and args.temperature != parser.get_default("temperature"):
        parser.error("--temperature applies to --latent bernoulli only")
    if args.norm == "group" and not NETS[args.net].has_norm:
        parser.error(f"--norm group does not apply to --net {args.net}, which has no normalisation layers")
    if args.one_pass:
        refuse_one_pass(parser, args)
    if args.fid_every % args.eval_every:
        parser.error(f"--fid-every {args.fid_every} is not a multiple of --eval-every {args.eval_every}")
    defaults = vars(parser.parse_args([])) | {"width": NETS[args.net].width, "infer_samples": args.samples}
    args.out = args.out or f"runs/images/{run_name(args, AXES, defaults)}"
    return args


def refuse_one_pass(parser, args):
    """End the program where one forward pass cannot serve encoder and decoder."""
    if args.infer != "kld" or LEARN[args.learn].needs_b or args.latent != "gaussian":
        names = ", ".join(name for name, entry in LEARN.items() if not entry.needs_b)
        parser.error(f"--one-pass goes with --infer kld, Gaussian latents and --learn {names}")
    if args.inner_steps > 1 or args.infer_samples != args.samples:
        parser.error("--one-pass uses the same samples for encoder and decoder; it needs --inner-steps 1, "
                     "and --infer-samples equal to --samples")


def parse_runs(argv=None):
    """The flags of every run: all combinations of the values that the flags are given."""
    runs = [parse_args(words) for words in combinations(argv, image_parser())]
    if len({run.out for run in runs}) < len(runs):
        image_parser().error(f"several runs would write {runs[0].out}; give no value twice, and no --out for several runs")
    return runs


def main_of_runs(runs):
    """Train each of the runs: one as `main` does, several at once."""
    if len(runs) == 1 or runs[0].dry_run:
        for args in runs:
            main(args)
        return
    device, images = pick_device(runs[0].device), {}
    set_precision(runs[0].precision, device)
    for args in runs:  # every data set once, and on a GPU, where all runs are in this process, on the device
        if data_of(args) not in images:
            data = load(args)
            images[data_of(args)] = data if device.type == "cpu" else data._replace(train=data.train.to(device))
    arguments = {args.out: (args, images[data_of(args)], device) for args in runs}
    if device.type == "cpu":
        in_processes(arguments, train_one, runs[0].jobs)
    else:
        in_lockstep(arguments, begin, device)


def main(args):
    """Train one run."""
    device = pick_device(args.device)
    set_precision(args.precision, device)
    train_one(args, load(args), device)


def data_of(args):
    return args.data, args.data_root, args.limit, args.test_limit


def load(args):
    """The images of a run. Raises UserError for fewer than it needs."""
    data = load_images(*data_of(args))
    if args.batch > len(data.train):
        raise UserError(f"--batch {args.batch} is more than the {len(data.train)} training images")
    if len(data.test) < 2:
        raise UserError(f"{args.data} has fewer than two test images here; MMD and FID compare pairs of images")
    return data


def train_one(args, data, device, bar=progress):
    with stopping() as stop:
        drain(begin(args, data, device, stop, bar))


def begin(args, data, device, stop, bar):
    """Train one run. A generator that yields after every update."""
    torch.manual_seed(seed_of(args.seed, INIT))
    vae = vae_of(vars(args), data.train.shape[1:]).to(device)
    name = label(args.learn, args.infer, args.samples, args.estimator)
    announce(args, name, *describe(args, vae, data, device))
    if args.gamma == "learned" and (reach := reach_of(args, len(data.train) // args.batch)) < DISTANCE:
        print(f"log gamma moves by {reach:.2g} at most, the sum of Adam's steps, and so cannot arrive: docs/images.md, Gamma")
    if args.dry_run:
        return
    with Run(args.out, "train_images", vars(args), device, args.overwrite, args.tensorboard, label=name, data=data.recipe) as run:
        if not run.status:
            yield from fit(run, args, vae, data, device, stop, bar)
        plots.draw_run(run.path)


def fit(run, args, vae, data, device, stop, bar):
    trainer = ImageTrainer(vae, data.train.to(device), learn=args.learn, infer=args.infer, estimator=args.estimator,
                      samples=args.samples, inner_steps=args.inner_steps, noise=args.noise, batch=args.batch, lr=args.lr,
                      seed=args.seed, graph=not args.no_graph, infer_samples=args.infer_samples, lr_half_life=args.lr_half_life,
                      one_pass=args.one_pass, gamma=args.gamma)
    test = data.test.to(device)
    reference = reference_of(test, args.data, args.data_root) if args.fid_every else None
    status, history = yield from updates(
        run, trainer, args.epochs, args.eval_every, lambda: measure(trainer, args, test, reference), stop, bar)
    # A failed run has no pictures: a diverged model depends on when the loop noticed the divergence.
    shown = pictures(vae, test, args.noise, args.seed) if status == "ok" else {}
    run.save_metrics(**stack(history), **shown, status=status)
    if shown:
        run.show("samples", shown["samples"])
    print(f"{run.path}: {status}, negative ELBO {history['negative_elbo'][-1]:.1f} nats after {history['epoch'][-1]} epochs")


def measure(trainer, args, test, reference):
    """The test metrics of one evaluation. With --fid-every they include the FIDs, which are nan at epochs where none is due."""
    seed = seed_of(args.seed, EVALUATION)
    row = evaluate_images(trainer.vae, test, args.noise, seed=seed)
    if not args.fid_every:
        return row
    if trainer.step // trainer.steps_per_epoch % args.fid_every:
        return row | dict.fromkeys(FIDS, torch.tensor(torch.nan, dtype=torch.float64))
    return row | fids(trainer.vae, reference, args.noise, torch.Generator(test.device).manual_seed(seed))


def pictures(vae, test, noise, seed, n=64):
    """Images for plots, uint8: `samples` of the model, noisy `inputs` and their `reconstructions`, each [n, C, H, W].

    Row i of `interpolations` [8, 8, C, H, W] goes in even steps from the posterior mean of input i to that of input i + 8.
    """
    generator = torch.Generator(test.device).manual_seed(seed_of(seed, EVALUATION))
    clean = test[:n].float() / 255
    x = clean + noise * torch.randn(clean.shape, generator=generator, device=test.device)
    with evaluating(vae):
        z = vae.sample(vae.prior, vae.noise(vae.prior, n, generator), relaxed=False)
        codes = vae.encode(x).mean
        images = {"samples": vae.decode(z), "inputs": x, "reconstructions": vae.decode(codes)}
        start, end = (codes[rows % len(codes)][:, None] for rows in (torch.arange(8), torch.arange(8, 16)))
        images["interpolations"] = vae.decode(torch.lerp(start, end, torch.linspace(0, 1, 8, device=codes.device)[:, None]))
    return {name: quantise(image).cpu().numpy() for name, image in images.items()}


def reach_of(args, steps_per_epoch):
    """The sum of the step sizes of the decoder's updates, which is about the farthest that Adam moves log gamma."""
    K, half_life = 1 if LEARN[args.learn].joint else args.inner_steps, args.lr_half_life or math.inf
    return math.fsum(args.lr * decay(step, steps_per_epoch, half_life) for step in range(K - 1, steps_per_epoch * args.epochs, K))


def describe(args, vae, data, device):
    """Data, model and updates in words, for `announce`."""
    encoder, decoder = (sum(p.numel() for p in half.parameters()) for half in (vae.encoder, vae.decoder))
    steps = len(data.train) // args.batch * args.epochs
    decoder_steps = steps if LEARN[args.learn].joint else steps // args.inner_steps
    shape = tuple(data.train.shape[1:])
    return (f"{short_name(args.data)}: {len(data.train)} training and {len(data.test)} test images of {shape}",
            f"{args.net}: {encoder:,} encoder and {decoder:,} decoder parameters; "
            f"{steps:,} encoder and {decoder_steps:,} decoder updates on {device}")


if __name__ == "__main__":
    command_line(parse_runs, main_of_runs)
