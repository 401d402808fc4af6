"""Exercise 6: the distance and its weight.                   difficulty 2 of 5, 20 minutes, about 6 lines

    d(x, y) = sqrt((x - y)^2 + c^2) - c         OSV Eqs. 7 and 10; of each element, then the mean
    lambda = (1 / (sigma_t - sigma_s))^exponent                 of each clip [b] -> [b]

x, y [b ...], any precision; the arithmetic and the scalar returned are fp32. weight [b] multiplies each
clip's distance before the mean. Mirrors losses.py.
"""


def pseudo_huber(x, y, c, weight=None):
    raise NotImplementedError


def consistency_weight(sigma_t, sigma_s, exponent=0.1):
    raise NotImplementedError
