"""Curves and videos on TensorBoard and Weights & Biases; rank 0 of a training keeps one `Boards`.

Weights & Biases stays offline unless it was given a key or WANDB_MODE says otherwise: nothing
leaves the machine unasked. Its files lie in <run_dir>/wandb, to be sent later with `wandb sync`.
"""

import importlib.util
import io
import netrc
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from urllib.parse import urlsplit

import numpy as np

from cache_schema.atomic_io import naming
from cache_schema.shown_text import redacted
from stages.files.text import read_text

BoardName = Literal["tensorboard", "wandb"]

_WIDEST_GIF = 480
"""TensorBoard holds every picture in memory; wider videos are shown smaller."""


class _Board(Protocol):
    def add_scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def add_video(self, step: int, name: str, video: Path, caption: str) -> None: ...

    def flush(self) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def check_boards(report_to: Sequence[BoardName]) -> None:
    """Refuse a board whose package is not installed, before any work.

    Raises:
        ValueError: with the command that installs it.
    """
    if "wandb" in report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "train.report_to names wandb, which is not installed; pip install 'sam2videox[wandb]', "
            "or leave it out of train.report_to"
        )


class Boards:
    """Every board that `train.report_to` names, written together; none of them is fine."""

    def __init__(
        self,
        run_dir: Path,
        report_to: Sequence[BoardName],
        *,
        steps_done: int,
        project: str,
        settings: Mapping[str, Any],
    ) -> None:
        """Open the boards.

        Args:
            steps_done: what TensorBoard has been told of later steps is dropped: they come again.
            project: of Weights & Biases.
            settings: shown beside the curves of Weights & Biases.
        """
        self._boards: list[_Board] = []
        if "tensorboard" in report_to:
            self._boards.append(_TensorBoard(run_dir, steps_done))
        if "wandb" in report_to:
            self._boards.append(_WandB(run_dir, project, settings))

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each named curve, such as `train/loss`."""
        for board in self._boards:
            board.add_scalars(step, values)

    def add_video(self, step: int, name: str, video: Path, caption: str) -> None:
        """Add an mp4 under a name such as `samples/0`."""
        for board in self._boards:
            board.add_video(step, name, video, caption)

    def flush(self) -> None:
        """Write out what is held back; before each checkpoint is completed."""
        for board in self._boards:
            board.flush()

    def close(self, *, failed: bool = False) -> None:
        """Write everything out and let go of the files."""
        for board in self._boards:
            board.close(failed=failed)
        self._boards = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(failed=error is not None)


class _TensorBoard:
    def __init__(self, run_dir: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = steps_done + 1 if steps_done else None
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purged)

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def add_video(self, step: int, name: str, video: Path, caption: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        gif, height, width = _gif_of(video)
        # As torch's own add_video writes it, which needs moviepy to make the GIF.
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
            id=_kept_id(run_dir / "wandb" / "id"),
            resume="allow",
            dir=str(run_dir),
            config=redacted(dict(settings)),
            mode=_wandb_mode(),
            # The console belongs to the command, and its standard output to the answer.
            settings=wandb.Settings(
                console="off",
                silent=True,
                # W&B's metadata has the command's arguments as they are.
                x_disable_meta=redacted(sys.argv) != sys.argv,
            ),
        )
        # After a resume some steps come again; W&B's own step counter only goes up.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def add_video(self, step: int, name: str, video: Path, caption: str) -> None:
        shown = self._wandb.Video(str(video), caption=caption, format="mp4")
        self._run.log({"step": step, name: shown})

    def flush(self) -> None:
        """Nothing: W&B's own process writes each row as it comes."""

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def _kept_id(file: Path) -> str:
    """The run's id, the same after every resume."""
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        with naming(file):
            file.write_text(secrets.token_hex(4), encoding="utf-8")
    return read_text(file, limit=1024)


def _wandb_mode() -> Literal["offline", "online"] | None:
    """None, W&B's own choice, where the environment says one; online only with a key."""
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


def _gif_of(video: Path) -> tuple[bytes, int, int]:
    """The video as a GIF for ever, with its height and width."""
    from PIL import Image

    from stages.clips.video import read_video

    frames_THWC, fps = read_video(video)
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames_THWC]
    width, height = pictures[0].size
    if width > _WIDEST_GIF:
        width, height = _WIDEST_GIF, round(height * _WIDEST_GIF / width)
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
