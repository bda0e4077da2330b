import math

import pytest
import torch
from torch import Tensor

from zsq.errors import InputError
from zsq.training.losses import (
    batch_entropy,
    blurred,
    bns_loss,
    distillation_loss,
    gaussian_kl,
    instance_entropy,
    intermediate_loss,
    kl_divergence,
    label_cross_entropy,
    soft_cross_entropy,
)

LOGITS = torch.tensor([[math.log(2.0), 0.0], [0.0, math.log(3.0)]])  # probabilities 2/3, 1/3 and 1/4, 3/4
OTHERS = torch.tensor([[0.0, math.log(4.0)], [math.log(1.5), 0.0]])  # probabilities 1/5, 4/5 and 3/5, 2/5


def vectors(*values: float | list[float]) -> list[Tensor]:
    return [torch.tensor(v if isinstance(v, list) else [v], dtype=torch.float64) for v in values]


@pytest.mark.parametrize(
    ("mean", "var", "target_mean", "target_var", "nats"),
    [
        (0.0, 1.0, 0.0, 1.0, 0.0),  # the same distribution
        (3.0, 1.0, 0.0, 1.0, 4.5),  # means apart by d: d^2 / 2
        (3.0, 4.0, 1.0, 4.0, 0.5),  # in units of the target's deviation
        (0.0, 4.0, 0.0, 1.0, 1.5 - math.log(2)),  # twice the deviation; the swapped KL would give 0.318
        (0.0, 1.0, 0.0, 4.0, math.log(2) - 0.375),  # half of it; the swapped KL would give 0.807
        (2.0, 1.0, 0.0, 4.0, 0.5 * (1 + 0.25 + math.log(4) - 1)),  # the distance is over the target's variance
        ([3.0, 0.0], [1.0, 4.0], [0.0, 0.0], [1.0, 1.0], 6.0 - math.log(2)),  # summed, not averaged, over channels
    ],
)
def test_gaussian_kl_in_closed_form(
    mean: float, var: float, target_mean: float, target_var: float, nats: float
) -> None:
    assert gaussian_kl(*vectors(mean, var, target_mean, target_var)).item() == pytest.approx(nats, abs=1e-12)


def test_gaussian_kl_agrees_with_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, target_mean = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    var, target_var = torch.rand(2, 20, generator=generator, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, var.sqrt()), normal(target_mean, target_var.sqrt())).sum()
    assert gaussian_kl(mean, var, target_mean, target_var).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert gaussian_kl(mean, var, mean, var).item() == pytest.approx(0, abs=1e-12)


def test_gaussian_kl_gradients() -> None:
    arguments = [t.requires_grad_() for t in vectors([0.3, -1.0], [0.5, 2.0], [0.0, 0.4], [1.5, 0.7])]
    assert torch.autograd.gradcheck(gaussian_kl, arguments)


def test_gaussian_kl_refuses_other_shapes() -> None:
    three, two = torch.ones(3), torch.ones(2)
    with pytest.raises(InputError, match=r"four tensors of one shape \[C\]; got \[\(2,\), \(3,\)\]"):
        gaussian_kl(three, three, three, two)
    with pytest.raises(InputError, match=r"got \[\(3, 1\)\]"):
        gaussian_kl(*[torch.ones(3, 1)] * 4)


def test_bns_loss_adds_each_layers_eps_to_both_variances() -> None:
    mean, var, target_mean, target_var = vectors(2.0, 1.0, 0.0, 0.5)
    eps = torch.tensor([0.5], dtype=torch.float64)
    # 4 / (2 * 1) + 1.5 / (2 * 1) - log(sqrt(1.5)) - 1/2; eps on the target only would give 2 + 0.5 - 0 - 0.5 = 2.0,
    # and no eps 4 + 1 - log(sqrt(2)) - 0.5
    nats = 2 + 0.75 - 0.5 * math.log(1.5) - 0.5
    assert bns_loss([(mean, var)], target_mean, target_var, eps).item() == pytest.approx(nats, abs=1e-12)
    assert bns_loss([(target_mean, target_var)], target_mean, target_var, eps).item() == pytest.approx(0, abs=1e-12)


def test_bns_loss_sums_layers_and_channels() -> None:
    layers = [tuple(vectors([3.0, 0.0], [1.0, 1.0])), tuple(vectors(1.0, 1.0))]
    target_mean, target_var, eps = torch.zeros(3), torch.ones(3), torch.zeros(3)
    loss = bns_loss(layers, target_mean.double(), target_var.double(), eps.double())
    assert loss.item() == pytest.approx(4.5 + 0 + 0.5)  # a mean over layers would give 2.5, one over channels 1.67


def test_bns_loss_refuses_missing_channels() -> None:
    with pytest.raises(InputError, match=r"got \[\(2,\), \(3,\)\]"):
        bns_loss([(torch.ones(2), torch.ones(2))], torch.ones(3), torch.ones(3), torch.tensor(0.0))


def test_label_cross_entropy() -> None:
    uniform = torch.zeros(4, 7)
    assert label_cross_entropy(uniform, torch.arange(4)).item() == pytest.approx(math.log(7))
    mean = (math.log(3) - math.log(2) + math.log(4)) / 2  # a sum would give twice that
    assert label_cross_entropy(LOGITS, torch.tensor([0, 0])).item() == pytest.approx(mean)


def test_soft_cross_entropy_in_closed_form() -> None:
    first = -(2 / 3) * math.log(1 / 5) - (1 / 3) * math.log(4 / 5)
    second = -(1 / 4) * math.log(3 / 5) - (3 / 4) * math.log(2 / 5)
    swapped = -(1 / 5) * math.log(2 / 3) - (4 / 5) * math.log(1 / 3)
    loss = soft_cross_entropy(LOGITS, OTHERS).item()
    assert loss == pytest.approx((first + second) / 2)
    assert abs(first - swapped) > 0.1


def test_soft_cross_entropy_is_the_entropy_at_equality() -> None:
    entropy = torch.distributions.Categorical(logits=LOGITS).entropy().mean().item()
    assert entropy > 0.5
    assert soft_cross_entropy(LOGITS, LOGITS).item() == pytest.approx(entropy)
    assert soft_cross_entropy(LOGITS, OTHERS).item() > entropy


def test_temperature_divides_both_logits_and_multiplies_by_its_square() -> None:
    loss = soft_cross_entropy(2 * LOGITS, 2 * OTHERS, 2.0).item()
    assert loss == pytest.approx(4 * soft_cross_entropy(LOGITS, OTHERS).item())


def test_temperature_keeps_the_size_of_gradients() -> None:
    def gradient(temperature: float) -> Tensor:
        student = (1e-2 * OTHERS).requires_grad_()
        soft_cross_entropy(1e-2 * LOGITS, student, temperature).backward()
        return student.grad

    torch.testing.assert_close(gradient(10.0), gradient(1.0), rtol=0.05, atol=0)  # without the square: a 100th


def test_soft_cross_entropy_refuses() -> None:
    with pytest.raises(InputError, match=r"teacher logits are \(2, 2\), student's \(2, 1\)"):
        soft_cross_entropy(LOGITS, OTHERS[:, :1])
    with pytest.raises(InputError, match="temperature is 0; it must be above 0"):
        soft_cross_entropy(LOGITS, OTHERS, 0)


@pytest.mark.parametrize("kd_weight", [0.0, 0.25, 0.5, 1.0])
def test_distillation_loss_mixes_by_lambda(kd_weight: float) -> None:
    labels = torch.tensor([0, 0])
    hard = -(math.log(1 / 5) + math.log(3 / 5)) / 2
    soft = 9 * soft_cross_entropy(LOGITS / 3, OTHERS / 3).item()
    loss = distillation_loss(OTHERS, LOGITS, labels, kd_weight=kd_weight, temperature=3.0)
    assert loss.item() == pytest.approx((1 - kd_weight) * hard + kd_weight * soft)


def test_distillation_loss_is_equation_four_by_default() -> None:
    nonsense = torch.tensor([99, -7])  # labels are not even read
    loss = distillation_loss(OTHERS, LOGITS, nonsense)
    assert loss.item() == pytest.approx(soft_cross_entropy(LOGITS, OTHERS).item())


def test_distillation_loss_gradients() -> None:
    teacher, labels = LOGITS.double(), torch.tensor([1, 0])
    student = OTHERS.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, teacher, labels, kd_weight=0.3, temperature=2.0), student
    )
    distillation_loss(student, teacher, labels).backward()
    wanted = (student.detach().softmax(1) - teacher.softmax(1)) / len(teacher)
    torch.testing.assert_close(student.grad, wanted)


@pytest.mark.parametrize("kd_weight", [-0.1, 1.5])
def test_distillation_loss_refuses_other_lambdas(kd_weight: float) -> None:
    with pytest.raises(InputError, match=rf"lambda of eq. 3\) is {kd_weight}; it must lie in \[0, 1\]"):
        distillation_loss(OTHERS, LOGITS, torch.tensor([0, 0]), kd_weight=kd_weight)


def test_kl_divergence_in_closed_form() -> None:
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    student = torch.zeros(2, 2)
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # of two images, the second agrees; swapped: 0.1438 / 2
    assert kl_divergence(teacher, student).item() == pytest.approx(one / 2, rel=1e-6)
    assert kl_divergence(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3) / 2, rel=1e-6)
    assert kl_divergence(teacher, teacher).item() == 0.0
    nearly = teacher + torch.tensor([1e-4, 0.0])
    assert kl_divergence(teacher, nearly).item() == pytest.approx((3 / 16 + 1 / 4) / 2 * 1e-8 / 2, rel=0.01)
    with pytest.raises(InputError, match=r"\(2, 2\), student's \(1, 2\)"):
        kl_divergence(teacher, student[:1])


def test_intermediate_loss_in_closed_form() -> None:
    first = torch.tensor([[5.0, 7.0], [9.0, 7.0]])  # variance 2 (unbiased: 8/3; mean square: 51), 4 values
    second = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])  # variance 1, 6 values
    teacher = [first, second]
    student = [first + 1, second + torch.tensor([3.0, 0, 0, 0, 0, 0])]
    assert intermediate_loss(student, teacher).item() == pytest.approx((1 / 2 + 9 / 6) / 2)
    assert intermediate_loss(teacher, teacher).item() == 0.0
    assert intermediate_loss([torch.full_like(t, float(t.mean())) for t in teacher], teacher).item() == 1.0
    constant = torch.ones(2, 2)
    assert intermediate_loss([constant], [constant]).item() == 0.0


def test_intermediate_loss_gradients() -> None:
    teacher = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()]
    student = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: intermediate_loss([s], teacher), [student])


@pytest.mark.parametrize("count", [0, 2])
def test_intermediate_loss_refuses_what_does_not_pair(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} layer outputs of the student and {count // 2} of the teacher"):
        intermediate_loss([torch.ones(2)] * count, [torch.ones(2)] * (count // 2))


def test_kl_divergence_gradients_reach_both() -> None:
    arguments = [logits.double().requires_grad_() for logits in (LOGITS, OTHERS)]
    assert torch.autograd.gradcheck(kl_divergence, arguments)


def test_entropies_in_closed_form() -> None:
    uniform, certain = torch.zeros(5, 7), torch.eye(4) * 1e4
    assert instance_entropy(uniform).item() == pytest.approx(math.log(7))
    assert batch_entropy(uniform).item() == pytest.approx(math.log(7))
    assert instance_entropy(certain).item() == 0
    assert batch_entropy(certain).item() == pytest.approx(math.log(4))  # each image sure of another class
    assert batch_entropy(certain[:1].expand(3, 4)).item() == pytest.approx(0, abs=1e-6)
    mixed = torch.log(torch.tensor([[0.5, 0.5], [1.0, 1e-9]]))
    assert instance_entropy(mixed).item() == pytest.approx(math.log(2) / 2, abs=1e-6)  # a sum would give log 2
    wanted = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)  # of the mean probabilities; of mean logits: 4.7e-4
    assert batch_entropy(mixed).item() == pytest.approx(wanted, abs=1e-6)


def test_entropies_have_gradients_where_a_class_never_appears() -> None:
    for entropy in (instance_entropy, batch_entropy):
        assert torch.autograd.gradcheck(entropy, LOGITS.double().requires_grad_())
        logits = (torch.eye(2, 3) * 1e4).requires_grad_()
        entropy(logits).backward()
        assert torch.isfinite(logits.grad).all()


def test_a_blur_keeps_what_is_flat_and_takes_out_period_two() -> None:
    flat = torch.full((1, 2, 6, 6), 3.0)
    torch.testing.assert_close(blurred(flat), flat)
    stripes = torch.tensor([1.0, -1.0]).repeat(3).expand(1, 1, 6, 6)
    assert blurred(stripes)[..., 1:-1].abs().max() < 1e-6
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 16
    assert blurred(point)[0, 0, 1:4, 1:4].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    corner = torch.zeros(1, 1, 5, 5)
    corner[0, 0, 0, 4] = 16
    assert blurred(corner)[0, 0, :2, 3:].tolist() == [[3, 9], [1, 3]]  # edges repeated
    assert torch.autograd.gradcheck(blurred, torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True))
