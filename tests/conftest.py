"""Every test is small: one thread is faster than two, and repeatable."""

import torch

torch.set_num_threads(1)
