"""The loop that trains: evaluations, checkpoints, resuming, and stopping at a signal; for images, 2-D data and toys alike."""

import math
import time

import torch

from vsm.cli import Stopped, UserError, progress, stopping
from vsm.device import peak_memory

LOOK_SECONDS = 1  # the host waits for the device, to see whether the run has diverged, at most this often
CHECKPOINT_SECONDS = 60  # between checkpoints within an epoch
EXPLODED_KL = 1e5  # nats an image: more than the 68,000 that its 8-bit numbers hold at 64 x 64 pixels in colour


def train(run, trainer, epochs, eval_every=1, evaluate=None):
    """Train one run by `updates`. Returns the status and the history."""
    with stopping() as stop:
        generator = updates(run, trainer, epochs, eval_every, evaluate, stop)
        while True:
            try:
                next(generator)
            except StopIteration as end:
                return end.value


def updates(run, trainer, epochs, eval_every, evaluate, stop, bar=progress):
    """Train up to `epochs`, from the run's checkpoint if it has one. A generator that yields after every update.

    It returns the status and the history.

    evaluate() returns a dict of CPU tensors; it is called at epoch 0, every `eval_every` epochs and at the last one. The history
    is a list of its values per metric. The status is `ok`, or a failure, which is a result: `diverged@<step>` where a loss was
    not finite, `exploded@<step>` where at an evaluation, which then is no row, the model had `exploded`.
    `epochs` is a budget: a run that ended with fewer continues, and equals one that had the larger budget from the start.
    Once `stop` (of `stopping`) is requested, it writes a checkpoint and raises Stopped, in an evaluation at once.
    bar(total, initial) is the progress bar.
    """
    history, seconds = resume(run, trainer, epochs, eval_every)
    total, started = epochs * trainer.steps_per_epoch, time.monotonic() - seconds
    last_look = last_save = time.monotonic()

    def checkpoint():
        run.save_checkpoint({"trainer": trainer.save(), "history": history, "seconds": time.monotonic() - started})

    def evaluation_is_due():
        epoch, remainder = divmod(trainer.step, trainer.steps_per_epoch)
        last = history["epoch"][-1] if history else -1
        return evaluate and remainder == 0 and epoch > last and (epoch % eval_every == 0 or trainer.step == total)

    def record(tested):
        epoch = trainer.step // trainer.steps_per_epoch
        row = {"epoch": torch.tensor(epoch), **tested, **trainer.averages(reset=epoch % eval_every == 0),
               "seconds": torch.tensor(time.monotonic() - started), "peak_memory": torch.tensor(peak_memory(trainer.device))}
        for name, value in row.items():
            history.setdefault(name, []).append(value)
        run.save_metrics(**stack(history))
        run.log(history, members=trainer.diverged_at.shape)

    with bar(total, trainer.step) as bar:
        while True:
            evaluates = evaluation_is_due()
            if evaluates or time.monotonic() - last_look >= LOOK_SECONDS:  # the host waits for the device in this block alone
                last_look = time.monotonic()
                if (diverged := trainer.diverged) is not None:
                    return f"diverged@{diverged}", history
                bar.set_postfix(trainer.progress(bar.format_dict["rate"] or 0), refresh=False)
                if evaluates:
                    try:
                        with stop.at_once():
                            tested = evaluate()
                    except Stopped:
                        checkpoint()
                        raise
                    if trainer.step and exploded(tested):
                        return f"exploded@{trainer.step}", history
                    record(tested)
                if evaluates or last_look - last_save > CHECKPOINT_SECONDS:
                    checkpoint()
                    last_save = time.monotonic()
            if stop.requested:
                checkpoint()
                raise Stopped(stop.requested)
            if trainer.step >= total:
                return "ok", history
            before = trainer.step
            trainer.run_step()
            bar.update(trainer.step - before)
            yield


def exploded(tested):
    """Whether these metrics of an image run are of a lost model: its KL is absurd or NaN, or its negative ELBO is not finite."""
    return "kl" in tested and not (tested["kl"] <= EXPLODED_KL and tested["negative_elbo"].isfinite())


def resume(run, trainer, epochs, eval_every):
    """Load the run's checkpoint into the trainer. Returns its history and seconds, or {} and 0 where there is no checkpoint.

    The last epoch of a smaller budget is always evaluated; its row is dropped if a larger budget does not evaluate there.
    """
    saved = run.load_checkpoint()
    if saved is None:
        return {}, 0.0
    trainer.load(saved["trainer"])
    done = trainer.step / trainer.steps_per_epoch
    if done > epochs:
        raise UserError(f"{run.path} has more than {epochs} {trainer.unit}s already; continue it with --{trainer.unit}s of at "
                        f"least {math.ceil(done)}")
    print(f"{run.path}: resumes at {trainer.unit} {f'{done:,.1f}'.removesuffix('.0')} of {epochs:,}", flush=True)
    history = saved["history"]
    last = int(history["epoch"][-1]) if history.get("epoch") else 0
    if last % eval_every and last < epochs:
        history = {name: values[:-1] for name, values in history.items()}
    return history, saved["seconds"]


def stack(history):
    """The history as NumPy arrays, [evaluations, ...]."""
    return {name: torch.stack(values).numpy() for name, values in history.items()}
