"""Figures of image runs that are grids of pictures."""

import numpy as np

from vsm.figures.groups import grouped, seeds_of
from vsm.figures.style import new_figure, save_figure, wrapped


def samples(runs, save):
    """Images decoded from the prior, one grid per run."""
    grids(runs, save, lambda arrays: tile(arrays["samples"], 8))


def reconstructions(runs, save):
    """Noisy test inputs above their reconstructions, one grid per run."""
    def starts(arrays):
        return range(0, min(len(arrays["inputs"]), 32), 8)

    def pairs(arrays):
        return np.concatenate([tile(arrays[name][i:i + 8], 8) for i in starts(arrays) for name in ("inputs", "reconstructions")])

    grids(runs, save, pairs, lambda arrays: ["input", "output"] * len(starts(arrays)))


def interpolations(runs, save):
    """Decoded points on the line between the codes of two test images, a row per pair of images, one grid per run."""
    def rows(arrays):
        pictures = arrays["interpolations"]  # [rows, steps, C, H, W]
        return tile(pictures.reshape(-1, *pictures.shape[2:]), pictures.shape[1])

    grids(runs, save, rows)


def grids(runs, save, make, names=lambda arrays: []):
    """Draw one picture for each run, that of make(arrays), under the run's name; names(arrays): those of its rows, if any."""
    panels = grouped(runs, split=("norm", "init_sd", "gamma"))
    named = []
    for panel, groups in panels.items():
        for name, members in groups:
            named += [(panel if len(panels) > 1 else "", f"{name}, {seeds_of([arrays])}", arrays) for arrays in members]
    pages = [make(arrays) for *_, arrays in named]
    rows, scale = -(-len(named) // 4), 1 if len(named) > 2 else 2  # scale: dots per pixel
    height, width = (max(sizes) for sizes in zip(*(page.shape[:2] for page in pages)))
    titles = [panel + bool(panel) * "\n" + wrapped(name, scale * width / 150, 7.5) for panel, name, _ in named]
    head = 0.2 + 0.13 * max(title.count("\n") for title in titles)  # inches
    figure, axes = new_figure(rows, -(-len(named) // rows), size=(scale * width / 150, scale * height / 150 + head))
    for ax in axes.flat:
        ax.set_frame_on(False)
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, title, page, (*_, arrays) in zip(axes.flat, titles, pages, named):
        rows = names(arrays)
        ax.set_yticks((np.arange(len(rows)) + 0.5) * len(page) / max(len(rows), 1), rows, fontsize=6.5)
        ax.tick_params(length=0, pad=1)
        ax.imshow(page, vmin=0, vmax=255, cmap="gray", interpolation="nearest")
        ax.set_title(title, fontsize=7.5)
        ax.set_anchor("S")
    save_figure(figure, save)


def tile(images, columns):
    """One picture [rows H, columns W(, 3)] of the images, uint8 [n, C, H, W]; places without an image are white."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    page = np.full((rows * columns, channels, height, width), 255, np.uint8)
    page[:n] = images
    page = page.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return page.reshape(rows * height, columns * width, channels).squeeze(-1 if channels == 1 else ())
