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

import math
from itertools import pairwise

import torch

from data import load_images, noisy
from metrics import evaluate_images, quantise
from objectives import LEARN, label
from training import EVALUATION, INIT, ImageTrainer, decay, seed_of
from vsm.cli import UserError, command_line, progress, stopping, while_slow
from vsm.device import evaluating, pick_device, set_precision
from vsm.features import features_of
from vsm.fid import FIDS, fids, reference_of
from vsm.figures.run import draw_run
from vsm.flags import announce, image_args, image_parser
from vsm.loading import vae_of
from vsm.loop import stack, updates
from vsm.many_runs import combinations, in_lockstep, in_processes, one_thread
from vsm.names import short_name
from vsm.runs import Run

DISTANCE = 5  # log gamma goes about 4 from an initial standard deviation of 1 to its end on MNIST


def parse_args(argv=None):
    return image_args(argv, __doc__)


def parse_runs(argv=None):
    """The flags of every run: all combinations of the values that the flags are given."""
    runs = [parse_args(words) for words in combinations(argv, image_parser(__doc__))]
    outs = [run.out for run in runs]
    if twice := [out for out in outs if outs.count(out) > 1]:
        image_parser().error(f"several runs would write {twice[0]}; give no value twice, and no --out for several runs")
    if len({run.precision == "tf32" for run in runs}) > 1:
        image_parser().error("--precision tf32 holds for a whole process; give it a command of its own")
    return runs


def main_of_runs(runs):
    """Train each of the runs, several at once."""
    device, images = pick_device(runs[0].device), {}
    set_precision(runs[0].precision, device)
    if len(runs) == 1:
        train_one(runs[0], load(runs[0]), device)
        return
    with one_thread():
        for args in runs:  # every data set once, and on a GPU, where all runs are in this process, on the device
            if data_of(args) not in images:
                data = load(args)
                images[data_of(args)] = data._replace(train=data.train.to(device), test=data.test.to(device))
            refuse_too_few(args, images[data_of(args)])
        if device.type == "cpu":  # the network of FID is trained once, before the processes begin
            for name, root in dict.fromkeys((args.data, args.data_root) for args in runs if args.fid_every):
                features_of(name, root, device)
    arguments = {args.out: (args, images[data_of(args)], device) for args in runs}
    if device.type == "cpu":
        for note in dict.fromkeys(filter(None, (reach_note(args, images[data_of(args)]) for args in runs))):
            print(note)
        in_processes(arguments, train_one, runs[0].jobs)
    else:
        in_lockstep(arguments, begin, device)


def main(args):
    """Train one run."""
    main_of_runs([args])


def data_of(args):
    return args.data, args.data_root, args.limit, args.test_limit


def load(args):
    """The images of a run. Raises UserError for fewer than it needs."""
    data = load_images(*data_of(args))
    refuse_too_few(args, data)
    return data


def refuse_too_few(args, data):
    """Raises UserError for fewer images than a run needs."""
    if args.batch > len(data.train):
        raise UserError(f"--batch {args.batch} is more than the {len(data.train)} training images")
    minibatches = len(data.train) // args.batch * args.epochs
    if minibatches < args.inner_steps and not LEARN[args.learn].joint:
        raise UserError(f"{minibatches} minibatches in all are fewer than the {args.inner_steps} of one decoder update; "
                        "raise --epochs, or lower --batch or --inner-steps")
    if len(data.test) < 2:
        raise UserError(f"{args.data} has fewer than two test images here; MMD and FID compare pairs of images")


def train_one(args, data, device, bar=progress):
    with stopping() as stop:
        for _ in begin(args, data, device, stop, bar):
            pass


def begin(args, data, device, stop, bar):
    """Train one run. A generator that yields after every update."""
    torch.manual_seed(seed_of(args.seed, INIT))
    vae = vae_of(vars(args), data.train.shape[1:]).to(device)
    name = label(args.learn, args.infer, args.samples, args.estimator)
    announce(args, name, *describe(args, vae, data, device))
    with Run(args.out, "train_images", vars(args), device, args.overwrite, label=name, data=data.recipe) as run:
        if not run.status:
            if note := reach_note(args, data):
                print(note)
            yield from fit(run, args, vae, data, device, stop, bar)
        draw_run(run.path)


def fit(run, args, vae, data, device, stop, bar):
    trainer = ImageTrainer(
        vae, data.train.to(device), learn=args.learn, infer=args.infer, estimator=args.estimator, samples=args.samples,
        infer_samples=args.infer_samples, inner_steps=args.inner_steps, one_pass=args.one_pass, noise=args.noise,
        batch=args.batch, lr=args.lr, lr_half_life=args.lr_half_life, gamma=args.gamma, seed=args.seed, graph=not args.no_graph)
    test = data.test.to(device)
    reference = reference_of(test, args.data, args.data_root) if args.fid_every else None

    def evaluate():
        with while_slow(f"evaluating {len(test):,} images"):
            return measure(trainer, args, test, reference)

    status, history = yield from updates(run, trainer, args.epochs, args.eval_every, evaluate, stop, bar)
    # A failed run has no pictures: a diverged model depends on when the loop noticed the divergence.
    shown = pictures(vae, test, args.noise, args.seed) if status == "ok" else {}
    features = {"fid_features": " ".join((reference.settings["name"], reference.settings["hash"]))} if reference else {}
    run.save_metrics(**stack(history), **shown, **features, status=status)
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
    x = noisy(test[:n], noise, generator)[0]
    with evaluating(vae):
        z = vae.sample(vae.prior, vae.noise(vae.prior, n, generator), relaxed=False)
        codes = vae.encode(x).mean
        images = {"samples": vae.decode(z), "inputs": x, "reconstructions": vae.decode(codes)}
        start, end = (codes[rows % len(codes)][:, None] for rows in (torch.arange(8), torch.arange(8, 16)))
        images["interpolations"] = vae.decode(torch.lerp(start, end, torch.linspace(0, 1, 8, device=codes.device)[:, None]))
    return {name: quantise(image).cpu().numpy() for name, image in images.items()}


def reach_note(args, data):
    """The sentence that log gamma may not arrive, where the steps are too small; otherwise None."""
    distance = DISTANCE + 2 * math.log(args.init_sd)
    if args.gamma == "learned" and (reach := reach_of(args, len(data.train) // args.batch)) < distance:
        return (f"log gamma moves by about {reach:.2g}, the sum of Adam's steps, and so may not arrive at its optimum; "
                "larger --lr or --epochs, or --gamma stationary, bring it there (docs/images.md, Gamma)")
    return None


def reach_of(args, steps_per_epoch):
    """The sum of the step sizes of the decoder's updates, which is about the farthest that Adam moves log gamma."""
    K, half_life = 1 if LEARN[args.learn].joint else args.inner_steps, args.lr_half_life or math.inf
    ends = [epoch * steps_per_epoch // K for epoch in range(args.epochs + 1)]  # the decoder's updates before each epoch
    return math.fsum(args.lr * decay(epoch, 1, half_life) * (end - start) for epoch, (start, end) in enumerate(pairwise(ends)))


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
