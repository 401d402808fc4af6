"""Exercise 7: two players.                                   difficulty 1 of 5, 15 minutes, about 4 lines

    discriminator    mean relu(1 - D(real)) + mean relu(1 + D(fake))            OSV Eqs. 6 and 9
    generator        mean relu(1 - D(fake)); linear=True: -mean D(fake)         OSV Eqs. 7 and 10

Logits of any shape and precision -> fp32 scalars. There may be more fakes than reals: each mean is its own.
Neither function detaches: that is the training loop's business. Mirrors losses.py.
"""


def hinge_d(logits_real, logits_fake):
    raise NotImplementedError


def hinge_g(logits_fake, linear=False):
    raise NotImplementedError
