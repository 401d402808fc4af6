"""Exercise 9: the average of the weights.                                difficulty 1 of 5, about 4 lines

The targets of stage 2 come from an exponential moving average (EMA) of the student's weights: after each
training step a share `decay` of the old average stays, and the new weights supply the rest. OSV section 4.2.

update_ema: ema and weights are {name: tensor} with the same names, in orders that may differ. Change the
tensors in ema in place, because checkpoints and CUDA graphs refer to their memory. Record no gradients,
although the weights require them.

decay_for: the decay of an average over `steps` steps. Weights that arrived k updates ago, counted 0 for the
newest, have a share of the average; the mean of k with these shares shall be `steps`. steps >= 0, a number
-> a number. Mirrors support/engine.py. Read before: OSV section 4.2; train_stage2.py, the end of the loop.
"""
import torch  # noqa: F401


def update_ema(ema, weights, decay):
    raise NotImplementedError


def decay_for(steps):
    raise NotImplementedError
