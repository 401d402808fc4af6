"""Variant of exercise 2: networks that predict the noise, or the data.                         3 functions

A noisy latent is x = x0 + sigma noise. x0 has the std sigma_data, noise has unit variance. The raw output F
of a network gives the estimate f = c_skip x + c_out F of x0.

noise_target: c_skip and c_out with which f = x0 if F is the noise.
data_target: c_skip and c_out with which f = x0 if F is x0 / sigma_data.
amplification: both targets have unit variance, as EDM asks, but c_out multiplies the network's error. Return
how many times |c_out| is larger than the smallest one that any target of unit variance has: first for the
noise, then for the data. At which level are the two equal, and which of the two keeps f(x, 0) = x?

sigma, sigma_data: numbers above 0 (amplification), or from 0 on (the targets). Returns two numbers.
"""


def noise_target(sigma, sigma_data):
    raise NotImplementedError                       # return c_skip, c_out


def data_target(sigma, sigma_data):
    raise NotImplementedError                       # return c_skip, c_out


def amplification(sigma, sigma_data):
    raise NotImplementedError                       # return that of the noise, that of the data
