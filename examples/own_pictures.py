"""From a folder of your own pictures to a trained model, new pictures, reconstructions and log p(x).

    python -m examples.own_pictures folder:my_pictures                # one core: 20 minutes for 64 x 64 pixels
    python -m examples.own_pictures folder:my_pictures --width 64     # a GPU: minutes
    python -m examples.own_pictures glyphs                            # drawn digits, without any files: about six minutes

It trains in the folder runs/own (--out) and draws a picture there, own_pictures.png, in four rows: pictures that the model has
not seen, with the training noise; their reconstructions; samples with z from the prior; and samples with z from a mixture of
Gaussians that is fitted to the latents. The same command again goes on where it was stopped. Other pictures and other flags, but
for --components, need another --out.
"""

import os
from pathlib import Path

import torch

import train_images
from data import data_name, load_images, noisy
from metrics import iw_log_likelihood, quantise
from vsm.cli import Parser, UserError, command_line, positive
from vsm.figures.pictures import tile
from vsm.figures.style import new_figure, save_figure
from vsm.loading import load_vae
from vsm.runs import status_of
from vsm.samplers import load_sampler

ROWS = ("new pictures, with noise", "their reconstructions", "samples, z from the prior", "samples, z from a fitted mixture")


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("data", type=data_name, help="folder:PATH, or another name that train_images.py --data takes")
    flag("--data-root", default="data", help="folder of the data sets")
    flag("--updates", type=positive, default=7200,
         help="updates, rounded up to whole epochs; fewer than 5000 are too few for a good model")
    flag("--width", type=positive, default=16, help="base channels of the ConvNets")
    flag("--components", type=positive, default=10, help="Gaussians in the mixture, at most the number of pictures")
    flag("--out", type=os.path.expanduser, default="runs/own", help="the run's folder")
    return parser.parse_args(argv)


def main(args):
    images = load_images(args.data, args.data_root)
    if args.components > len(images.train):
        raise UserError(f"--components {args.components} is more than the {len(images.train)} pictures to train on")
    batch = min(50, max(2, len(images.train) // 2))
    epochs = -(-args.updates // (len(images.train) // batch))
    # The ELBO, one sample, one forward pass, and steps that halve each quarter of the epochs; 7200 of them sum to about 4.9.
    train_images.main(train_images.parse_args([
        "--data", args.data, "--data-root", args.data_root, "--out", args.out, "--learn", "elbo", "--samples", "1",
        "--inner-steps", "1", "--one-pass", "--width", str(args.width), "--dim-z", "32", "--batch", str(batch), "--epochs",
        str(epochs), "--lr", "2e-3", "--lr-half-life", str(epochs / 4), "--test-limit", "1000",
        "--eval-every", str(-(-epochs // 8))]))

    if (status := status_of(args.out)) != "ok":
        raise UserError(f"the training in {args.out} ended as {status}, so there is no model to draw pictures from")
    vae, sampler = load_vae(args.out), load_sampler(args.out, "mixture", components=args.components)
    generator = torch.Generator().manual_seed(0)
    x = noisy(images.test[:8], 0.1, generator)[0]  # the noise of training
    with torch.no_grad():
        q = vae.encode(x)
        rows = [x, vae.decode(q.mean), vae.decode(torch.randn(8, vae.dim_z, generator=generator)),
                vae.decode(sampler.sample(8, generator))]
        log_p = iw_log_likelihood(vae, x, 100, "posterior", generator)
    print(f"log p(x) of the new pictures, at least: {log_p.mean():.0f} nats on average")
    figure, axes = new_figure(4, 1, size=(6, 1))
    for ax, title, images in zip(axes.flat, ROWS, rows):
        ax.imshow(tile(quantise(images).numpy(), 8), vmin=0, vmax=255, cmap="gray", interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.set_axis_off()
    save_figure(figure, save := Path(args.out) / "own_pictures.png")
    print(save)


if __name__ == "__main__":
    command_line(parse_args, main)
