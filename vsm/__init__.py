"""Code that the scripts share, beside models.py, objectives.py, metrics.py, data.py and training.py.

    cli, flags        command lines, progress, signals, errors
    runs, names       run folders, the arrays in them, what they are called; stored_runs reads them and packs of them
    loading           the trained model of a run folder
    fid, features     FID and KID, and the networks behind them
    distributions_2d, importance, linear    2-D distributions, importance sampling of p(x), theory of linear VAEs
    toys, figures     the toy posteriors; the figures by family

Each of the others says what it does in its first line.
"""
