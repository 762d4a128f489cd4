"""Code that the scripts share, beside models.py, objectives.py, metrics.py, data.py and training.py.

The main modules; each of the others says what it does in its first line:

    quiet         Ctrl-C during the imports
    cli           flags, progress, signals, errors
    device        device, precision, eval mode
    runs          run folders and the arrays in them
    loading       the trained model of a run folder
    packs         many runs in one file; the loader for figures and tables
    sweep         the points of a sweep of 2-D runs and their table
    tables        Markdown tables of means and their errors
    figures       the figures, by family
    laws          the 2-D distributions
    linear        fixed points of the objectives on linear VAEs
    importance    importance sampling of p(x)
    features      the networks behind FID and KID
    speed         CUDA graphs and compilation
    toys          the toy posteriors and the experiments on them
"""
