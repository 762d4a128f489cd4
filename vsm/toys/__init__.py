"""Toy posteriors in two dimensions and the experiments on them (Figures 2 and 5, appendix A.5); `toy_inference.py` runs them."""
