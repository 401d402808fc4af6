"""Exercise 9: the average of the weights.                    difficulty 1 of 5, 10 minutes, about 2 lines

    theta^- <- decay theta^- + (1 - decay) theta                OSV section 4.2

The targets of stage 2 come from the moving average of the student's weights. ema and weights are
{name: tensor} with the same names, not necessarily in the same order. In place: change the tensors in ema,
make no new ones, and record no gradients, although the weights require them. Mirrors support/engine.py.
"""
import torch  # noqa: F401


def update_ema(ema, weights, decay):
    raise NotImplementedError
