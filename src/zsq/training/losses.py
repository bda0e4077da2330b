"""One pure function an equation of the paper."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.errors import InputError
from zsq.runtime import distributed

SMALLEST_VARIANCE = 1e-12
"""Stands for the variance of a layer whose output is constant."""


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


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    r"""KL divergence of the student's distribution from the teacher's, averaged over the batch.

    .. math::
        \frac1N \sum_j \sum_c p_{jc} \log\frac{p_{jc}}{q_{jc}}, \quad p = softmax(T(x)), q = softmax(S(x))

    Args:
        teacher_logits, student_logits: [N, classes].

    Returns:
        Scalar in nats, float64: exactly 0 for equal logits, and small values are not lost in rounding.

    Raises:
        InputError: shapes differ.

    Source: Cai et al. 2020, ZeroQ, section 3.2, the sensitivity of a layer.
    """
    if teacher_logits.shape != student_logits.shape:
        raise InputError(f"teacher logits are {tuple(teacher_logits.shape)}, student's {tuple(student_logits.shape)}.")
    target, answer = (F.log_softmax(logits.double(), dim=1) for logits in (teacher_logits, student_logits))
    return F.kl_div(answer, target, reduction="batchmean", log_target=True)


def intermediate_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    r"""Squared distance of layer outputs in units of the teacher's variance, averaged over elements, then over layers.

    .. math::
        \frac1L \sum_l \frac{mean\,(s_l - t_l)^2}{mean\,(t_l - mean\,t_l)^2}

    Args:
        student, teacher: outputs of the same layers, in pairs of one shape; gradients flow to the student's. Where
            processes share a batch, each gives those of its images, and means are over all.

    Returns:
        Scalar without unit: 0 where all agree, 1 where each student's output is its teacher's mean.

    Raises:
        InputError: no layer, or another number of them.

    Source: after Haroush et al. 2020, The Knowledge Within, fine-tuning; see the method's page for what is not certain.
    """
    if not teacher or len(student) != len(teacher):
        raise InputError(f"{len(student)} layer outputs of the student and {len(teacher)} of the teacher do not pair.")
    terms = []
    for s, t in zip(student, teacher, strict=True):
        zero = torch.zeros(1, device=t.device)
        distance, _ = distributed.pooled(F.mse_loss(s, t).view(1), zero, t.numel())
        variance = t.var(correction=0).view(1)
        if distributed.size() > 1:
            _, variance = distributed.pooled(t.mean().view(1), variance, t.numel())
        terms.append(distance / variance.clamp(min=SMALLEST_VARIANCE))
    return torch.cat(terms).mean()


def instance_entropy(logits: Tensor) -> Tensor:
    r"""Entropy of each image's class distribution, averaged over the batch, :math:`E[H(T(G(z)))]`.

    Args:
        logits: [N, classes].

    Returns:
        Scalar in nats: 0 where every answer is certain, log(classes) where all are uniform.

    Source: Choi et al. 2020 (adversarial knowledge distillation), instance categorical entropy.

    >>> round(instance_entropy(torch.zeros(3, 7)).item(), 4)  # log 7
    1.9459
    """
    log = F.log_softmax(logits, dim=1)
    return -(log.exp() * log).sum(1).mean()


def batch_entropy(logits: Tensor) -> Tensor:
    r"""Entropy of the batch's mean class distribution, :math:`H(E[T(G(z))])`.

    Args:
        logits: [N, classes].

    Returns:
        Scalar in nats: log(classes) where all classes are answered equally often, 0 where one class alone is.

    Source: Choi et al. 2020 (adversarial knowledge distillation), batch categorical entropy.
    """
    log = torch.logsumexp(F.log_softmax(logits, dim=1), dim=0) - math.log(len(logits))
    return -(log.exp() * log).sum()


def reversed_bns_loss(
    moments: list[tuple[Tensor, Tensor]], target_mean: Tensor, target_var: Tensor, eps: Tensor
) -> Tensor:
    r"""KL divergence of the stored Gaussians from the batch's, summed over layers and channels.

    .. math:: \sum_c \log\frac{\hat\sigma_c}{\sigma_c}
        - \frac12\left(1 - \frac{\sigma_c^2+(\hat\mu_c-\mu_c)^2}{\hat\sigma_c^2}\right)

    The direction is the reverse of `bns_loss`. Arguments and errors are those of `bns_loss`.

    Returns:
        Scalar in nats.

    Source: Haroush, Hubara, Hoffer, Soudry, The Knowledge Within, section 3, BN-Statistics scheme.
    """
    mean = torch.cat([m for m, _ in moments])
    var = torch.cat([v for _, v in moments])
    return gaussian_kl(target_mean, target_var + eps, mean, var + eps)


def squared_bns_distance(
    moments: list[tuple[Tensor, Tensor]], target_mean: Tensor, target_var: Tensor, eps: Tensor
) -> Tensor:
    """Squared distances of means and of standard deviations from the stored ones, summed over layers and channels.

    Arguments are those of `bns_loss`; epsilon is added to both variances before the root.

    Returns:
        Scalar, in squared units of the layers' inputs.

    Raises:
        InputError: the channels of `moments` and targets differ.

    Source: Cai et al., ZeroQ, eq. (3).
    """
    mean = torch.cat([m for m, _ in moments])
    var = torch.cat([v for _, v in moments])
    _require_channels(mean, target_mean)
    deviation = torch.sqrt(var + eps) - torch.sqrt(target_var + eps)
    return (mean - target_mean).square().sum() + deviation.square().sum()


def feature_norm(moments: list[tuple[Tensor, Tensor]], target_mean: Tensor, target_var: Tensor) -> Tensor:
    r"""Distances of means and of variances from the stored ones, Euclidean in each layer, summed over layers.

    .. math:: \sum_l \|\hat\mu_l-\mu_l\|_2 + \|\hat\sigma^2_l-\sigma^2_l\|_2

    Args:
        moments: mean and biased variance of each batch-norm layer's input, each [C_l].
        target_mean, target_var: the stored statistics of all layers, concatenated, each [sum C_l].

    Returns:
        Scalar; the norms are not squared.

    Raises:
        InputError: the channels of `moments` and targets differ.

    Source: Yin et al., DeepInversion, eq. (4), R_feature.
    """
    _require_channels(torch.cat([m for m, _ in moments]), target_mean)
    sizes = [len(mean) for mean, _ in moments]
    layers = zip(moments, target_mean.split(sizes), target_var.split(sizes), strict=True)
    norms = [torch.stack([(m - wanted_m).norm(), (v - wanted_v).norm()]) for (m, v), wanted_m, wanted_v in layers]
    return torch.stack(norms).sum()


def _require_channels(found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise InputError(f"the batch has statistics of {len(found)} channels, the target of {len(wanted)}.")


def total_variation(images: Tensor) -> Tensor:
    """Euclidean norm, over the whole batch, of the differences between neighbours, summed over directions.

    In images the directions are down, right and both diagonals, elsewhere those of the axes.

    Args:
        images: [N, C, ...].

    Returns:
        Scalar in units of the pixels; 0 for flat images.

    Source: Yin et al., DeepInversion, R_TV; the directions and the norm as their published program takes them.
    """
    if images.dim() != 4:
        return torch.stack([images.diff(dim=dim).norm() for dim in range(2, images.dim())]).sum()
    left, right, above, below = (
        images[..., :-1],
        images[..., 1:],
        images[..., :-1, :],
        images[..., 1:, :],
    )
    differences = (
        right - left,
        below - above,
        below[..., 1:] - above[..., :-1],
        below[..., :-1] - above[..., 1:],
    )
    return torch.stack([difference.norm() for difference in differences]).sum()


def image_norm(images: Tensor) -> Tensor:
    """Euclidean norm of each image [C, ...], averaged over the batch [N, C, ...].

    Source: Yin et al., DeepInversion, R_l2.
    """
    norms: Tensor = images.flatten(1).norm(dim=1)
    return norms.mean()


def competition(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """One minus the Jensen-Shannon divergence of the teacher's and the student's distribution, batch average.

    Args:
        teacher_logits, student_logits: [N, classes].

    Returns:
        Scalar from 1 - log 2, where the two exclude each other, to 1, where they agree; JS is in nats.

    Raises:
        InputError: shapes differ.

    Source: Yin et al., Adaptive DeepInversion, R_compete.
    """
    if teacher_logits.shape != student_logits.shape:
        raise InputError(f"teacher logits are {tuple(teacher_logits.shape)}, student's {tuple(student_logits.shape)}.")
    teacher, student = F.log_softmax(teacher_logits, dim=1), F.log_softmax(student_logits, dim=1)
    middle = torch.logaddexp(teacher, student) - math.log(2)
    divergences = [F.kl_div(middle, one, reduction="batchmean", log_target=True) for one in (teacher, student)]
    return 1 - 0.5 * (divergences[0] + divergences[1])


def smoothness(images: Tensor) -> Tensor:
    """Mean squared difference between images [N, C, ...] and themselves blurred by a binomial kernel of 3.

    Returns:
        Scalar in squared units of the pixels; 0 for flat images.

    Source: a smoothness prior as Haroush et al. ask for beside the labels; this form is ours.
    """
    return (images - blurred(images)).square().mean()


class _Blur(torch.autograd.Function):
    """`blurred`, whose matrix is symmetric: the gradient is blurred as the images are."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return _blurred_along_all(images)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _blurred_along_all(grad)


def _blurred_along_all(x: Tensor) -> Tensor:
    for dim in range(2, x.dim()):
        x = _blurred_along(x, dim)
    return x


def _blurred_along(x: Tensor, dim: int) -> Tensor:
    """Return (1/4, 1/2, 1/4) times each value and its neighbours, edges repeated."""
    last = x.shape[dim] - 1
    y = x / 2
    y.narrow(dim, 1, last).add_(x.narrow(dim, 0, last), alpha=0.25)
    y.narrow(dim, 0, last).add_(x.narrow(dim, 1, last), alpha=0.25)
    for edge in (0, last):
        y.select(dim, edge).add_(x.select(dim, edge), alpha=0.25)
    return y


def blurred(images: Tensor) -> Tensor:
    """Blur images [N, C, ...] by the binomial kernel of 3, edges repeated; a pattern of period 2 vanishes.

    A depthwise convolution took two to six times as long (8x3x224x224 with gradient, one core).
    """
    blurred_images: Tensor = _Blur.apply(images)  # type: ignore[no-untyped-call]
    return blurred_images
