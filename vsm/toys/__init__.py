"""Toy posteriors in two dimensions and the experiments on them (Figures 2 and 5, appendix A.5); `toy_inference.py` runs them.

    posteriors    the exact posteriors, and quadrature over z on a grid
    gradients     location-scale families of q, and the gradients of the objectives with respect to q's parameters
    descent       all runs of one experiment at once (Figure 2, A.5.3)
    ends          the numbers that say where every run ended
    mixtures      mixtures of Gaussians fitted by the Fisher divergence (Figure 5, A.5.2)
    gaussians     gradients of divergences between two univariate Gaussians (A.5.1)
"""
