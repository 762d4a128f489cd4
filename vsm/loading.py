"""Load the trained model of a run from its folder.

    from vsm.loading import load_vae
    vae = load_vae("runs/images/mnist-conv-kld-fd-seed0")             # an image run
    vae = load_vae("runs/synthetic/mixture-kld-fd-5-0-seed0", member=0)  # one member of a 2-D run

docs/images.md shows how to sample, encode, reconstruct and estimate log p(x) with it. The command

    python -m vsm.loading RUN FOLDER

writes what load_vae reads, config.json and the model's tensors, to a new folder: a third of a checkpoint, to be shared.
"""

import functools
import io
from pathlib import Path

import torch

from data import load_images
from models import NETS, VAE, build_ensemble, build_vae, mlp
from vsm.cli import Parser, UserError, command_line
from vsm.device import to_channels_last
from vsm.flags import image_defaults, synthetic_defaults
from vsm.names import flag_name
from vsm.runs import load_checkpoint, load_config, refuse_other_images, write_atomic

DEFAULTS = {"train_images": image_defaults, "train_synthetic": synthetic_defaults}


def flags_of(config):
    """The flags of a run from its config.json.

    Raises UserError for a run of another script, and for unknown flags, which might change how the model is built.
    """
    script, flags = config["script"], config["flags"]
    if script not in DEFAULTS:
        raise UserError(f"it is a run of {script}.py, which trains no VAE")
    if unknown := sorted(flags.keys() - DEFAULTS[script]().keys()):
        names = ", ".join(f"--{flag_name(key)}" for key in unknown)
        raise UserError(f"it was made by another version of {script}.py; this version does not know its {names}")
    return flags


def vae_of(flags, image_shape):
    """The untrained model of an image run from its flags, for images of `image_shape` [C, H, W].

    Raises UserError for an unknown network, and for images that the network does not take.
    """
    if flags["net"] not in NETS:
        raise UserError(f"its network {flags['net']!r} is none of {', '.join(NETS)}; import the module that adds it, or "
                        "name that module in $VSM_IMPORT")
    try:
        return build_vae(flags["net"], tuple(image_shape), flags["dim_z"], flags["width"], flags["norm"], flags["latent"],
                         temperature=flags["temperature"], init_sd=flags["init_sd"], bf16=flags["precision"] == "bf16")
    except ValueError as error:
        raise UserError(str(error)) from error


def load_vae(folder, device="cpu", member=None, checkpoint="checkpoint.pt"):
    """The VAE of a run folder at its last checkpoint, in eval mode and frozen. It reads config.json and the checkpoint only.

    For a 2-D run, `member` i gives the model of seed --seed + i, for x [B, 2] and z [N, B, 2]; None gives the ensemble of all S,
    for x [S, B, 2]. `checkpoint` names another file of the folder, such as an earlier copy. Raises UserError for a folder, flag,
    member or checkpoint that is missing, damaged or of another version, and for a device that is not there.
    """
    folder, config = Path(folder), load_config(folder)
    flags, saved, is_image_run = flags_of(config), load_checkpoint(folder / checkpoint), config["script"] == "train_images"
    if is_image_run and member is not None:
        raise UserError(f"{folder} is an image run, which has one model; leave out member {member}")
    try:
        vae = vae_of(flags, config["data"]["size"]) if is_image_run else \
            build_ensemble(2, 2, flags["hidden"], [0] * flags["seeds"], init_sd=flags["init_sd"])
        tensors = saved["trainer"]["tensors"].items()
        vae.load_state_dict({name.removeprefix("vae."): value for name, value in tensors if name.startswith("vae.")})
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder / checkpoint} does not hold the model of its config.json ({type(error).__name__}: "
                        f"{str(error).splitlines()[0]})") from error
    if member is not None:
        vae = member_of(vae, member)
    try:
        vae = vae.eval().requires_grad_(False).to(device)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:  # PyTorch's for a device that is not there
        raise UserError(f"the device {device} is not available here ({str(error).splitlines()[0]})") from error
    return to_channels_last(vae, flags["learn"], flags["infer"]) if is_image_run else vae


def export(run, folder):
    """Write the config.json and the model's tensors of a run to a new folder, which load_vae reads. Returns it.

    Raises UserError for a run that load_vae refuses, and for a folder that exists.
    """
    load_vae(run)
    if (folder := Path(folder)).exists():
        raise UserError(f"{folder} exists and is kept as it is; name a new folder")
    trainer = load_checkpoint(Path(run) / "checkpoint.pt")["trainer"]
    tensors = {name: tensor for name, tensor in trainer["tensors"].items() if name.startswith("vae.")}
    buffer = io.BytesIO()
    torch.save({"trainer": {"step": trainer["step"], "tensors": tensors}}, buffer)
    write_atomic(folder / "config.json", (Path(run) / "config.json").read_bytes())
    write_atomic(folder / "checkpoint.pt", buffer.getvalue())
    return folder


def epochs_trained(folder):
    """Epochs of an image run at its last checkpoint, not always a whole number."""
    config, saved = load_config(folder), load_checkpoint(Path(folder) / "checkpoint.pt")
    return saved["trainer"]["step"] / (config["data"]["counts"]["train"] // config["flags"]["batch"])


def place_of_images(run, config, args):
    """The name and root with which load_images finds the images of an image run, by the flags --data and --data-root in `args`.

    Raises UserError where the images there are not those that the run was trained on.
    """
    flags = flags_of(config)
    name = args.data if args.data and flags["data"].startswith("folder:") else flags["data"]
    root = args.data_root or flags["data_root"]
    refuse_other_images(run, config, recipe_at(name, root))
    return name, root


@functools.cache
def recipe_at(name, root):
    return load_images(name, root, 1, 1).recipe


def member_of(ensemble, member):
    """A member of an EnsembleVAE as a VAE of its own, equal to rounding. Raises UserError for a member that does not exist."""
    count = len(ensemble.log_gamma)
    if not 0 <= member < count:
        raise UserError(f"there is no member {member}; the run has {count}, counted from 0")
    halves = []
    for stacked in (ensemble.encoder, ensemble.decoder):
        sizes = [stacked.weights[0].shape[1], *(weight.shape[2] for weight in stacked.weights)]
        net = mlp(sizes)
        for layer, weight, bias in zip(net[::2], stacked.weights, stacked.biases):
            layer.weight.data, layer.bias.data = weight[member].detach().T.clone(), bias[member, :, 0].detach().clone()
        halves.append(net)
    vae = VAE(*halves, ensemble.dim_z, std="softplus")
    vae.log_gamma.data = ensemble.log_gamma[member].detach().clone()
    return vae


def parse_args(argv=None):
    parser = Parser(prog="python -m vsm.loading", description="Copy the trained model of a run to a new folder.")
    parser.add_argument("run", metavar="RUN", help="folder of a run of train_images.py or train_synthetic.py")
    parser.add_argument("folder", metavar="FOLDER",
                        help="new folder for config.json and the model's tensors, which load_vae reads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command_line(parse_args, lambda args: print(export(args.run, args.folder)))
