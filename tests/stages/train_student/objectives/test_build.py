from types import SimpleNamespace

import pytest

from cache_schema import StoreReader
from stages.local_gram_flow import time_weights
from stages.train_student.config import TrainConfig
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import (
    build_heads,
    build_objectives,
    check_teacher,
    kinds_needed,
)


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
    assert TeacherLayout.of(store.settings) == TeacherLayout(
        native=False, parts=4, forward_weight=0.3
    )
    store = stored(
        tiny, tmp_path, fusion="average", forward_weight=0.3, parts=1, grid_source="native"
    )
    assert TeacherLayout.of(store.settings) == TeacherLayout(native=True, parts=1)
    flow = StoreReader(
        tiny.write_gram_flow(tmp_path, values={"parts": 2, "fusion": "gram_flow"})
    ).settings
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
        check_teacher(config, store.settings, store.name)
    check_teacher(TrainConfig(), store.settings, store.name)
    without = TrainConfig(objectives=["repa"], lgf={"directions": directions})
    check_teacher(without, store.settings, store.name)


def test_a_forward_direction_without_a_share_is_refused(tiny, tmp_path):
    store = stored(tiny, tmp_path, fusion="gram_flow", forward_weight=0.0, parts=2)
    check_teacher(TrainConfig(lgf={"directions": "averaged"}), store.settings, store.name)
    with pytest.raises(ValueError, match="direction has weight 0"):
        check_teacher(TrainConfig(lgf={"directions": "forward"}), store.settings, store.name)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"fusion": "average", "forward_weight": 0.5, "parts": 1}, "the fusion average"),
        ({"fusion": "gram_flow", "forward_weight": 1.0, "parts": 2}, "a forward share of 1,"),
        ({}, "the fusion None"),
    ],
)
def test_crossed_pairs_need_both_tracks(tiny, tmp_path, values, told):
    store = stored(tiny, tmp_path, **values)
    config = TrainConfig(lgf={"pairs": "crossed"})
    with pytest.raises(ValueError, match=rf"train.lgf.pairs=crossed .*{store.name} has {told}"):
        check_teacher(config, store.settings, store.name)
    for pairs in ("forward", "backward", "both"):
        check_teacher(TrainConfig(lgf={"pairs": pairs}), store.settings, store.name)
    without = TrainConfig(objectives=["repa"], lgf={"pairs": "crossed"})
    check_teacher(without, store.settings, store.name)


@pytest.mark.parametrize(
    ("held", "served"),
    [("forward", ("forward", "backward", "both")), ("crossed", ("crossed",)), (None, ())],
)
def test_a_stored_gram_flow_serves_the_pairs_it_was_made_for(tiny, tmp_path, held, served):
    store = StoreReader(tiny.write_gram_flow(tmp_path, values={"pairs": held}))
    for pairs in ("forward", "backward", "both", "crossed"):
        config = TrainConfig(teacher_form="gram_flow", lgf={"pairs": pairs})
        if pairs in served:
            check_teacher(config, store.settings, store.name)
            continue
        needed = "crossed" if pairs == "crossed" else "forward"
        told = rf"{store.name} .*with pairs {held}; train.lgf.pairs={pairs}.*"
        made_by = rf"cache derive gram-flow extract.gram_flow.pairs={needed}"
        with pytest.raises(ValueError, match=told + made_by):
            check_teacher(config, store.settings, store.name)
        masks_alone = TrainConfig(objectives=["mask"], lgf={"pairs": pairs})
        check_teacher(masks_alone, store.settings, store.name)


FEATURES = SimpleNamespace(arrays={"features": SimpleNamespace(shape=(9, 2, 3, 24))})


def base(patch_size_t=1):
    return SimpleNamespace(width=16, patch_size_t=patch_size_t)


def test_each_objective_has_a_head_of_its_own_width():
    config = TrainConfig(
        objectives=["lgf", "repa", "token-relation", "mask"],
        lgf={"projector_widths": (8, 7, 6)},
        repa={"projector_widths": (5, 4)},
        token_relation={"projector_widths": (9, 8, 3)},
        mask={"projector_widths": (4, 2)},
    )
    for frame_rate in (True, False):
        heads = build_heads(config, base(), FEATURES, frame_rate=frame_rate)
        found = {
            name: (head.skip.out_features, head.smooth is not None) for name, head in heads.items()
        }
        assert found == {
            "lgf": (6, frame_rate),
            "repa": (24, frame_rate),
            "token-relation": (3, False),
            "mask": (1, True),
        }
    assert len(build_heads(TrainConfig(objectives=[]), base(), None)) == 0


@pytest.mark.parametrize("patch_size_t", [1, 2])
@pytest.mark.parametrize("frame_rate", [True, False])
def test_a_head_smooths_where_its_maps_are_interpolated(patch_size_t, frame_rate):
    """CogVideoX 1.5 has a token for two latent frames: interpolated at the latent rate too."""
    config = TrainConfig(objectives=["lgf", "repa", "token-relation", "mask"])
    heads = build_heads(config, base(patch_size_t), FEATURES, frame_rate=frame_rate)
    for made in build_objectives(config):
        maps = made.num_maps(81 if frame_rate else 21, 81)
        interpolated = time_weights(maps, 81, patch_size_t=patch_size_t) is not None
        assert (heads[made.name].smooth is not None) == interpolated, made.name


def test_only_token_relations_can_have_a_learned_downsampler():
    sides = {}
    for downsampler in ("mean", "learned"):
        config = TrainConfig(
            objectives=["lgf", "repa", "token-relation", "mask"],
            token_relation={"downsampler": downsampler, "pool": 3},
        )
        heads = build_heads(config, base(), FEATURES)
        sides[downsampler] = {
            name: head.downsampler.side for name, head in heads.items() if head.downsampler
        }
    assert sides == {"mean": {}, "learned": {"token-relation": 3}}


def test_a_kernel_that_is_not_installed_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("stages.train_student.objectives.build.find_spec", lambda name: None)
    assert kinds_needed(TrainConfig()) == ("teacher",)
    with pytest.raises(ValueError, match=r"pip install triton.* train\.lgf\.kernel=torch"):
        kinds_needed(TrainConfig(lgf={"kernel": "triton"}))
