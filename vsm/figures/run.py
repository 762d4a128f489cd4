"""The pictures that train_images.py draws at the end of a run."""

from pathlib import Path

from vsm.figures.images import training_curves
from vsm.figures.latents import posterior_mean, posterior_sd
from vsm.figures.pictures import interpolations, reconstructions, samples
from vsm.stored_runs import open_runs


def draw_run(run):
    """Draw the PNGs of one finished image run that are missing, or older than its arrays. A diverged run has curves only."""
    (opened,) = open_runs([run])
    arrays = opened.finished()
    written = (Path(run) / "metrics.npz").stat().st_mtime_ns
    pictures = [samples, reconstructions, interpolations, posterior_sd, posterior_mean]
    for figure in [training_curves] + [picture for picture in pictures if picture.__name__ in arrays]:
        save = Path(run) / f"{figure.__name__}.png"
        if not (save.exists() and save.stat().st_mtime_ns >= written) and (
                figure is training_curves or str(arrays["status"]) == "ok"):
            figure([opened], save)
