"""Forward and backward tracking passes over a clip's subjects, and their cycle consistency.

    prompted frame p:  seek      p .. 0    if p > 0: find the earliest frame q with the subject
                       forward   q .. T-1  r is the last frame on which the subject is seen
                       backward  r .. q    from the forward track's mask on r, or from T-1 with
                                           the dataset's own prompt for that frame

All subjects' passes of one kind run before those of the next; passes of equal length, of several
subjects and clips, run as one batch.
"""

# Legend: T frame, S side of SAM2's square input, H W grid or mask, C channel.

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from stages.clips import ClipSkipped
from stages.config import FeatureKind
from stages.local_gram_flow import resample_to_grid
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.tracker import (
    EmptyMaskError,
    TrackedFrame,
    Tracker,
    TrackRequest,
)


def cycle_consistency(
    forward_logits_THW: Tensor, backward_logits_THW: Tensor, seen_by_both_T: Tensor
) -> float | None:
    """Return the mean IoU of the two tracks' masks over the frames on which both see the subject.

    A mask is the set of pixels with positive logits.

    Args:
        forward_logits_THW: Mask logits of the forward track.
        backward_logits_THW: The same for the backward track, with frames in the same order.
        seen_by_both_T: bool, the frames to average over; their masks must not be empty.

    Returns:
        0 to 1, or None if there are no such frames.

    Raises:
        ValueError: The shapes differ.
    """
    expected = (len(seen_by_both_T), *forward_logits_THW.shape[1:])
    for logits_THW in (forward_logits_THW, backward_logits_THW):
        if tuple(logits_THW.shape) != expected:
            raise ValueError(
                f"masks of both tracks must have the shape {expected} (frame, height, width), got "
                f"{tuple(forward_logits_THW.shape)} and {tuple(backward_logits_THW.shape)}"
            )
    counted_T = seen_by_both_T.to(forward_logits_THW.device)
    if not counted_T.any():
        return None
    forward_THW = forward_logits_THW[counted_T] > 0
    backward_THW = backward_logits_THW[counted_T] > 0
    shared_T = (forward_THW & backward_THW).sum(dim=(1, 2))
    covered_T = (forward_THW | backward_THW).sum(dim=(1, 2))
    return (shared_T.to(torch.float64) / covered_T).mean().item()


BackwardPrompt = Literal["track", "dataset"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subject:
    """A subject to track in a clip, or the union of several."""

    encoded: EncodedFrames
    frame: int
    """Index of the prompted frame."""
    prompt: Sam2Prompt
    last_prompt: Sam2Prompt | None = None
    """Prompt on the clip's last frame, to start the backward pass from there."""


@dataclass(kw_only=True, slots=True, eq=False)
class Track:
    """Result of one pass. Values of frames that it did not visit are zero or false."""

    visited_T: Tensor
    """bool, on the host."""
    seen_T: Tensor
    """bool, on the host: visited, object score positive, and some logit of the mask positive."""
    logits_THW: Tensor
    """[T, S/4, S/4] mask logits in float32."""
    features_THWC: Tensor | None
    """float32, or None if features are not stored."""

    @property
    def seen(self) -> list[int]:
        """Indices of the frames on which the subject is seen, in ascending order."""
        return [int(index) for index in self.seen_T.nonzero()]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SubjectTrack:
    """The tracks of one subject."""

    first_frame: int
    """q, the first frame of the forward pass."""
    last_frame: int
    """r, the last frame on which the forward pass sees the subject."""
    forward: Track
    backward: Track | None
    backward_prompt: BackwardPrompt | None
    """Source of the backward pass's prompt; None without a backward pass."""
    cycle_consistency: float | None
    """None without a backward pass, or if no frame is seen by both."""

    @property
    def directions(self) -> tuple[Track, ...]:
        """The forward track, and the backward track if there is one."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def usable_T(self) -> Tensor:
        """bool [T]: every direction sees the subject."""
        return torch.stack([track.seen_T for track in self.directions]).all(dim=0)

    @property
    def visited_T(self) -> Tensor:
        """bool [T]: every direction has visited the frame."""
        return torch.stack([track.visited_T for track in self.directions]).all(dim=0)


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectTracker:
    """Runs the passes described in the module docstring."""

    tracker: Tracker
    both_ways: bool
    """Whether there is a backward pass."""
    features: FeatureKind | None
    """Features to store; None stores masks only."""
    feature_grid: tuple[int, int] | None
    """Rows and columns that features are resampled to; None keeps SAM2's own grid."""
    passes_at_once: int
    """Maximum number of passes in a batch; with 1, results equal separate runs exactly."""
    keep_on: torch.device
    """Device for masks and features; with the host, accelerator memory does not grow with T."""

    @torch.inference_mode()
    def track(self, subjects: Sequence[Subject]) -> list[SubjectTrack | ClipSkipped]:
        """Track all subjects; a lost subject does not affect the others.

        Returns:
            For each subject in order, its tracks, or a ClipSkipped with the reason subject_lost.
        """
        found: dict[int, SubjectTrack | ClipSkipped] = {}
        starts: dict[int, Subject] = {}
        ends: dict[int, tuple[int, Sam2Prompt | None]] = {}

        # Seek: prompts on a later frame, back to the earliest frame that shows the subject.
        seeks = self._run(
            {
                number: _request(subject, subject.prompt, range(subject.frame, -1, -1))
                for number, subject in enumerate(subjects)
                if subject.frame > 0
            },
            keeps_features=False,
        )
        for number, subject in enumerate(subjects):
            try:
                starts[number] = self._start(subject, seeks.get(number))
            except ClipSkipped as skipped:
                found[number] = skipped

        # Forward, and backward where the dataset has a prompt for the last frame.
        requests: dict[tuple[int, str], TrackRequest] = {}
        for number, start in starts.items():
            order = range(start.frame, start.encoded.num_frames)
            requests[number, "forward"] = _request(start, start.prompt, order)
            if self._backward_prompt(start) == "dataset":
                assert start.last_prompt is not None
                requests[number, "backward"] = _request(start, start.last_prompt, order[::-1])
        tracks = self._run(requests)

        # Backward from the forward track's last mask.
        for number, start in starts.items():
            try:
                ends[number] = self._end(start, tracks[number, "forward"])
            except ClipSkipped as skipped:
                found[number] = skipped
        tracks |= self._run(
            {
                (number, "backward"): _request(
                    starts[number], end_prompt, range(last, starts[number].frame - 1, -1)
                )
                for number, (last, end_prompt) in ends.items()
                if end_prompt is not None
            }
        )

        for number, (last, _) in ends.items():
            forward, backward = tracks[number, "forward"], tracks.get((number, "backward"))
            found[number] = SubjectTrack(
                first_frame=starts[number].frame,
                last_frame=last,
                forward=forward,
                backward=backward,
                backward_prompt=self._backward_prompt(starts[number]),
                cycle_consistency=None if backward is None else _agreement(forward, backward),
            )
        return [found[number] for number in range(len(subjects))]

    def _backward_prompt(self, subject: Subject) -> BackwardPrompt | None:
        if not self.both_ways:
            return None
        return "track" if subject.last_prompt is None else "dataset"

    def _start(self, subject: Subject, seek: Track | None) -> Subject:
        """Return the subject with the first frame of the forward pass, and its prompt."""
        first, prompt = subject.frame, subject.prompt
        if seek is not None:
            if not seek.seen:
                raise _lost(f"the track from frame {first} back to frame 0 sees it nowhere")
            earlier = [frame for frame in seek.seen if frame < first]
            first, prompt = self._first_prompt(seek, earlier) or (first, prompt)
        if subject.encoded.num_frames - first < 2:
            raise _lost(f"frame {first}, the clip's last, is the only one that shows it")
        return replace(subject, frame=first, prompt=prompt)

    def _end(self, start: Subject, forward: Track) -> tuple[int, Sam2Prompt | None]:
        """Return the last frame, and the backward pass's prompt if it is from the forward track."""
        first, last = start.frame, max(forward.seen, default=None)
        if last is None:
            raise _lost(f"the forward track, from frame {first}, sees it nowhere")
        if last == first:
            raise _lost(f"the forward track loses it after frame {first}, where it starts")
        if self._backward_prompt(start) != "track":
            return last, None
        later = [frame for frame in reversed(forward.seen) if frame > first]
        found = self._first_prompt(forward, later)
        if found is None:
            raise _lost(f"no mask of the forward track, from frame {first}, is left at full size")
        return found

    def _first_prompt(self, track: Track, frames: Sequence[int]) -> tuple[int, Sam2Prompt] | None:
        """Return the first frame whose mask can be a prompt, and the prompt; None if none can.

        A mask of a few uncertain pixels becomes empty when it is upsampled to SAM2's size.
        """
        for frame in frames:
            try:
                return frame, self.tracker.prompt_from_logits(
                    track.logits_THW[frame].to(self.tracker.model.device)
                )
            except EmptyMaskError:
                continue
        return None

    def _run(
        self, requests: Mapping[Key, TrackRequest], *, keeps_features: bool = True
    ) -> dict[Key, Track]:
        """Run passes; those of equal length run as batches."""
        by_length: dict[int, list[Key]] = defaultdict(list)
        for key, request in requests.items():
            by_length[len(request.order)].append(key)
        features = self.features if keeps_features else None
        tracks: dict[Key, Track] = {}
        for keys in by_length.values():
            for start in range(0, len(keys), self.passes_at_once):
                batch = keys[start : start + self.passes_at_once]
                found = self._run_batch([requests[key] for key in batch], features)
                tracks.update(zip(batch, found, strict=True))
        return tracks

    def _run_batch(
        self, requests: Sequence[TrackRequest], features: FeatureKind | None
    ) -> list[Track]:
        """Run passes of equal length as one batch, and collect their frames.

        Does not synchronise with the accelerator before the end if everything is kept there.
        """
        tracks: list[Track] = []
        for frames in self.tracker.track(requests, features=(features,) if features else ()):
            if not tracks:
                tracks = [self._empty_track(*one) for one in zip(requests, frames, strict=True)]
            for track, frame in zip(tracks, frames, strict=True):
                track.seen_T[frame.index] = frame.visible
                track.logits_THW[frame.index] = frame.mask_logits_HW
                if track.features_THWC is not None and features is not None:
                    track.features_THWC[frame.index] = self._on_grid(frame.features[features])
        for track in tracks:
            track.seen_T = track.seen_T.cpu()
        return tracks

    def _empty_track(self, request: TrackRequest, frame: TrackedFrame) -> Track:
        """Return a track of zeros; `seen_T` is on the same device as the other values for now."""
        num_frames = request.encoded.num_frames
        visited_T = torch.zeros(num_frames, dtype=torch.bool)
        visited_T[list(request.order)] = True
        features_THWC = None
        for channels, *grid in (features_CHW.shape for features_CHW in frame.features.values()):
            shape = (num_frames, *(self.feature_grid or grid), channels)
            features_THWC = torch.zeros(shape, device=self.keep_on)
        return Track(
            visited_T=visited_T,
            seen_T=torch.zeros(num_frames, dtype=torch.bool, device=self.keep_on),
            logits_THW=torch.zeros((num_frames, *frame.mask_logits_HW.shape), device=self.keep_on),
            features_THWC=features_THWC,
        )

    def _on_grid(self, features_CHW: Tensor) -> Tensor:
        """Return a frame's features on the grid to store: [H, W, C]."""
        if self.feature_grid is None:
            return features_CHW.permute(1, 2, 0)
        return resample_to_grid(features_CHW[None], *self.feature_grid)[0]


def _request(subject: Subject, prompt: Sam2Prompt, order: range) -> TrackRequest:
    return TrackRequest(encoded=subject.encoded, prompt=prompt, order=order)


def _agreement(forward: Track, backward: Track) -> float | None:
    both_T = forward.seen_T & backward.seen_T
    return cycle_consistency(forward.logits_THW, backward.logits_THW, both_T)


def _lost(detail: str) -> ClipSkipped:
    return ClipSkipped("subject_lost", detail)
