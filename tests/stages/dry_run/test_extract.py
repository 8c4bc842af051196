"""Estimates of extraction against what the run then does."""

import json
from collections import Counter
from pathlib import Path

import av
import pytest

from cache_schema import StoreReader
from stages.clips import ClipsConfig, encode_video, open_dataset
from stages.config import BaseModelConfig
from stages.dry_run import extract as module
from stages.dry_run.extract import estimate
from stages.dry_run.extract_costs import tracker_cost
from stages.dry_run.extract_stores import planned_passes
from stages.dry_run.survey import survey_shards
from stages.extract_features.config import GroundingConfig, TeacherConfig
from stages.extract_features.run import extract_features
from stages.progress import SilentProgress

BOX = [10, 16, 46, 48]


@pytest.fixture(autouse=True)
def a_known_rate(monkeypatch):
    """Measuring takes time and differs."""
    monkeypatch.setattr(module, "matmul_flops_per_second", lambda device, dtype: 1e9)


@pytest.fixture(scope="module", autouse=True)
def each_cost_once():
    """Of equal settings; running a tracker on shapes takes seconds."""
    known = {}

    def cost(config, clips, sam2_config):
        asked = (config.model_dump_json(), clips.num_frames, clips.token_grid, sam2_config)
        if asked not in known:
            known[asked] = tracker_cost(config, clips, sam2_config)
        return known[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.dry_run.extract_stores.tracker_cost", cost)
        yield


def look(config, clips, model, cache, **options):
    return estimate(config, clips, model, cache, progress=SilentProgress(), **options)


def survey(config, clips, **options):
    shards = open_dataset(clips).shards
    return survey_shards(shards, config, clips, SilentProgress(), **options)[None]


def by_kind(found):
    return {kind.kind: kind for kind in found.kinds}


@pytest.fixture
def from_the_dataset(extract_config):
    teacher = extract_config.teacher.model_copy(update={"prompts": ("dataset",)})
    return extract_config.model_copy(update={"teacher": teacher})


@pytest.fixture
def bad_folder(tmp_path, draw_frames):
    """Two shards of clips, most of them unusable in some way."""
    folder = tmp_path / "clips"
    folder.mkdir()

    def video(name, num_frames=12, fps=8.0):
        frames = draw_frames(num_frames, 64, 96)
        (folder / name).write_bytes(encode_video(frames, fps))

    for name in ("a", "b", "silent", "unprompted", "late"):
        video(f"{name}.mp4")
    video("short.mp4", num_frames=4)
    video("slow.mp4", fps=2.0)
    (folder / "text.mp4").write_text("no video")
    rows = [
        {"file_name": "a.mp4", "caption": "an ellipse", "box_xyxy": BOX},
        {"file_name": "silent.mp4", "box_xyxy": BOX},
        {"file_name": "unprompted.mp4", "caption": "an ellipse"},
        {"file_name": "short.mp4", "caption": "an ellipse", "box_xyxy": BOX},
        {"file_name": "slow.mp4", "caption": "an ellipse", "box_xyxy": BOX},
        {"file_name": "text.mp4", "caption": "an ellipse", "box_xyxy": BOX},
        {"caption": "no name"},
        {"file_name": "b.mp4", "caption": "an ellipse", "box_xyxy": BOX},
        {"file_name": "late.mp4", "caption": "an ellipse", "box_xyxy": BOX},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ClipsConfig(path=folder, num_frames=9, height=64, width=96, clips_per_shard=7)


def test_the_run_then_does_what_was_estimated(from_the_dataset, bad_folder, tiny_base, tmp_path):
    cache = tmp_path / "cache"
    before = look(from_the_dataset, bad_folder, tiny_base, cache)
    assert not cache.exists()
    assert (before.clips, before.shards, before.clips_probed) == (9, 2, 9)
    assert before.dataset_bytes > 0
    assert before.prompts == {"dataset": 4}
    summary = extract_features(
        from_the_dataset, bad_folder, tiny_base, cache, provenance={}, progress=SilentProgress()
    )
    for kind in summary.kinds:
        expected = by_kind(before)[kind.kind]
        assert expected.store == kind.store
        assert {(s.key, s.reason, s.shard) for s in expected.skipped} == {
            (s.key, s.reason, s.shard) for s in kind.skipped
        }
        assert (expected.clips, expected.skipped_count) == (kind.clips_written, len(kind.skipped))
        reader = StoreReader(kind.store)
        arrays = [array for key in reader.keys for array in reader.read(key).values()]
        assert expected.bytes == sum(array.nbytes for array in arrays)
    after = look(from_the_dataset, bad_folder, tiny_base, cache)
    for kind in after.kinds:
        assert kind.clips_already_there == by_kind(before)[kind.kind].clips
        assert (kind.clips, kind.skipped_count, kind.bytes, kind.skipped) == (0, 0, 0, ())
    assert after.seconds == after.bytes == 0


def test_reasons_are_those_of_each_kind(from_the_dataset, bad_folder):
    surveys = survey(from_the_dataset, bad_folder)

    def reasons(kind):
        return {clip.key: clip.reason for one in surveys for clip in one.skipped.get(kind, ())}

    (nameless,) = set(reasons("text")) - {"silent"}
    both = {nameless: "bad_record"}
    undecoded = {"short": "too_short", "slow": "fps_too_low", "text": "undecodable"}
    assert reasons("text") == both | {"silent": "no_caption"}
    assert reasons("latents") == both | undecoded
    assert reasons("teacher") == both | undecoded | {"unprompted": "no_prompt"}
    assert reasons("masks") == reasons("teacher")


def test_videos_whose_frames_are_converted_are_counted(from_the_dataset, bad_folder, draw_frames):
    (bad_folder.path / "metadata.jsonl").write_text(
        "\n".join(
            json.dumps({"file_name": f"{name}.mp4", "caption": "x", "box_xyxy": BOX})
            for name in ("a", "hdr", "hdr2")
        )
    )
    for name in ("hdr", "hdr2"):
        with av.open(bad_folder.path / f"{name}.mp4", "w") as muxer:
            stream = muxer.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p10le"
            stream.options = {"x264-params": "transfer=smpte2084:colorprim=bt2020"}
            for image in draw_frames(12, 64, 96):
                muxer.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            muxer.mux(stream.encode())
    (found,) = survey(from_the_dataset, bad_folder)
    assert found.conversions == {"PQ to SDR": 2, "BT.2020 to BT.709": 2} and not found.skipped
    (found,) = survey(from_the_dataset, bad_folder.model_copy(update={"hdr": "skip"}))
    assert [clip.reason for clip in found.skipped["latents"]] == ["hdr", "hdr"]
    assert not found.conversions


@pytest.mark.parametrize(
    ("changes", "sources"),
    [
        ({"prompts": ("dataset", "automatic")}, {"dataset": 4, "automatic": 1}),
        ({"prompts": ("automatic", "dataset")}, {"automatic": 5}),
        ({"prompts": ("grounding", "dataset")}, {"grounding": 4, "dataset": 1}),
        (
            {"prompts": ("grounding",), "grounding": GroundingConfig(phrase="an ellipse")},
            {"grounding": 5},
        ),
    ],
)
def test_sources_serve_clips_in_their_order(from_the_dataset, bad_folder, changes, sources):
    teacher = from_the_dataset.teacher.model_copy(update=changes)
    config = from_the_dataset.model_copy(update={"teacher": teacher, "kinds": ("masks",)})
    surveys = survey(config, bad_folder)
    assert sum((one.prompts for one in surveys), Counter()) == sources
    skipped = {clip.key for one in surveys for clip in one.skipped.get("masks", ())}
    assert "unprompted" not in skipped


@pytest.mark.parametrize(("subjects", "counted"), [("union", 4), ("each", 5)])
def test_several_subjects_are_several_tracks_where_each_has_one(
    from_the_dataset, tmp_path, draw_frames, subjects, counted
):
    (tmp_path / "a.mp4").write_bytes(encode_video(draw_frames(12, 64, 96), 8.0))
    for name in ("b", "c", "d"):
        (tmp_path / f"{name}.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    several = [
        {"file_name": f"{name}.mp4", "subjects": [{"box_xyxy": BOX}] * count}
        for name, count in (("a", 1), ("b", 2), ("c", 2), ("d", 3))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, several)))
    clips = ClipsConfig(path=tmp_path, num_frames=9, height=64, width=96)
    changes = {"subjects": subjects, "max_subjects": 2}
    teacher = from_the_dataset.teacher.model_copy(update=changes)
    (one,) = survey(from_the_dataset.model_copy(update={"teacher": teacher}), clips)
    reasons = {clip.key: clip.reason for clip in one.skipped.get("teacher", ())}
    assert reasons == ({"d": "too_many_subjects"} if subjects == "each" else {})
    assert sum(one.subjects.values()) == counted


def test_shards_done_in_one_store_alone_are_passed_again(
    from_the_dataset, two_shards, tiny_base, tmp_path
):
    """The masks of both shards are there, nothing of the teacher."""
    masks = from_the_dataset.model_copy(update={"kinds": ("masks",)})
    extract_features(
        masks, two_shards, tiny_base, tmp_path, provenance={}, progress=SilentProgress()
    )
    both = from_the_dataset.model_copy(update={"kinds": ("teacher", "masks")})
    found = look(both, two_shards, tiny_base, tmp_path)
    assert [(kind.clips, kind.clips_already_there) for kind in found.kinds] == [(5, 0), (0, 5)]
    assert [(one.kinds, one.clips) for one in found.passes] == [(("teacher", "masks"), 5)]


def test_few_shards_speak_for_all(from_the_dataset, tiny_base, tmp_path, draw_frames):
    config = from_the_dataset.model_copy(update={"kinds": ("latents",)})
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "good.mp4").write_bytes(encode_video(draw_frames(12, 64, 96), 8.0))
    rows = [{"file_name": f"{n}/missing.mp4"} for n in range(40)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clips = ClipsConfig(path=folder, num_frames=9, height=64, width=96, clips_per_shard=4)
    found = look(config, clips, tiny_base, tmp_path / "cache", max_probed=8)
    (kind,) = found.kinds
    assert (found.clips, found.shards, found.clips_probed) == (40, 10, 8)
    assert {clip.shard for clip in kind.skipped} == {"00000", "00005"}
    assert (kind.skipped_count, kind.clips, len(kind.skipped)) == (40, 0, 8)


def test_time_is_work_over_the_usual_share_of_the_rate(
    from_the_dataset, two_shards, tiny_base, tmp_path
):
    config = from_the_dataset.model_copy(update={"kinds": ("text", "latents")})
    found = look(config, two_shards, tiny_base, tmp_path)
    assert [one.clips for one in found.passes] == [6, 5]
    for one in found.passes:
        assert one.flops == one.clips * one.cost.flops_per_clip
        assert one.seconds == pytest.approx(one.flops / (1e9 * one.assumed_peak_fraction))
    assert found.seconds == pytest.approx(sum(one.seconds for one in found.passes))
    assert found.free_bytes > 0
    assert found.device_bytes > 0


class TestWithoutWeights:
    """A hub id of which only configuration files are here."""

    @pytest.mark.parametrize("base", ["tiny_base", "tiny_image_base"])
    def test_disk_is_that_of_the_stores_all_the_same(
        self, from_the_dataset, two_shards, base, request, no_hub, monkeypatch
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        config = from_the_dataset.model_copy(update={"kinds": ("text", "latents")})
        whole = request.getfixturevalue(base)
        bare = no_hub / "models--someone--bare" / "snapshots" / "abc"
        (bare.parents[1] / "refs").mkdir(parents=True)
        (bare.parents[1] / "refs" / "main").write_text("abc")
        for file in Path(whole.path).rglob("*.json"):
            (bare / file.relative_to(whole.path)).parent.mkdir(parents=True, exist_ok=True)
            (bare / file.relative_to(whole.path)).write_bytes(file.read_bytes())
        known = planned_passes(config, two_shards, whole)
        unknown = planned_passes(config, two_shards, BaseModelConfig(path="someone/bare"))
        for with_weights, without in zip(known, unknown, strict=True):
            assert without.arrays == with_weights.arrays
            assert without.cost == with_weights.cost
            assert without.folders is None
            assert "not on this machine yet" in without.notes[0]

    def test_an_official_tracker_is_estimated_from_its_name(
        self, from_the_dataset, two_shards, tiny_base, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
        teacher = TeacherConfig(checkpoint="facebook/sam2.1-hiera-tiny", image_size=64)
        config = from_the_dataset.model_copy(
            update={"teacher": teacher, "kinds": ("teacher", "masks")}
        )
        found = look(config, two_shards, tiny_base, tmp_path / "cache")
        assert [kind.store for kind in found.kinds] == [None, None]
        assert found.kinds[0].bytes_per_clip == 9 * 4 * 6 * 512 * 2 + 9
        assert found.kinds[1].bytes_per_clip == 2 * 9 * 16 * 24 + 9
        tokens, pairs = 4 * 6, 8
        assert [(f.kind, f.dtype, f.bytes_per_clip) for f in found.forms] == [
            ("teacher", "float16", 9 * tokens * 512 * 2 + 9),
            ("teacher", "int8", 9 * tokens * 512 + 9 * tokens + 9),  # the scales compressed
            ("gram_flow", "float16", pairs * tokens * 49 + 9),  # half of two bytes
            ("gram_flow", "uint8", pairs * tokens * (49 + 4) + 9),
        ]
        assert [f.chosen for f in found.forms] == [True, False, False, False]
        assert [f.compressed for f in found.forms] == [False, False, True, False]
        assert {f.clips for f in found.forms} == {found.kinds[0].clips}
        assert found.passes[0].cost.weight_bytes == pytest.approx(39e6 * 4, rel=0.01)
        assert "facebook/sam2.1-hiera-tiny is not on this machine yet" in found.notes[0]

    def test_an_unreachable_base_model_is_said_and_the_rest_estimated(
        self, from_the_dataset, two_shards, tmp_path, monkeypatch
    ):
        def unreachable(*_, **__):
            raise ValueError("no network")

        monkeypatch.setattr("stages.students.official_models.resolve_configurations", unreachable)
        model = BaseModelConfig(path="someone/some-model")
        found = look(from_the_dataset, two_shards, model, tmp_path)
        text, latents, teacher, _ = found.kinds
        assert text.bytes is latents.bytes is None
        assert teacher.bytes == teacher.clips * teacher.bytes_per_clip > 0
        assert found.passes[0].seconds is None
        assert "the configuration of someone/some-model is not available: no network" in found.notes

    def test_a_checkpoint_that_is_no_file_and_no_hub_id_is_refused(
        self, from_the_dataset, two_shards, tiny_base, tmp_path
    ):
        teacher = from_the_dataset.teacher.model_copy(update={"checkpoint": "nowhere.pt"})
        config = from_the_dataset.model_copy(update={"teacher": teacher})
        with pytest.raises(ValueError, match=r"extract\.teacher\.checkpoint=nowhere\.pt"):
            look(config, two_shards, tiny_base, tmp_path)

    @pytest.mark.parametrize("image", [False, True])
    def test_an_official_model_is_known_without_a_network(
        self, from_the_dataset, two_shards, tmp_path, no_hub, image
    ):
        model = BaseModelConfig(path=f"zai-org/CogVideoX-5b{'-I2V' if image else ''}")
        found = look(from_the_dataset, two_shards, model, tmp_path)
        kinds = by_kind(found)
        assert kinds["text"].bytes_per_clip == 226 * 4096 * 2
        frames, per_frame = 3 + 8 * image, 2 * 2 * 16 * 8 * 12
        assert kinds["latents"].bytes_per_clip == frames * per_frame
        text, latents = found.passes[:2]
        assert text.cost.weight_bytes == pytest.approx(4.76e9 * 4, rel=0.01), "T5 v1.1 XXL's half"
        assert latents.cost.weight_bytes > 0
        assert f"{model.path} is not on this machine yet; a copy" in found.notes[0]
        assert any(f"the text encoder of {model.path} is not on" in note for note in found.notes)
