import pytest

from stages.train_student.config import DeepSpeedConfig, OptimizerConfig, TrainConfig
from stages.train_student.engine import check_engine_settings
from stages.train_student.optimizers import learning_rate_factor


def test_warm_up_is_linear_and_ends_at_the_peak():
    config = OptimizerConfig(warmup_steps=4)
    factors = [learning_rate_factor(step, config, 10) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate_factor(0, OptimizerConfig(warmup_steps=0), 10) == 1.0


def test_cosine_falls_to_zero_over_the_remaining_steps():
    config = OptimizerConfig(warmup_steps=2, schedule="cosine")
    factors = [learning_rate_factor(step, config, 12) for step in range(2, 13)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("deepspeed", "told"),
    [
        ({"zero_stage": 0, "precision": "bf16"}, "zero_stage 0 keeps no float32 copy"),
        ({"zero_stage": 0, "precision": "fp32", "offload_optimizer": "cpu"}, "offload_optimizer"),
    ],
)
def test_combinations_no_engine_can_do_are_refused(deepspeed, told):
    config = TrainConfig(deepspeed=DeepSpeedConfig(**deepspeed))
    with pytest.raises(ValueError, match=told):
        check_engine_settings(config, 1)
