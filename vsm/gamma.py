"""The closed-form gamma of a learning objective, in place of Adam's steps (`--gamma stationary`)."""

import torch

from objectives import LEARN

DECAY = 0.99  # of the means over minibatches: noise of some percent in a minibatch becomes some tenths of a percent
LARGEST_MOVE = 1.0  # of log gamma in one update
MODES = ("learned", "stationary", "fixed")
GAMMA_HELP = ("the variance of p(x|z): learned by Adam, set to the stationary value of the decoder's loss after each of its "
              "updates, or fixed at the square of --init-sd")


class StationaryGamma:
    """Moves log gamma, [] or [S], to where the derivative of a learning objective by it vanishes, with q and z held.

    That gamma is the ratio of two exponential means over minibatches, of the statistics that the objective's entry gives. Where
    one of them is not positive the loss has no stationary gamma, and log gamma keeps its value. It moves by LARGEST_MOVE at most,
    because the denominators of `bao` and `dsm` can be near 0. `tensors` is the state that a checkpoint needs. dim_x: D, the
    number of pixels or coordinates. The objective's entry must have a closed form, and its loss no constant besides.
    """

    def __init__(self, learn, log_gamma, dim_x):
        self.statistics, self.log_gamma, self.dim_x = LEARN[learn].gamma, log_gamma, dim_x
        self.means = torch.zeros(2, *log_gamma.shape, device=log_gamma.device)  # from 0 both: the ratio needs no correction
        self.tensors = {"gamma_means": self.means}

    @torch.no_grad()
    def update(self, loss, slope):
        """One minibatch's mean loss and d loss / d log gamma, [] or [S]. It never waits for the device."""
        statistics = self.statistics(loss, slope, self.log_gamma.exp(), self.dim_x)
        self.means.lerp_(torch.stack(statistics), 1 - DECAY)
        move = (self.means[0] / self.means[1]).log() - self.log_gamma
        move.clamp_(-LARGEST_MOVE, LARGEST_MOVE)
        self.log_gamma += torch.where((self.means > 0).all(0), move, 0)
