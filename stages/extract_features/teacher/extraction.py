"""Extraction of teacher features, Gram flow and masks of each clip's subjects with a tracker."""

# Legend: T frame, S side of SAM2's square input.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from cache_schema import StoreSettings
from stages.clips import Clip, ClipRecord, ClipsConfig, ClipSkipped, load_clip
from stages.extract_features.config import Kind, TeacherConfig
from stages.extract_features.extraction import Extracted, Outcome
from stages.extract_features.prompts import ChosenPrompt, PromptChooser, check_prompt
from stages.extract_features.teacher.prompts import subjects_to_track
from stages.extract_features.teacher.stores import (
    mask_arrays,
    refusal,
    subject_settings,
    teacher_arrays,
    track_attributes,
    tracking_settings,
)
from stages.extract_features.teacher.two_way import Subject, SubjectTrack, SubjectTracker
from stages.processes.allocator import return_freed_memory
from stages.sam2_tracking.inputs import resize_for_sam2
from stages.sam2_tracking.opening import (
    build_tracker,
    check_tracker,
    find_checkpoint,
    hash_of_checkpoint,
)
from stages.sam2_tracking.tracker import Tracker
from stages.teacher_store.config import GramFlowConfig
from stages.teacher_store.encoder import GramFlowEncoder

_LARGE_IMAGE = 512
"""Side of SAM2's input from which freed activations are worth returning to the system: this takes
time, also of what the process does later."""


@dataclass(slots=True, eq=False)
class _Prepared:
    """A decoded clip, and its frames in SAM2's input format until they are encoded."""

    clip: Clip
    _frames_TSS3: np.ndarray | None

    def take_frames(self) -> np.ndarray:
        """Return the frames, uint8 [T, S, S, 3], and let go of them: tracking does not need them.

        At 1024 pixels, 49 of them are 147 MiB.
        """
        frames_TSS3, self._frames_TSS3 = self._frames_TSS3, None
        assert frames_TSS3 is not None, "a clip is encoded once"
        return frames_TSS3


class SubjectExtraction:
    """Tracks each clip's subjects and stores fused features, their Gram flow, and masks.

    The Gram flow is computed from the stored values of the features, so that a later derivation
    gives the same.

    Args:
        config: Tracker, prompts, features, fusion and storage.
        clips: Size and length of clips.
        gram_flow: Window and storage of the Gram flow.
        kinds: Some of teacher, gram_flow and masks.

    Raises:
        ValueError: Settings contradict each other; or a required model (the tracker, Grounding
            DINO) is missing or does not match.
    """

    def __init__(
        self,
        config: TeacherConfig,
        clips: ClipsConfig,
        *,
        gram_flow: GramFlowConfig,
        kinds: Sequence[Kind],
    ) -> None:
        _check_directions(config)
        self._config = config
        self._clips = clips
        self._kinds = tuple(kinds)
        self.clips_per_batch = config.clips_per_batch
        self.size: ClipsConfig | None = clips
        self._checkpoint = find_checkpoint(config.checkpoint)
        # Checked here, so that a wrong checkpoint is not found after hours of work.
        self._spec = check_tracker(config.config, self._checkpoint, image_size=config.image_size)
        self._chooser = PromptChooser(config)
        settings = self._all_settings(gram_flow)
        self._flow_maker = GramFlowEncoder.of(settings["teacher"], gram_flow, clips.token_grid)
        self.settings: Mapping[Kind, StoreSettings] = {kind: settings[kind] for kind in self._kinds}

    def _all_settings(self, gram_flow: GramFlowConfig) -> dict[Kind, StoreSettings]:
        config, clips, spec = self._config, self._clips, self._spec
        tracking = tracking_settings(
            config,
            clips,
            checkpoint_sha256=hash_of_checkpoint(self._checkpoint),
            library=spec.library,
            architecture=spec.config,
            prompts=self._chooser.settings,
        )
        return subject_settings(
            config,
            clips,
            tracking,
            gram_flow=gram_flow,
            channels=spec.mem_dim if config.features == "memory_encoder" else spec.hidden_dim,
            stride=spec.stride,
        )

    def prepare(self, record: ClipRecord) -> _Prepared:
        """Decode the clip and resize its frames to SAM2's square.

        Raises:
            ClipSkipped: no_prompt or bad_prompt; or see `load_clip`.
        """
        check_prompt(self._config, record)
        clip = load_clip(record, self._clips)
        check_prompt(self._config, clip)
        return _Prepared(clip, resize_for_sam2(clip.frames_THWC, self._config.image_size))

    @contextmanager
    def load_model(
        self, device: torch.device
    ) -> Iterator[Callable[[Sequence[_Prepared]], Sequence[Outcome]]]:
        """Load the tracker, and Grounding DINO if it is configured."""
        config = self._config
        if device.type == "cpu" and config.image_size >= _LARGE_IMAGE:
            return_freed_memory()
        model = build_tracker(
            self._spec.config_name, self._checkpoint, image_size=config.image_size, device=device
        )
        tracker = Tracker(
            model,
            precision=config.precision,
            frames_per_batch=config.frames_per_batch,
            keep_encoded=config.keep_encoded,
            compile=config.compile,
        )
        with self._chooser.load_models(device):
            yield partial(self._extract, tracker)

    @torch.inference_mode()
    def _extract(self, tracker: Tracker, batch: Sequence[_Prepared]) -> list[Outcome]:
        """Track the clips of a batch together."""
        with ExitStack() as encodings:
            started = [self._find_subjects(tracker, prepared, encodings) for prepared in batch]
            found = [one for one in started if not isinstance(one, ClipSkipped)]
            subjects = [subject for _, of_clip in found for subject in of_clip]
            tracks = iter(self._subject_tracker(tracker).track(subjects))
        outcomes: list[Outcome] = []
        for prepared, start in zip(batch, started, strict=True):
            if isinstance(start, ClipSkipped):
                outcomes.append(start)
                continue
            chosen, of_clip = start
            tracks_of_clip = [next(tracks) for _ in of_clip]
            outcomes.append(
                self._outcome(prepared.clip, chosen, tracks_of_clip, tracker.model.device)
            )
        return outcomes

    @property
    def _keeps_features(self) -> bool:
        return "teacher" in self._kinds or "gram_flow" in self._kinds

    def _subject_tracker(self, tracker: Tracker) -> SubjectTracker:
        config = self._config
        on_device = config.keep_encoded == "device"
        return SubjectTracker(
            tracker=tracker,
            both_ways=config.fusion != "forward",
            features=config.features if self._keeps_features else None,
            feature_grid=None if config.grid == "native" else self._clips.token_grid,
            passes_at_once=config.clips_per_batch,
            keep_on=tracker.model.device if on_device else torch.device("cpu"),
        )

    def _find_subjects(
        self, tracker: Tracker, prepared: _Prepared, encodings: ExitStack
    ) -> tuple[ChosenPrompt, tuple[Subject, ...]] | ClipSkipped:
        """Encode a clip and find its subjects; `encodings` closes the encoded frames."""
        encoded = encodings.enter_context(tracker.encode(prepared.take_frames()))
        clip = prepared.clip
        try:
            chosen = self._chooser.choose(clip, tracker, encoded)
            return chosen, subjects_to_track(
                clip, chosen, config=self._config, tracker=tracker, encoded=encoded
            )
        except ClipSkipped as skipped:
            encoded.close()
            return skipped

    def _outcome(
        self,
        clip: Clip,
        chosen: ChosenPrompt,
        tracks: Sequence[SubjectTrack | ClipSkipped],
        device: torch.device,
    ) -> Outcome:
        """Return a clip's entries, or why it is skipped; computes the Gram flow on the device."""
        found: list[SubjectTrack] = []
        for number, track in enumerate(tracks):
            if isinstance(track, SubjectTrack):
                found.append(track)
                continue
            which = f"subject {number + 1} of {len(tracks)}: " if len(tracks) > 1 else ""
            return ClipSkipped(track.reason, which + track.detail)
        skipped = refusal(found, min_cycle_consistency=self._config.min_cycle_consistency)
        if skipped is not None:
            return skipped
        attributes = track_attributes(clip, chosen, found)
        arrays: dict[Kind, dict[str, np.ndarray]] = {}
        if self._keeps_features:
            arrays["teacher"] = teacher_arrays(found, self._config)
        if "gram_flow" in self._kinds:
            arrays["gram_flow"] = self._flow_maker(arrays["teacher"], device)
        if "masks" in self._kinds:
            arrays["masks"] = mask_arrays(found, self._clips)
        return {kind: Extracted(arrays=arrays[kind], attributes=attributes) for kind in self._kinds}


def _check_directions(config: TeacherConfig) -> None:
    """Raise if settings need a backward pass that the fusion does not have."""
    if config.fusion != "forward":
        return
    if config.min_cycle_consistency > 0:
        raise ValueError(
            f"extract.teacher.min_cycle_consistency={config.min_cycle_consistency:g} compares both "
            "directions, but extract.teacher.fusion=forward has only one; set it to 0, or set "
            "fusion to gram_flow"
        )
    if config.backward_prompt != "track":
        raise ValueError(
            f"extract.teacher.backward_prompt={config.backward_prompt} needs a backward pass, but "
            "extract.teacher.fusion=forward has none; leave it at track"
        )
