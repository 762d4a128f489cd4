"""The loop around a fit (`Descent` or `Mixtures`): progress, checkpoints, and stopping at a signal."""

import time

import torch

from vsm.cli import Stopped, UserError, progress, stopping
from vsm.forms import mismatch

CHECKPOINT_SECONDS = 60


def run_to_the_end(fit, run):
    """Advance `fit` to its last iteration, from the checkpoint of `run` where there is one; save a checkpoint every minute.

    Ctrl-C and SIGTERM save a checkpoint and raise Stopped.
    """
    if resume(fit, run):
        print(f"{run.path}: resumed at iteration {fit.step}")
    saved_at = time.monotonic()
    with stopping() as stop, progress(fit.args.iterations, fit.step, "it") as bar:
        while fit.step < fit.args.iterations:
            before = fit.step
            fit.advance()
            bar.update(fit.step - before)
            if stop.requested or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                run.save_checkpoint(state_of(fit))
                saved_at = time.monotonic()
            if stop.requested:
                raise Stopped(stop.requested)


def state_of(fit):
    """Everything that a step of `fit` changes, on the CPU."""
    tensors = {name: tensor.cpu() for name, tensor in fit.tensors().items()}
    return {**tensors, **fit.counters(), "generator": fit.generator.get_state()}


def resume(fit, run):
    """Load the checkpoint of `run` into `fit`; False where there is none.

    Raises UserError for a checkpoint of another form than `state_of` gives this fit; `fit` is then unchanged. The state of a
    generator may have any length, which depends on the kind of device.
    """
    saved = run.load_checkpoint()
    if saved is None and not (run.path / "checkpoint.pt").exists():
        return False
    difference = mismatch(saved, state_of(fit) | {"generator": torch.Tensor})
    if difference is None and not 0 <= saved["step"] <= fit.args.iterations:
        difference = f"step is {saved['step']}, where the last is {fit.args.iterations}"
    if difference:
        raise UserError(f"{run.path}/checkpoint.pt is not of the fit that these flags make ({difference}) and is kept as it is; "
                        "move it away or use --overwrite to start the run again")
    fit.load(saved)
    return True
