"""A tiny SAM2 with random weights, and the stock predictor on the same weights as the oracle."""

import io
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf
from PIL import Image
from sam2.build_sam import build_sam2_video_predictor

from cache_schema import ArraySpec, StoreSettings
from stages.clips import Clip, ClipRecord, ClipsConfig, ClipSkipped, encode_video, load_clip
from stages.config import BaseModelConfig
from stages.demo.build import PRETRAINED
from stages.extract_features.config import ExtractConfig, Kind, TeacherConfig
from stages.extract_features.extraction import Extracted, clip_settings

OFFICIAL = "configs/sam2.1/sam2.1_hiera_t.yaml"
SIZE = 128


def tiny_overrides() -> list[str]:
    """Hydra overrides that shrink the official sam2.1_hiera_t to 128 pixels and 32 channels."""
    encoder, attention, memory = "image_encoder", "memory_attention", "memory_encoder"
    values = {
        "image_size": SIZE,
        f"{encoder}.trunk.embed_dim": 16,
        f"{encoder}.trunk.stages": [1, 1, 2, 1],
        f"{encoder}.trunk.global_att_blocks": [3],
        f"{encoder}.neck.d_model": 32,
        f"{encoder}.neck.position_encoding.num_pos_feats": 32,
        f"{encoder}.neck.backbone_channel_list": [128, 64, 32, 16],
        f"{attention}.d_model": 32,
        f"{attention}.num_layers": 1,
        f"{attention}.layer.d_model": 32,
        f"{attention}.layer.dim_feedforward": 32,
        f"{attention}.layer.self_attention.embedding_dim": 32,
        f"{attention}.layer.cross_attention.embedding_dim": 32,
        f"{attention}.layer.cross_attention.kv_in_dim": 16,
        f"{attention}.layer.self_attention.feat_sizes": [SIZE // 16] * 2,
        f"{attention}.layer.cross_attention.feat_sizes": [SIZE // 16] * 2,
        f"{memory}.out_dim": 16,
        f"{memory}.in_dim": 32,
        f"{memory}.position_encoding.num_pos_feats": 16,
        f"{memory}.mask_downsampler.embed_dim": 32,
        f"{memory}.fuser.layer.dim": 32,
    }
    return [f"++model.{key}={value}".replace(" ", "") for key, value in values.items()]


def randomise(model: Any, seed: int = 0) -> None:
    """Give every weight that starts at zero a value, so that no path through the model is idle."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
            elif "pos_embed" in name or (name.endswith("bias") and not parameter.any()):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=noise))
        # The subject is visible on nearly every frame.
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)


class StockTracker:
    """sam2's own predictor on a folder of images, with what passes through it recorded."""

    def __init__(self, predictor: Any, folder: Path) -> None:
        self.predictor = predictor
        self.folder = folder
        self.encoded: dict[int, torch.Tensor] = {}
        self.attended: dict[int, torch.Tensor] = {}
        self.memories: dict[int, torch.Tensor] = {}
        self.logits: dict[int, torch.Tensor] = {}
        self.scores: dict[int, torch.Tensor] = {}

    def run(
        self, frames_THWC: np.ndarray, add_prompt: Callable[[Any, dict[str, Any]], Any]
    ) -> "StockTracker":
        """Track; everything recorded is by position in `frames_THWC`."""
        self.folder.mkdir(parents=True)
        for number, frame in enumerate(frames_THWC):
            # sam2 lists *.jpg only; the pixels must not be lossy, and PIL goes by the content.
            Image.fromarray(frame).save(self.folder / f"{number:05d}.jpg", format="PNG")
        predictor = self.predictor
        prepare, encode = (
            predictor._prepare_memory_conditioned_features,
            predictor._encode_new_memory,
        )
        new_memories: list[torch.Tensor] = []

        def recording_prepare(**arguments: Any) -> torch.Tensor:
            attended = prepare(**arguments)
            if not arguments["is_init_cond_frame"]:
                self.attended[arguments["frame_idx"]] = attended[0].clone()
            return attended

        def recording_encode(**arguments: Any) -> Any:
            memory, positions = encode(**arguments)
            new_memories.append(memory[0].clone())
            return memory, positions

        predictor._prepare_memory_conditioned_features = recording_prepare
        predictor._encode_new_memory = recording_encode
        try:
            state = predictor.init_state(str(self.folder))
            add_prompt(predictor, state)
            visited = [index for index, _, _ in predictor.propagate_in_video(state)]
            self._attend_to_prompted_frame(state)
            self._encode_images(state)
        finally:
            del predictor._prepare_memory_conditioned_features, predictor._encode_new_memory
        self.memories = dict(zip(visited, new_memories, strict=True))
        outputs = state["output_dict_per_obj"][0]
        for stored in (outputs["cond_frame_outputs"], outputs["non_cond_frame_outputs"]):
            for index, output in stored.items():
                self.logits[index] = output["pred_masks"][0, 0]
                self.scores[index] = output["object_score_logits"].flatten()[0]
        return self

    @torch.inference_mode()
    def _encode_images(self, state: dict[str, Any]) -> None:
        for index in range(state["num_frames"]):
            output = self.predictor.image_encoder(state["images"][index][None])
            self.encoded[index] = output["vision_features"][0]

    @torch.inference_mode()
    def _attend_to_prompted_frame(self, state: dict[str, Any]) -> None:
        _, _, vision, positions, sizes = self.predictor._get_image_feature(state, 0, 1)
        conditioning = state["output_dict_per_obj"][0]["cond_frame_outputs"]
        self.predictor._prepare_memory_conditioned_features(
            frame_idx=0,
            is_init_cond_frame=False,
            current_vision_feats=vision[-1:],
            current_vision_pos_embeds=positions[-1:],
            feat_sizes=sizes[-1:],
            output_dict={"cond_frame_outputs": conditioning, "non_cond_frame_outputs": {}},
            num_frames=state["num_frames"],
        )

    def last_mask(self) -> np.ndarray:
        """bool [S, S]: what the track ends with, as the prompt for the reversed clip."""
        side = self.predictor.image_size
        logits = self.logits[max(self.logits)][None, None]
        enlarged = torch.nn.functional.interpolate(logits, (side, side), mode="bilinear")
        return (enlarged[0, 0] > 0).numpy()


def make_frames(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 clip of a bright ellipse that moves over a fixed texture."""
    noise = np.random.default_rng(seed)
    texture = noise.integers(0, 120, (height, width, 3), dtype=np.uint8)
    frames = []
    for t in range(num_frames):
        frame = texture.copy()
        frame[ellipse(height, width, shift=0.01 * t)] = (230, 60 + 2 * t % 100, 40)
        frames.append(frame)
    return np.stack(frames)


def ellipse(height: int, width: int, shift: float = 0.0) -> np.ndarray:
    """bool mask of the subject that `make_frames` draws."""
    y, x = np.mgrid[0:height, 0:width]
    return ((x / width - 0.3 - shift) / 0.18) ** 2 + ((y / height - 0.5) / 0.25) ** 2 < 1


def build_stock(overrides: list[str], checkpoint: Path | None = None) -> Any:
    """The stock predictor with its default settings apart from the filling of holes."""
    predictor = build_sam2_video_predictor(
        OFFICIAL,
        None if checkpoint is None else str(checkpoint),
        device="cpu",
        hydra_overrides_extra=overrides,
    )
    predictor.fill_hole_area = 0
    return predictor


@pytest.fixture(scope="session")
def tiny_sam2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration file and a checkpoint in the official formats."""
    folder = tmp_path_factory.mktemp("sam2")
    torch.manual_seed(0)
    import sam2.build_sam  # noqa: F401 - registers the configurations with hydra

    configuration = compose(config_name=OFFICIAL, overrides=tiny_overrides())
    OmegaConf.save(configuration, folder / "tiny.yaml")
    model = build_stock(tiny_overrides())
    randomise(model)
    torch.save({"model": model.state_dict()}, folder / "tiny.pt")
    return folder / "tiny.yaml", folder / "tiny.pt"


@pytest.fixture(scope="session")
def packaged_sam2() -> Path:
    """The folder of the demo's trained SAM2."""
    return PRETRAINED / "sam2"


@pytest.fixture
def stock_runner(tmp_path: Path) -> Callable[..., Callable[..., StockTracker]]:
    """Makes a function that runs a stock predictor over frames, from a fresh state each time."""
    runs = iter(range(100))

    def runner(predictor: Any) -> Callable[..., StockTracker]:
        def run(frames_THWC: np.ndarray, add_prompt: Callable[..., Any]) -> StockTracker:
            folder = tmp_path / f"frames{next(runs)}"
            return StockTracker(predictor, folder).run(frames_THWC, add_prompt)

        return run

    return runner


@pytest.fixture
def stock(
    tiny_sam2: tuple[Path, Path], stock_runner: Callable[..., Any]
) -> Callable[..., StockTracker]:
    """Runs the stock predictor with the tiny weights."""
    return stock_runner(build_stock(tiny_overrides(), tiny_sam2[1]))


@pytest.fixture
def build_stock_model(
    stock_runner: Callable[..., Any],
) -> Callable[..., tuple[Any, Callable[..., StockTracker]]]:
    """A stock predictor with random weights and other overrides, and what runs it."""

    def build(overrides: list[str]) -> tuple[Any, Callable[..., StockTracker]]:
        torch.manual_seed(0)
        predictor = build_stock(overrides)
        randomise(predictor)
        return predictor, stock_runner(predictor)

    return build


@pytest.fixture
def draw_frames() -> Callable[..., np.ndarray]:
    """`make_frames`, for test modules, which cannot import from here."""
    return make_frames


@pytest.fixture
def subject_mask() -> Callable[..., np.ndarray]:
    """`ellipse`, for test modules."""
    return ellipse


CAPTIONS = ("a red ellipse drifts to the right", "an ellipse over a grey texture")
CLIP_FRAMES, CLIP_HEIGHT, CLIP_WIDTH = 9, 64, 96


def write_tar(path: Path, first: int, num_clips: int, *, bad: frozenset[int]) -> None:
    """A webdataset tar of drifting ellipses with captions and masks; `bad` clips are no videos."""
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + num_clips):
            frames_THWC = make_frames(CLIP_FRAMES + 3, CLIP_HEIGHT, CLIP_WIDTH, seed=number)
            mask = io.BytesIO()
            drawn = ellipse(CLIP_HEIGHT, CLIP_WIDTH).astype(np.uint8) * 255
            Image.fromarray(drawn).save(mask, format="PNG")
            video = b"no video" if number in bad else encode_video(frames_THWC, 8.0)
            for suffix, content in (
                ("mp4", video),
                ("txt", CAPTIONS[number % len(CAPTIONS)].encode()),
                ("mask.png", mask.getvalue()),
            ):
                member = tarfile.TarInfo(f"clip{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> ClipsConfig:
    """Two tars of three clips; the second clip of the second is no video."""
    folder = tmp_path_factory.mktemp("clips")
    write_tar(folder / "00000.tar", 0, 3, bad=frozenset())
    write_tar(folder / "00001.tar", 3, 3, bad=frozenset({4}))
    return ClipsConfig(
        path=folder, num_frames=CLIP_FRAMES, height=CLIP_HEIGHT, width=CLIP_WIDTH, fps=8.0
    )


def _tiny_pipeline(folder: Path, *, image_to_video: bool) -> BaseModelConfig:
    from stages.demo.tiny_cogvideox import build_tiny_cogvideox

    build_tiny_cogvideox(
        folder,
        height=CLIP_HEIGHT,
        width=CLIP_WIDTH,
        num_frames=CLIP_FRAMES,
        captions=CAPTIONS,
        seed=0,
        image_to_video=image_to_video,
        num_layers=1,
    )
    return BaseModelConfig(path=str(folder))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModelConfig:
    """A tiny text-to-video pipeline."""
    return _tiny_pipeline(tmp_path_factory.mktemp("t2v"), image_to_video=False)


@pytest.fixture(scope="session")
def tiny_image_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModelConfig:
    """A tiny image-to-video pipeline."""
    return _tiny_pipeline(tmp_path_factory.mktemp("i2v"), image_to_video=True)


@pytest.fixture(scope="session")
def extract_config(tiny_sam2: tuple[Path, Path]) -> ExtractConfig:
    """All kinds with the tiny SAM2, on the CPU."""
    configuration, checkpoint = tiny_sam2
    return ExtractConfig(
        device="cpu",
        teacher=TeacherConfig(
            checkpoint=str(checkpoint), config=str(configuration), image_size=SIZE
        ),
    )


class StubTracking:
    """Stands for SubjectExtraction in tests of the driver: two stores per pass, and no SAM2."""

    batches: list[list[str]]
    """Keys of the clips that came together, call by call."""
    lost: set[str]
    infinite: set[str]
    """Keys of clips whose teacher is not finite."""
    clips_per_batch = 2

    def __init__(
        self, config: TeacherConfig, clips: ClipsConfig, *, gram_flow: Any, kinds: tuple[Kind, ...]
    ):
        if config.checkpoint == "nowhere":
            raise ValueError("the checkpoint nowhere does not exist")
        self._clips = self.size = clips
        spec = ArraySpec(dtype="float16", shape=(clips.num_frames,), dimension_names=("t",))
        cut = {"clips": clip_settings(clips)} if clips.buckets else {}
        self.settings = {
            kind: StoreSettings(kind=kind, arrays={"mean": spec}, values={"stub": kind, **cut})
            for kind in kinds
        }

    def prepare(self, record: ClipRecord) -> Clip:
        return load_clip(record, self._clips)

    @contextmanager
    def load_model(self, device: torch.device) -> Iterator[Any]:
        yield self._extract

    def _extract(self, clips: list[Clip]) -> list[Any]:
        self.batches.append([clip.key for clip in clips])
        return [self._outcome(clip) for clip in clips]

    def _outcome(self, clip: Clip) -> Any:
        if clip.key in self.lost:
            return ClipSkipped("subject_lost", "the subject was not seen again after frame 2")
        mean_T = clip.frames_THWC.mean(axis=(1, 2, 3)).astype(np.float16)
        infinite = np.full_like(mean_T, np.inf)
        return {
            kind: Extracted(
                arrays={
                    "mean": infinite if kind == "teacher" and clip.key in self.infinite else mean_T
                },
                attributes={"of": f"{kind} {clip.key}"},
            )
            for kind in self.settings
        }


@pytest.fixture(scope="session")
def stub_module() -> Callable[[pytest.MonkeyPatch], type[StubTracking]]:
    """Puts a fresh stub in SubjectExtraction's place."""

    def install(patch: pytest.MonkeyPatch) -> type[StubTracking]:
        stub = type("Stub", (StubTracking,), {"batches": [], "lost": set(), "infinite": set()})
        module = types.SimpleNamespace(SubjectExtraction=stub)
        patch.setitem(sys.modules, "stages.extract_features.teacher.extraction", module)
        return stub

    return install


@pytest.fixture
def stub_tracking(
    stub_module: Callable[..., type[StubTracking]], monkeypatch: pytest.MonkeyPatch
) -> type[StubTracking]:
    """The stub that this test's extractions of teacher and masks are."""
    return stub_module(monkeypatch)
