"""What the scripts share beside models.py, objectives.py, metrics.py, data.py and training.py.

    cli           flags, and how a user's mistake is reported
    device        the device, its precision, eval mode
    runs          run folders and the arrays in them
    laws          the 2-D distributions
    importance    importance sampling of p(x)
    features      the networks behind FID and KID
    speed         CUDA graphs and compilation
    toys          the toy posteriors and the experiments on them
"""
