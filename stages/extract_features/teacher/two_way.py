"""Forward and backward tracking passes over a clip's subjects, and their cycle consistency.

    prompted frame p:  seek      p .. 0    if p > 0: find the earliest frame q with the subject
                       forward   q .. T-1  r is the last frame on which the subject is seen
                       backward  r .. q    from the forward track's mask on r, or from T-1 with
                                           the dataset's own prompt for that frame

Passes of equal length, of several subjects and clips, run as one batch.
"""

# Legend: T frame, S side of SAM2's square input, H W grid or mask, C channel.

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.clips import ClipSkipped
from stages.config import FeatureKind
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
ReadFeatures = Callable[[TrackedFrame], Tensor]
"""Returns the features of a frame to store: [H, W, C]."""


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


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """A pass to run."""

    encoded: EncodedFrames
    prompt: Sam2Prompt
    order: range
    keeps_features: bool = True


_Passes = Generator[tuple[_Pass, ...], tuple[Track, ...], SubjectTrack]


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectTracker:
    """Runs the passes described in the module docstring."""

    tracker: Tracker
    both_ways: bool
    """Whether there is a backward pass."""
    features: FeatureKind | None
    """Features to store; None stores masks only."""
    read_features: ReadFeatures
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
        outcomes: dict[int, SubjectTrack | ClipSkipped] = {}
        running = {number: self._passes(subject) for number, subject in enumerate(subjects)}
        wanted: dict[int, tuple[_Pass, ...]] = {}

        def advance(number: int, tracks: tuple[Track, ...] | None) -> None:
            try:
                passes = running[number]
                wanted[number] = next(passes) if tracks is None else passes.send(tracks)
            except StopIteration as finished:
                outcomes[number] = finished.value
            except ClipSkipped as skipped:
                outcomes[number] = skipped

        for number in running:
            advance(number, None)
        while wanted:
            turn, wanted = wanted, {}
            done = self._run([one for passes in turn.values() for one in passes])
            for number, passes in turn.items():
                advance(number, tuple(next(done) for _ in passes))
        return [outcomes[number] for number in running]

    def _passes(self, subject: Subject) -> _Passes:
        """Yield passes to run and receive their tracks; return the subject's tracks."""
        encoded, first, prompt = subject.encoded, subject.frame, subject.prompt
        end = encoded.num_frames
        if first > 0:
            back_to_start = range(first, -1, -1)
            (seek,) = yield (_Pass(encoded, prompt, back_to_start, keeps_features=False),)
            if not seek.seen:
                raise _lost(f"the track from frame {first} back to frame 0 sees it nowhere")
            earlier = [frame for frame in seek.seen if frame < first]
            first, prompt = self._first_prompt(seek, earlier) or (first, prompt)
        if end - first < 2:
            raise _lost(f"frame {first}, the clip's last, is the only one that shows it")
        ahead = _Pass(encoded, prompt, range(first, end))
        started_from: BackwardPrompt | None = "track" if self.both_ways else None
        backward: Track | None = None
        if self.both_ways and subject.last_prompt is not None:
            started_from = "dataset"
            back = _Pass(encoded, subject.last_prompt, range(end - 1, first - 1, -1))
            forward, backward = yield (ahead, back)
        else:
            (forward,) = yield (ahead,)
        last = max(forward.seen, default=None)
        if last is None:
            raise _lost(f"the forward track, from frame {first}, sees it nowhere")
        if last == first:
            raise _lost(f"the forward track loses it after frame {first}, where it starts")
        if started_from == "track":
            later = [frame for frame in reversed(forward.seen) if frame > first]
            found = self._first_prompt(forward, later)
            if found is None:
                raise _lost(
                    f"no mask of the forward track, from frame {first}, is left at full size"
                )
            last, prompt = found
            (backward,) = yield (_Pass(encoded, prompt, range(last, first - 1, -1)),)
        return SubjectTrack(
            first_frame=first,
            last_frame=last,
            forward=forward,
            backward=backward,
            backward_prompt=started_from,
            cycle_consistency=None if backward is None else _agreement(forward, backward),
        )

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

    def _run(self, passes: Sequence[_Pass]) -> Iterator[Track]:
        """Return the tracks of all passes in order; passes of equal length run as one batch."""
        alike: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for place, one in enumerate(passes):
            alike[len(one.order), one.keeps_features].append(place)
        tracks: dict[int, Track] = {}
        for places in alike.values():
            for start in range(0, len(places), self.passes_at_once):
                group = places[start : start + self.passes_at_once]
                together = self._run_together([passes[place] for place in group])
                tracks.update(zip(group, together, strict=True))
        return iter([tracks[place] for place in range(len(passes))])

    def _run_together(self, passes: Sequence[_Pass]) -> list[Track]:
        kept = (self.features,) if self.features and passes[0].keeps_features else ()
        read = self.read_features if kept else None
        collectors = [_Collector(one, self.keep_on, read) for one in passes]
        requests = [
            TrackRequest(encoded=one.encoded, prompt=one.prompt, order=one.order) for one in passes
        ]
        for frames in self.tracker.track(requests, features=kept):
            for collector, frame in zip(collectors, frames, strict=True):
                collector.add(frame)
        return [collector.track() for collector in collectors]


class _Collector:
    """Collects the frames of one pass."""

    def __init__(self, wanted: _Pass, keep_on: torch.device, read: ReadFeatures | None) -> None:
        self._num_frames = wanted.encoded.num_frames
        self._order = wanted.order
        self._keep_on = keep_on
        self._read = read
        self._seen: list[Tensor] = []
        self._logits_THW: Tensor | None = None
        self._features_THWC: Tensor | None = None

    def add(self, frame: TrackedFrame) -> None:
        """Store a frame. Does not synchronise with the accelerator if everything is kept there."""
        self._seen.append(frame.visible)
        self._logits_THW = self._put(self._logits_THW, frame.index, frame.mask_logits_HW)
        if self._read is not None:
            self._features_THWC = self._put(self._features_THWC, frame.index, self._read(frame))

    def _put(self, rows: Tensor | None, index: int, row: Tensor) -> Tensor:
        if rows is None:
            rows = torch.zeros((self._num_frames, *row.shape), device=self._keep_on)
        rows[index] = row
        return rows

    def track(self) -> Track:
        """Return the collected track."""
        assert self._logits_THW is not None
        order = torch.tensor(list(self._order))
        visited_T = torch.zeros(self._num_frames, dtype=torch.bool)
        seen_T = visited_T.clone()
        visited_T[order] = True
        seen_T[order] = torch.stack(self._seen).cpu()
        return Track(
            visited_T=visited_T,
            seen_T=seen_T,
            logits_THW=self._logits_THW,
            features_THWC=self._features_THWC,
        )


def _agreement(forward: Track, backward: Track) -> float | None:
    both_T = forward.seen_T & backward.seen_T
    return cycle_consistency(forward.logits_THW, backward.logits_THW, both_T)


def _lost(detail: str) -> ClipSkipped:
    return ClipSkipped("subject_lost", detail)
