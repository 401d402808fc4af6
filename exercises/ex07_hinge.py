"""Exercise 7: two players.                                               difficulty 1 of 5, about 7 lines

hinge_d: the discriminator wants D(real) >= 1 and D(fake) <= -1. Each side costs the mean of what is missing
(a logit beyond its margin costs 0); the loss is the sum of the two sides. OSV Eqs. 6 and 9.
hinge_g: the generator wants D(fake) >= 1, with the same cost. linear=True has no margin: minus the mean.
Logits of any shape and precision -> fp32 scalars. There may be more fakes than reals. Neither function
detaches: the caller does.

still_teaches: a generator learns from a fake only if the loss has a slope at its logit. loss is a function
of logits -> scalar, the mean over them. Return for each logit whether the size of its own slope, before the
mean divided it, is at least `least`: bool, the shape of logits. Try both forms of hinge_g, and
log(1 - sigmoid(D)): which of them still teaches where D is sure, and of what is it sure there?
Mirrors losses.py. Read before: OSV Eqs. 6, 7 and 9; train_stage1.py, d_step and g_step.
"""


def hinge_d(logits_real, logits_fake):
    raise NotImplementedError


def hinge_g(logits_fake, linear=False):
    raise NotImplementedError


def still_teaches(loss, logits, least=0.01):
    raise NotImplementedError
