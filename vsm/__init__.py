"""What the scripts share beside models.py, objectives.py, metrics.py, data.py and training.py.

    quiet         Ctrl-C during the imports
    cli           flags, and how a user's mistake is reported
    device        the device, its precision, eval mode
    runs          run folders and the arrays in them
    packs         many runs in one file, and the one loader of figures and tables
    sweep         the points of a sweep of 2-D runs, and their table
    tables        Markdown tables, means beside their errors
    figures       the figures, by family
    laws          the 2-D distributions
    importance    importance sampling of p(x)
    features      the networks behind FID and KID
    speed         CUDA graphs and compilation
    toys          the toy posteriors and the experiments on them
"""
