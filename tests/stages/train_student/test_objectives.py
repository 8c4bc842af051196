import torch

from stages.train_student.config import TrainConfig
from stages.train_student.objectives import build_objective
from stages.train_student.teacher import Teacher


def features(seed, channels=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 3, 5, channels, generator=generator)


ALL = torch.ones(2, 4, dtype=torch.bool)


def teacher(features_BTHWC, valid_BT=ALL):
    return Teacher(
        arrays={"features": features_BTHWC},
        valid_BT=valid_BT,
        token_grid=(3, 5),
        native_parts=None,
    )


def test_none_is_plain_fine_tuning():
    assert build_objective(TrainConfig(objectives=[])) is None


def test_loss_is_zero_when_student_equals_teacher():
    for divergence in ("kl", "l2"):
        objective = build_objective(TrainConfig(lgf={"radius": 1, "divergence": divergence}))
        assert float(objective(features(0), teacher(features(0)))) < 1e-9
        assert float(objective(features(0), teacher(features(1)))) > 1e-3


def test_widths_may_differ_and_gradient_flows_to_the_student_alone():
    objective = build_objective(TrainConfig(lgf={"radius": 1}))
    student, taught = features(0).requires_grad_(), features(1, channels=9).requires_grad_()
    objective(student, teacher(taught)).backward()
    assert student.grad.abs().sum() > 0
    assert taught.grad is None


def test_half_precision_features_are_compared_in_float32():
    objective = build_objective(TrainConfig(lgf={"radius": 1}))
    loss = objective(features(0).bfloat16(), teacher(features(1).half()))
    assert loss.dtype == torch.float32


def test_a_pair_counts_where_both_maps_are_valid():
    """Clip 0 keeps maps 0, 1 and 3: one pair. Clip 1 keeps all."""
    objective = build_objective(TrainConfig(lgf={"radius": 1}))
    valid_BT = torch.tensor([[True, True, False, True], [True, True, True, True]])
    student, taught = features(0), features(1)
    first = objective(student[:1, :2], teacher(taught[:1, :2], ALL[:1, :2]))
    second = objective(student[1:], teacher(taught[1:], ALL[1:]))
    found = objective(student, teacher(taught, valid_BT))
    torch.testing.assert_close(found, (first + second) / 2)


def test_a_single_valid_map_makes_no_pair():
    objective = build_objective(TrainConfig(lgf={"radius": 1}))
    valid_BT = torch.zeros(2, 4, dtype=torch.bool)
    valid_BT[:, 2] = True
    student = features(0).requires_grad_()
    loss = objective(student, teacher(features(1), valid_BT))
    loss.backward()
    assert loss.item() == 0.0
    assert not student.grad.any()
