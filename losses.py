"""The losses of both stages and the weight of the distance, as pure functions of tensors, in fp32.

    hinge_d, hinge_g        adversarial: Eqs. 6 and 7 (stage 1), Eqs. 9 and 10 (stage 2)
    pseudo_huber            reconstruction (stage 1, Eq. 7) and consistency (stage 2, Eq. 10)
    consistency_weight      lambda(t_n) of Eq. 10

OSV, arXiv 2409.11367. The two stages use the same equations. They differ in target and real clips (data, or
outputs of the EMA student) and in the weight of the distance.
"""


def hinge_d(logits_real, logits_fake):
    """The discriminator's loss: mean relu(1 - D(real)) + mean relu(1 + D(fake)). Eqs. 6 and 9. Logits of any
    shape; the loss is 2 if all logits are 0."""
    return (1 - logits_real.float()).relu().mean() + (1 + logits_fake.float()).relu().mean()


def hinge_g(logits_fake, linear=False):
    """The generator's adversarial loss: mean relu(1 - D(fake)), as Eqs. 7 and 10 print it. Its gradient is 0
    where D(fake) > 1. linear: -mean D(fake) instead, the usual partner of hinge_d. Logits of any shape."""
    logits_fake = logits_fake.float()
    return -logits_fake.mean() if linear else (1 - logits_fake).relu().mean()


def pseudo_huber(x, y, c, weight=None):
    """The mean over all elements of sqrt((x - y)^2 + c^2) - c. This is the d(x, y) of Eqs. 7 and 10,
    taken element by element: about |x - y| for differences above c, and quadratic below.

    x, y [b ...]; weight [b] multiplies the distance of each clip. The equation as printed takes the norm of
    a whole clip's difference instead. That is about sqrt(number of elements) times as large (402 times for 14
    frames of 320x576), and an adversarial term of weight 0.1 would have no influence beside it.
    """
    distance = ((x.float() - y.float()).square() + c * c).sqrt() - c
    if weight is not None:
        distance = distance * weight.float().view(-1, *[1] * (distance.ndim - 1))       # b 1 ..
    return distance.mean()


def consistency_weight(sigma_t, sigma_s, exponent=0.1):
    """The weight lambda(t_n) of Eq. 10, (1 / (sigma_t - sigma_s)) ^ exponent, of each clip: [b], [b] -> [b].

    Exponent 1 is iCT's weight (arXiv 2310.14189). On SVD's grid with m = 5, the highest noise levels, where
    one-step sampling starts, then have 1/91,000 of the weight of the lowest one. 0.1 (AnimateLCM) keeps all
    weights within a factor of 3.2.
    """
    return (sigma_t.float() - sigma_s.float()).pow(-exponent)
