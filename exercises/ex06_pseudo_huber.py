"""Exercise 6: the distance and its weight.                               difficulty 2 of 5, about 7 lines

pseudo_huber (OSV Eqs. 7 and 10), for each element of the difference of x and y: a hyperbola that is 0 for a
difference of 0, like a parabola for differences well below c, and like |x - y| - c well above c. The square
of (d + c) has a simple form. Then the mean over all elements. x, y [b ...], any precision; the arithmetic
and the scalar returned are fp32. weight [b] multiplies each clip's distances before the mean.

consistency_weight (OSV Eq. 10): (1 / gap)^exponent, where the gap of a clip is sigma_t - sigma_s. [b],
any precision -> [b], fp32, also in the arithmetic.

exponent_within: with exponent 1 and m = 5, some levels weigh 91,000 times as much as others and the
rest stop training. Find the exponent for which the largest weight is `factor` times the smallest. sigma_t,
sigma_s [n] in any order, with at least two different gaps; factor >= 1 -> a number. Mirrors losses.py.
Read before: OSV Eqs. 7 and 10; arXiv 2310.14189, Weighting functions and Pseudo-Huber metric functions.
"""


def pseudo_huber(x, y, c, weight=None):
    raise NotImplementedError


def consistency_weight(sigma_t, sigma_s, exponent=0.1):
    raise NotImplementedError


def exponent_within(sigma_t, sigma_s, factor):
    raise NotImplementedError
