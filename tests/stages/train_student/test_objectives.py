import torch

from stages.train_student.config import ObjectiveConfig
from stages.train_student.objectives import build_objective


def features(seed, channels=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 3, 5, channels, generator=generator)


def test_none_is_plain_fine_tuning():
    assert build_objective(ObjectiveConfig(name="none")) is None


def test_loss_is_zero_when_student_equals_teacher():
    for divergence in ("kl", "l2"):
        objective = build_objective(ObjectiveConfig(radius=1, divergence=divergence))
        assert float(objective(features(0), features(0))) < 1e-9
        assert float(objective(features(0), features(1))) > 1e-3


def test_widths_may_differ_and_gradient_flows_to_the_student_alone():
    objective = build_objective(ObjectiveConfig(radius=1))
    student, teacher = features(0).requires_grad_(), features(1, channels=9).requires_grad_()
    objective(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_half_precision_features_are_compared_in_float32():
    objective = build_objective(ObjectiveConfig(radius=1))
    loss = objective(features(0).bfloat16(), features(1).half())
    assert loss.dtype == torch.float32
