"""Variant of exercise 9: an average that grows with the training.                              2 functions

An EMA of constant decay has a mean age in steps. A power-function average has a mean age that is always the
same share of the training so far, and forgets the first weights. Its decay in step n, counted from 1, is
(1 - 1 / n)^(gamma + 1), and after n steps the weights of step k have a share in proportion to about k^gamma.
arXiv 2312.02696, the section on the power function EMA profile; Eq. 127 is the decay.

power_decay: the decay of a step. step: an integer from 1 on; gamma >= 0 -> a number.
gamma_for: the gamma with which the mean age of the weights is `share` of the training time, for a long
training. share: above 0, at most 1/2 -> a number. What is the average for 1/2?
"""


def power_decay(step, gamma):
    raise NotImplementedError


def gamma_for(share):
    raise NotImplementedError
