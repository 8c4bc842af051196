"""TensorBoard and Weights & Biases loggers for curves and sample videos; on rank 0 only.

Weights & Biases runs offline unless an API key is configured or WANDB_MODE says otherwise, so no
data leaves the machine unasked. Its files are in <run_dir>/wandb; `wandb sync` uploads them later.
"""

import importlib.util
import io
import netrc
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np

from cache_schema.atomic_io import add_path_to_errors
from cache_schema.shown_text import redacted
from stages.files.text import read_text

TrackerName = Literal["tensorboard", "wandb"]

_MAX_GIF_WIDTH = 480
"""Wider videos are downscaled, since TensorBoard holds all images in memory."""


class _Tracker(Protocol):
    def add_scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def add_video(self, step: int, name: str, video: Path, caption: str) -> None: ...

    def flush(self) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def check_trackers(report_to: Sequence[TrackerName]) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        ValueError: one is not; gives the command that installs it.
    """
    if "wandb" in report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "train.report_to names wandb, which is not installed; pip install 'sam2videox[wandb]', "
            "or leave it out of train.report_to"
        )


class Trackers:
    """All trackers that `train.report_to` names; may be empty."""

    def __init__(
        self,
        run_dir: Path,
        report_to: Sequence[TrackerName],
        *,
        steps_done: int,
        project: str,
        settings: Mapping[str, Any],
    ) -> None:
        """Open the trackers.

        Args:
            steps_done: TensorBoard events of later steps are purged, since the steps are repeated.
            project: W&B project name.
            settings: logged as the W&B config.
        """
        self._trackers: list[_Tracker] = []
        if "tensorboard" in report_to:
            self._trackers.append(_TensorBoard(run_dir, steps_done))
        if "wandb" in report_to:
            self._trackers.append(_WandB(run_dir, project, settings))

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each named curve, such as `train/loss`."""
        for tracker in self._trackers:
            tracker.add_scalars(step, values)

    def add_video(self, step: int, name: str, video: Path, caption: str) -> None:
        """Add an mp4 under a name such as `samples/0`."""
        for tracker in self._trackers:
            tracker.add_video(step, name, video, caption)

    def flush(self) -> None:
        """Flush buffered events; called before each checkpoint."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self, *, failed: bool = False) -> None:
        """Flush and close all trackers."""
        for tracker in self._trackers:
            tracker.close(failed=failed)
        self._trackers = []


class _TensorBoard:
    def __init__(self, run_dir: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = steps_done + 1 if steps_done else None
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def add_video(self, step: int, name: str, video: Path, caption: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        gif, height, width = _to_gif(video)
        # Same format as torch's add_video, which would need moviepy.
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._writer._get_file_writer().add_summary(summary, step)
        self._writer.add_text(f"{name}/caption", caption, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path, project: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = wandb.init(
            project=project,
            name=run_dir.name,
            id=_run_id(run_dir / "wandb" / "id"),
            resume="allow",
            dir=str(run_dir),
            config=redacted(dict(settings)),
            mode=_wandb_mode(),
            # No console output: stdout is reserved for the command's result.
            settings=wandb.Settings(
                console="off",
                silent=True,
                # W&B's metadata would hold the command line, including credentials.
                x_disable_meta=redacted(sys.argv) != sys.argv,
            ),
        )
        # Steps may repeat after a resume; W&B's own step counter only increases.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def add_video(self, step: int, name: str, video: Path, caption: str) -> None:
        clip = self._wandb.Video(str(video), caption=caption, format="mp4")
        self._run.log({"step": step, name: clip})

    def flush(self) -> None:
        """Do nothing: W&B's background process writes each row at once."""

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def _run_id(file: Path) -> str:
    """W&B id of the run, saved so that a resume continues the same W&B run."""
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        with add_path_to_errors(file):
            file.write_text(secrets.token_hex(4), encoding="utf-8")
    return read_text(file, limit=1024)


def _wandb_mode() -> Literal["offline", "online"] | None:
    """None (let W&B read WANDB_MODE) if that is set; otherwise online only with an API key."""
    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc() else "offline"


def _key_in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = os.environ.get("NETRC")
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _to_gif(video: Path) -> tuple[bytes, int, int]:
    """Encode the video as a looping GIF; returns it with its height and width."""
    from PIL import Image

    from stages.clips.video.decoding import read_video

    frames_THWC, fps = read_video(video)
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames_THWC]
    width, height = pictures[0].size
    if width > _MAX_GIF_WIDTH:
        width, height = _MAX_GIF_WIDTH, round(height * _MAX_GIF_WIDTH / width)
        pictures = [picture.resize((width, height)) for picture in pictures]
    file = io.BytesIO()
    pictures[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
    )
    return file.getvalue(), height, width
