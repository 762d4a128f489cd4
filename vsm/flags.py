"""The command lines of the two trainers: their flags with the defaults, each once, and what pairs of flags have no meaning."""

import os

from data import data_name, data_names
from models import NETS, NORMS
from objectives import ESTIMATORS, INFER, LEARN
from vsm.cli import Parser, add_output, count, nonnegative, positive, positive_float, seed_number
from vsm.distributions_2d import DISTRIBUTIONS
from vsm.gamma import GAMMA_HELP, MODES
from vsm.names import run_name

IMAGE_AXES = ("data", "net", "infer", "learn", "seed")  # the flags that name a run's folder by their values alone
SYNTHETIC_AXES = ("data", "infer", "learn", "inner_steps", "bilevel_steps", "seed")


def add_pair(flag, samples, datum):
    """The pair of objectives and its numbers of posterior samples per `datum`."""
    flag("--learn", choices=LEARN, default="fd", help="objective of the decoder")
    flag("--infer", choices=INFER, help="objective of the encoder (default: kld; fae with --learn fae)")
    flag("--estimator", choices=ESTIMATORS, default="plugin", help="how squared expectations under q are estimated")
    flag("--samples", type=positive, default=samples, help=f"posterior samples per {datum}, N")
    flag("--infer-samples", type=positive, metavar="M", help=f"posterior samples per {datum} in the encoder's loss (default: N)")


def add_graph(flag):
    flag("--no-graph", action="store_true", help="on a GPU, do not capture the updates in CUDA graphs")


def image_parser(description=None):
    """The flags of train_images.py."""
    parser = Parser(description=description)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--data", type=data_name, default="mnist", metavar="NAME", help=data_names())
    flag("--data-root", type=os.path.expanduser, default="data", help="folder of the data sets, also for downloads")
    flag("--limit", type=count, default=0, help="number of training images, the first ones; 0: all")
    flag("--test-limit", type=count, default=0, help="number of test images, the first ones; 0: all")
    add_pair(flag, samples=5, datum="image")
    flag("--noise", type=nonnegative, default=0.1, help="sd of the Gaussian noise added to training and test images")
    flag("--seed", type=seed_number, default=0, help="seed of weights, data order and noise")
    flag = parser.add_argument_group("model").add_argument
    flag("--net", choices=NETS, default="conv", help="mlp, conv (DCGAN) or resnet (ResNet18)")
    flag("--width", type=positive, help="base channels of conv and resnet (default: 64), hidden units of mlp (default: 400)")
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
    flag("--lr-half-life", type=positive_float, metavar="EPOCHS",
         help="the step size halves every EPOCHS epochs; it changes between epochs only (default: it is constant)")
    flag("--epochs", type=positive, default=1000, help="passes over the training images")
    flag("--precision", choices=("float32", "tf32", "bf16"), default="float32",
         help="arithmetic of the networks' convolutions and matrix products; all else is float32; tf32 needs a GPU")
    flag = parser.add_argument_group("output").add_argument
    flag("--eval-every", type=positive, default=10, help="epochs between evaluations on the test images")
    flag("--fid-every", type=count, default=0, metavar="EPOCHS",
         help="epochs between FIDs, a multiple of --eval-every; 0: no FID during training")
    add_output(flag, "runs/images")
    add_graph(flag)
    flag("--jobs", type=positive, default=1, help="on a CPU, runs at once, where flags have several values")
    return parser


def image_args(argv=None, description=None):
    """The flags of an image run. Ends the program with a usage error for flags that do not fit together."""
    parser = image_parser(description)
    args = parser.parse_args(argv)
    resolve_pair(parser, args)
    args.width = args.width or NETS[args.net].width
    if args.latent == "bernoulli" and args.infer != "kld":
        parser.error(f"--infer {args.infer} needs gradients in z, which Bernoulli latents do not have; "
                     "--latent bernoulli goes with --infer kld")
    if args.latent == "gaussian" and args.temperature != parser.get_default("temperature"):
        parser.error("--temperature applies to --latent bernoulli only")
    if args.norm != "batch" and not NETS[args.net].has_norm:
        parser.error(f"--norm {args.norm} does not apply to --net {args.net}, which has no normalisation layers")
    if args.one_pass:
        refuse_one_pass(parser, args)
    if args.fid_every % args.eval_every:
        parser.error(f"--fid-every {args.fid_every} is not a multiple of --eval-every {args.eval_every}")
    args.out = args.out or f"runs/images/{run_name(args, IMAGE_AXES, image_defaults(args.net, args.samples))}"
    return args


def refuse_one_pass(parser, args):
    """End the program where one forward pass cannot serve encoder and decoder."""
    same_samples = args.infer == "kld" and args.latent == "gaussian" and args.infer_samples == args.samples
    if LEARN[args.learn].needs_b or not same_samples or args.inner_steps > 1:
        names = ", ".join(name for name, entry in LEARN.items() if not entry.needs_b)
        parser.error(f"--one-pass goes with --infer kld, --learn {names}, Gaussian latents, --inner-steps 1 and --infer-samples "
                     "equal to --samples")


def image_defaults(net="conv", samples=5):
    """The defaults of train_images.py's flags as they take effect beside these values of --net and --samples."""
    defaults = vars(image_parser().parse_args([]))
    return defaults | {"infer": "kld", "width": NETS[net].width, "infer_samples": samples}


def synthetic_parser(description=None):
    """The flags of train_synthetic.py."""
    parser = Parser(description=description)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--data", choices=DISTRIBUTIONS, default="mixture", help="2-D distribution")
    flag("--noise", type=nonnegative, default=0.0, help="sd of Gaussian noise added to the data; likelihoods are with it")
    add_pair(flag, samples=1, datum="datum")
    flag("--seeds", type=positive, default=10, help="number of members of the ensemble; their seeds count up from --seed")
    flag("--seed", type=seed_number, default=0, help="the first member's seed, for its weights, data and noise")
    flag = parser.add_argument_group("model").add_argument
    flag("--hidden", type=positive, default=30, help="units of each of the two hidden layers (100 in Figure 6)")
    flag("--init-sd", type=positive_float, default=0.1, help="initial standard deviation of p(x|z)")
    flag("--gamma", choices=MODES, default="learned", help=GAMMA_HELP)
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--inner-steps", type=positive, default=5, help="encoder updates per decoder update, K")
    flag("--bilevel-steps", type=count, default=0,
         help="further encoder updates through which the decoder's gradient flows, J. In principle swersky and bao need them, "
         "because their q replaces a posterior that depends on the decoder, but a few steps can do harm (docs/theory.md). elbo "
         "with kld gains nothing, because encoder and decoder minimise one loss. fd with J > 0 is no longer Algorithm 1 and "
         "becomes biased. All pairs are allowed, for comparison")
    flag("--batch", type=positive, default=1000, help="fresh data per decoder update")
    flag("--lr", type=positive_float, default=1e-4, help="Adam's step size, for the decoder")
    flag("--inner-lr", type=positive_float, help="SGD's step size, for the encoder (default: 1e-2 for kld, 1e-3 for the others)")
    flag("--lr-half-life", type=positive_float, metavar="EPOCHS",
         help="both step sizes halve every EPOCHS epochs (default: they are constant)")
    flag("--steps-per-epoch", type=positive, default=100, help="decoder updates per epoch")
    flag("--epochs", type=positive, default=100, help="epochs (1000 in Figure 6)")
    flag = parser.add_argument_group("output").add_argument
    flag("--test-size", type=positive, default=5000, help="number of unseen data on which the models are evaluated")
    flag("--importance-samples", type=positive, default=100_000, help="samples from the prior per member in the final evaluation")
    flag("--eval-every", type=positive, default=5, help="epochs between evaluations on the test data during training")
    flag("--compile", action="store_true",
         help="on a CPU, compile the updates and their derivatives with TorchInductor; it needs a C++ compiler and takes up to a "
         "minute, once per pair of objectives, N and J")
    add_output(flag, "runs/synthetic")
    add_graph(flag)
    return parser


def synthetic_args(argv=None, description=None):
    """The flags of a 2-D run. Ends the program with a usage error for flags that do not fit together."""
    parser = synthetic_parser(description)
    args = parser.parse_args(argv)
    resolve_pair(parser, args)
    if args.estimator == "released" and args.samples > 1:
        parser.error("--estimator released follows the paper's code for 2-D data, which has one sample; leave out --samples")
    if args.compile and args.bilevel_steps and args.lr_half_life:
        parser.error("--compile with --bilevel-steps fixes the step size of the encoder; leave out --lr-half-life")
    if args.gamma == "stationary" and args.bilevel_steps:
        parser.error("--gamma stationary holds q, and with --bilevel-steps q moves with gamma; leave one of them out")
    args.inner_lr = args.inner_lr or default_inner_lr(args.infer)
    args.out = args.out or f"runs/synthetic/{run_name(args, SYNTHETIC_AXES, synthetic_defaults(args.infer, args.samples))}"
    return args


def synthetic_defaults(infer="kld", samples=1):
    """The defaults of train_synthetic.py's flags as they take effect beside these values of --infer and --samples."""
    defaults = vars(synthetic_parser().parse_args([]))
    return defaults | {"infer": infer, "inner_lr": default_inner_lr(infer), "infer_samples": samples}


def default_inner_lr(infer):
    return 1e-2 if infer == "kld" else 1e-3


def resolve_pair(parser, args):
    """Set the defaults of --infer and --infer-samples. A pair or an estimator that has no meaning ends the program."""
    learn = LEARN[args.learn]
    args.infer = args.infer or (args.learn if learn.joint else "kld")
    args.infer_samples = args.infer_samples or args.samples
    if (learn.joint or INFER[args.infer].joint) and args.infer != args.learn:
        joint = args.learn if learn.joint else args.infer
        parser.error(f"{joint} trains encoder and decoder by one loss, so --learn {joint} goes with --infer {joint} only")
    if learn.joint and args.infer_samples != args.samples:
        parser.error(f"{args.learn} has one loss and one number of samples; --infer-samples must equal --samples")
    if args.estimator != "plugin" and not learn.takes("estimator"):
        names = ", ".join(name for name, entry in LEARN.items() if entry.takes("estimator"))
        parser.error(f"--estimator {args.estimator} applies to --learn {names} only")
    elif args.estimator not in (*learn.estimators, "plugin"):
        parser.error(f"--learn {args.learn} takes --estimator {' or '.join(learn.estimators)}, not {args.estimator}")
    if learn.takes("t") and not args.noise:
        parser.error(f"--learn {args.learn} needs the score of the noise in the data; give --noise above 0")
    if args.estimator == "unbiased" and args.samples < 2:
        parser.error("--estimator unbiased needs --samples of at least 2, because it divides by N - 1")
    if args.gamma == "stationary" and learn.gamma is None:
        names = ", ".join(name for name, entry in LEARN.items() if entry.gamma)
        parser.error(f"--gamma stationary applies to --learn {names}, whose gamma has a closed form (the field `gamma` of an "
                     "entry of objectives.LEARN)")


def announce(args, name, data, model):
    """Print what a run will do: the `name` of its pair of objectives, its data, model, folder, and which objective it equals."""
    print(f"{name} on {data}\n{model}\nwrites {args.out}", flush=True)
    if alias := LEARN[args.learn].alias(args.samples, args.estimator):
        print(f"{LEARN[args.learn].letter} with N = {args.samples} equals {alias}", flush=True)
