import pytest

from cache_schema import StoreReader
from stages.train_student.config import TrainConfig
from stages.train_student.objectives.build import build_heads
from stages.train_student.objectives.needs import check_layout, kinds_needed
from stages.train_student.teacher import TeacherLayout


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"objectives": []}, ()),
        ({}, ("teacher",)),
        ({"teacher_form": "gram_flow"}, ("gram_flow",)),
        ({"objectives": ["mask"]}, ("masks",)),
        ({"objectives": ["mask"], "teacher_form": "gram_flow"}, ("masks",)),
        ({"objectives": ["repa"]}, ("teacher",)),
        ({"objectives": ["lgf", "mask", "repa"]}, ("teacher", "masks")),
        ({"lgf": {"foreground_weight": 3.0}}, ("teacher", "masks")),
        (
            {"teacher_form": "gram_flow", "lgf": {"foreground_weight": 0.0}},
            ("gram_flow", "masks"),
        ),
        ({"objectives": ["repa"], "lgf": {"foreground_weight": 3.0}}, ("teacher",)),
        ({"objectives": [], "teacher_form": "gram_flow", "lgf": {"directions": "forward"}}, ()),
    ],
)
def test_only_what_an_objective_compares_is_read(changes, kinds):
    assert kinds_needed(TrainConfig(**changes)) == kinds


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objectives": ["lgf", "repa"]}, "train.objectives=repa cannot"),
        (
            {"objectives": ["repa", "token-relation"]},
            "train.objectives=repa and train.objectives=token-relation cannot",
        ),
        ({"lgf": {"directions": "forward"}}, "train.lgf.directions=forward cannot"),
        ({"lgf": {"directions": "averaged"}}, "train.lgf.directions=averaged cannot"),
    ],
)
def test_a_gram_flow_that_cannot_serve_is_refused(changes, named):
    config = TrainConfig(teacher_form="gram_flow", **changes)
    with pytest.raises(ValueError, match=rf"{named} .*train.teacher_form=features"):
        kinds_needed(config)


def stored(tiny, root, **values):
    path = tiny.write_store(root, "teacher", tiny.teacher_shapes(width=12), values=values)
    return StoreReader(path)


def test_the_layout_is_what_the_store_says(tiny, tmp_path):
    assert TeacherLayout.of(None) == TeacherLayout()
    store = stored(tiny, tmp_path, fusion="gram_flow", forward_weight=0.3, parts=4)
    assert TeacherLayout.of(store) == TeacherLayout(native=False, parts=4, forward_weight=0.3)
    store = stored(
        tiny, tmp_path, fusion="average", forward_weight=0.3, parts=1, grid_source="native"
    )
    assert TeacherLayout.of(store) == TeacherLayout(native=True, parts=1)
    flow = StoreReader(tiny.write_gram_flow(tmp_path, values={"parts": 2, "fusion": "gram_flow"}))
    assert TeacherLayout.of(flow) == TeacherLayout()


@pytest.mark.parametrize("fusion", ["average", "forward", None])
@pytest.mark.parametrize("directions", ["forward", "averaged"])
def test_directions_need_features_fused_in_gram_flow_space(tiny, tmp_path, fusion, directions):
    values = {"fusion": fusion, "forward_weight": 0.5, "parts": 1} if fusion else {}
    store = stored(tiny, tmp_path, **values)
    config = TrainConfig(lgf={"directions": directions})
    with pytest.raises(
        ValueError,
        match=rf"directions={directions} needs .*{store.name}.* fusion=gram_flow".replace(
            " fusion", ".*fusion"
        ),
    ):
        check_layout(config, TeacherLayout.of(store), store)
    check_layout(TrainConfig(), TeacherLayout.of(store), store)
    without = TrainConfig(objectives=["repa"], lgf={"directions": directions})
    check_layout(without, TeacherLayout.of(store), store)


def test_a_forward_direction_without_a_share_is_refused(tiny, tmp_path):
    store = stored(tiny, tmp_path, fusion="gram_flow", forward_weight=0.0, parts=2)
    layout = TeacherLayout.of(store)
    check_layout(TrainConfig(lgf={"directions": "averaged"}), layout, store)
    with pytest.raises(ValueError, match="has a share of 0"):
        check_layout(TrainConfig(lgf={"directions": "forward"}), layout, store)


def test_each_objective_has_a_head_of_its_own_width():
    config = TrainConfig(
        objectives=["lgf", "repa", "token-relation", "mask"],
        lgf={"projector_widths": (8, 7, 6)},
        repa={"projector_widths": (5, 4)},
        token_relation={"projector_widths": (9, 8, 3)},
        mask={"projector_widths": (4, 2)},
    )
    for frame_rate in (True, False):
        heads = build_heads(config, 16, 24, frame_rate=frame_rate)
        found = {
            name: (head.skip.out_features, head.smooth is not None) for name, head in heads.items()
        }
        assert found == {
            "lgf": (6, frame_rate),
            "repa": (24, frame_rate),
            "token-relation": (3, False),
            "mask": (1, True),
        }
    assert len(build_heads(TrainConfig(objectives=[]), 16, None)) == 0


def test_a_kernel_that_is_not_installed_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("stages.train_student.objectives.needs.find_spec", lambda name: None)
    assert kinds_needed(TrainConfig()) == ("teacher",)
    with pytest.raises(ValueError, match=r"pip install triton.* train\.lgf\.kernel=torch"):
        kinds_needed(TrainConfig(lgf={"kernel": "triton"}))
