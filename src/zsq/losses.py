"""One pure function an equation of the paper."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.errors import InputError


def gaussian_kl(mean: Tensor, var: Tensor, target_mean: Tensor, target_var: Tensor) -> Tensor:
    r"""KL divergence of N(mean, var) from N(target_mean, target_var), summed over channels.

    .. math::
        \sum_c \frac{(\hat\mu_c-\mu_c)^2+\hat\sigma_c^2}{2\sigma_c^2} - \log\frac{\hat\sigma_c}{\sigma_c} - \frac12

    Args:
        mean, var: statistics of the synthetic batch, each [C]; var > 0.
        target_mean, target_var: what the teacher's batch norm stores, each [C]; target_var > 0.

    Returns:
        Scalar in nats: zero exactly where both pairs agree, never negative.

    Raises:
        InputError: the four tensors are not all of one shape [C].

    Source: Choi, El-Khamy, Lee, ZS-CGAN, section 2.2.

    >>> one = torch.ones(1)
    >>> gaussian_kl(3 * one, one, 0 * one, one).item()
    4.5
    """
    shapes = {tuple(t.shape) for t in (mean, var, target_mean, target_var)}
    if len(shapes) != 1 or mean.dim() != 1:
        raise InputError(f"gaussian_kl takes four tensors of one shape [C]; got {sorted(shapes)}.")
    ratio = var / target_var
    distance = (mean - target_mean).square() / target_var
    return 0.5 * (distance + ratio - torch.log(ratio) - 1).sum()


def bns_loss(moments: list[tuple[Tensor, Tensor]], target_mean: Tensor, target_var: Tensor, eps: Tensor) -> Tensor:
    """Distance of the batch's statistics from those that the teacher stores, summed over layers and channels.

    Args:
        moments: mean and biased variance of each batch-norm layer's input, each [C_l].
        target_mean, target_var: the stored statistics of all layers, concatenated, each [sum C_l].
        eps: each layer's own epsilon, one value a channel [sum C_l]; added to both variances.

    Returns:
        Scalar in nats.

    Raises:
        InputError: the channels of `moments` and targets differ.

    Source: ZS-CGAN, section 2.2, L_BNS.
    """
    mean = torch.cat([m for m, _ in moments])
    var = torch.cat([v for _, v in moments])
    return gaussian_kl(mean, var + eps, target_mean, target_var + eps)


def label_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy H(y, T(G(z, y))) of the wanted labels, averaged over the batch.

    Args:
        logits: the teacher's, [N, classes].
        labels: int64 [N].

    Returns:
        Scalar in nats; log(classes) for uniform logits.

    Source: ZS-CGAN, eq. (2), first term.
    """
    return F.cross_entropy(logits, labels)


def soft_cross_entropy(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy H(T(x), S(x)) of the student's distribution under the teacher's, averaged over the batch.

    It is the teacher's entropy, not 0, where both agree. Both logits are divided by `temperature`; the result is
    multiplied by its square, so that gradients keep their size (Hinton et al. 2015, section 2).

    Args:
        teacher_logits, student_logits: [N, classes].
        temperature: above 0; 1 is eq. (4).

    Returns:
        Scalar in nats.

    Raises:
        InputError: shapes differ or the temperature is not positive.

    Source: ZS-CGAN, eq. (4).
    """
    if teacher_logits.shape != student_logits.shape:
        raise InputError(f"teacher logits are {tuple(teacher_logits.shape)}, student's {tuple(student_logits.shape)}.")
    if temperature <= 0:
        raise InputError(f"temperature is {temperature}; it must be above 0.")
    target = F.softmax(teacher_logits / temperature, dim=1)
    return F.cross_entropy(student_logits / temperature, target) * temperature**2


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, kd_weight: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""Knowledge distillation, :math:`(1-\lambda) H(y, S(x)) + \lambda H(T(x), S(x))`.

    Args:
        student_logits, teacher_logits: [N, classes].
        labels: int64 [N]; read only where `kd_weight` < 1.
        kd_weight: lambda in [0, 1]; the paper's data-free setting is 1.
        temperature: of the second term, see `soft_cross_entropy`.

    Returns:
        Scalar in nats.

    Raises:
        InputError: lambda is outside [0, 1], or as `soft_cross_entropy`.

    Source: ZS-CGAN, eq. (3); eq. (4) at lambda = 1.
    """
    if not 0 <= kd_weight <= 1:
        raise InputError(f"kd_weight (lambda of eq. 3) is {kd_weight}; it must lie in [0, 1].")
    soft = soft_cross_entropy(teacher_logits, student_logits, temperature) if kd_weight > 0 else 0.0
    hard = F.cross_entropy(student_logits, labels) if kd_weight < 1 else 0.0
    return torch.as_tensor(kd_weight * soft + (1 - kd_weight) * hard)
