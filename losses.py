"""The losses of both stages, as pure functions: tensors in, one fp32 scalar out.

    hinge_d, hinge_g        adversarial: Eqs. 6 and 7 (stage 1), Eqs. 9 and 10 (stage 2)
    pseudo_huber            reconstruction (stage 1, Eq. 7) and consistency (stage 2, Eq. 10)
    consistency_weight      lambda(t_n) of Eq. 10

OSV, arXiv 2409.11367. The equations of the two stages differ in what is real (data, or the EMA student's
output) and in the weight of the distance, not in their form.
"""


def hinge_d(logits_real, logits_fake):
    """Discriminator: mean relu(1 - D(real)) + mean relu(1 + D(fake)). Logits of any shape; 2 if D is 0."""
    return (1 - logits_real.float()).relu().mean() + (1 + logits_fake.float()).relu().mean()


def hinge_g(logits_fake, linear=False):
    """Generator: mean relu(1 - D(fake)), as the paper prints it: no gradient where D already believes.
    linear: -mean D(fake) instead, the usual partner of the hinge."""
    logits_fake = logits_fake.float()
    return -logits_fake.mean() if linear else (1 - logits_fake).relu().mean()


def pseudo_huber(x, y, c, weight=None, whole=False):
    """d(x, y) = sqrt((x - y)^2 + c^2) - c of each element, then the mean: |x - y| far off, smooth within c.

    x, y [b ...]; weight, if given, one per clip [b]. whole: the norm of each clip's whole difference instead,
    sqrt(|x - y|^2 + c^2) - c, as the equation literally reads. That one is about sqrt(elements) times as
    large (402 for 14 frames of 320x576), which leaves nothing of an adversarial term at weight 0.1.
    """
    square = (x.float() - y.float()).square()
    if whole:
        square = square.flatten(1).sum(dim=1)                                   # b
    distance = (square + c * c).sqrt() - c
    if weight is not None:
        distance = distance * weight.float().view(-1, *[1] * (distance.ndim - 1))
    return distance.mean()


def consistency_weight(sigma_t, sigma_s, exponent=0.1):
    """(1 / (sigma_t - sigma_s)) ^ exponent for each clip [b] -> [b].

    Exponent 1 is iCT's weight (arXiv 2310.14189); on SVD's grid it gives the noise levels that one-step
    sampling starts from 1/20,000 of the weight of the last. 0.1 (AnimateLCM) keeps them within a factor 3.
    """
    return (sigma_t.float() - sigma_s.float()).pow(-exponent)
