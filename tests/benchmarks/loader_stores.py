"""Stores of full-sized synthetic clips for the loader benchmark, and a web server over them.

python tests/benchmarks/loader_stores.py FOLDER serves a folder on a free port and prints it.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.students.cogvideox.configs import CogVideoXConfigs
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.gram_flow import compute_gram_flow, encode_gram_flow, flow_arrays_spec
from tests.fingerprints import fingerprint_of

MAPS, GRID, CHANNELS, RADIUS = 49, (30, 45), 512, 3
TEXT = (226, 4096)
LATENTS = (13, 16, 60, 90)
DIFFERENT_CLIPS = 8
"""A store's clips are these in turn, each in its own file."""
CLIPS_PER_SHARD = 16

Arrays = dict[str, np.ndarray]


def make_stores(folder: Path, form: str, num_clips: int, field_name: str) -> dict[str, Path]:
    """A text, a latents and a teacher store of that many clips; their folders by kind.

    Args:
        folder: the cache's.
        form: `gram_flow` or `features`, both float16.
        num_clips: in each store.
        field_name: which of `teacher_samples.FIELDS` the teacher's features are.
    """
    random = np.random.default_rng(0)
    valid = ArraySpec(dtype="uint8", shape=(MAPS,), dimension_names=("t",))
    if form == "gram_flow":
        kind, spec = "gram_flow", flow_arrays_spec(MAPS - 1, *GRID, RADIUS, "float16")
    else:
        kind, spec = "teacher", feature_arrays_spec((MAPS, *GRID, CHANNELS), "float16")
    axes = ("f", "c", "h", "w")
    latents = ArraySpec(dtype="float16", shape=LATENTS, dimension_names=axes)
    arrays = {
        "text": {"embeds": ArraySpec(dtype="float16", shape=TEXT, dimension_names=("l", "d"))},
        "latents": {"mean": latents, "std": latents},
        kind: spec | {"valid": valid},
    }
    drawn = {
        "text": _normal(random, arrays["text"]),
        "latents": _normal(random, arrays["latents"]),
        kind: [
            teacher_arrays(form, field_name, seed) | {"valid": np.ones(MAPS, np.uint8)}
            for seed in range(DIFFERENT_CLIPS)
        ],
    }
    return {
        kind: _write(folder, kind, spec, drawn[kind], num_clips) for kind, spec in arrays.items()
    }


def teacher_arrays(form: str, field_name: str, seed: int) -> Arrays:
    """A synthetic clip's teacher."""
    # Imported here: it brings in SAM2, which the workers of a spawned loader have no use for.
    from teacher_samples import field

    features = encode_features(field(field_name, seed=seed, channels=CHANNELS // 2), "float16")
    if form == "features":
        return features
    flow_PHWK = compute_gram_flow(
        torch.from_numpy(features["features"]), radius=RADIUS, token_grid=GRID
    )
    return encode_gram_flow(flow_PHWK, "float16")


def _normal(random: np.random.Generator, spec: dict[str, ArraySpec]) -> list[Arrays]:
    return [
        {
            name: random.standard_normal(array.shape, dtype=np.float32).astype(array.dtype)
            for name, array in spec.items()
        }
        for _ in range(DIFFERENT_CLIPS)
    ]


def _write(
    folder: Path, kind: str, spec: dict[str, ArraySpec], clips: list[Arrays], num_clips: int
) -> Path:
    settings = StoreSettings(kind=kind, arrays=spec, values={})
    writer = StoreWriter.open(folder, settings, provenance={})
    for start in range(0, num_clips, CLIPS_PER_SHARD):
        with writer.shard(f"{start // CLIPS_PER_SHARD:05d}", source="benchmark") as shard:
            for number in range(start, min(start + CLIPS_PER_SHARD, num_clips)):
                shard.add(
                    f"clip/{number:05d}",
                    clips[number % len(clips)],
                    fingerprint=fingerprint_of(f"clip/{number:05d}"),
                )
            shard.commit()
    writer.write_index()
    return writer.path


def configs() -> CogVideoXConfigs:
    """What training must know of CogVideoX-5B to make samples of the stores."""
    return CogVideoXConfigs(
        folder=Path(),
        transformer={
            "in_channels": LATENTS[1],
            "out_channels": LATENTS[1],
            "patch_size": 2,
            "patch_size_t": None,
            "ofs_embed_dim": None,
        },
        vae={"scaling_factor": 0.7, "invert_scale_latents": False},
        scheduler={"num_train_timesteps": 1000},
    )


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """The URL of a folder, served by a process of its own."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


class _Ranges(SimpleHTTPRequestHandler):
    """Files, whole or in part, over connections that stay open."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = min(int(asked[2]) + 1, size) if asked and asked[2] else size
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        with path.open("rb") as file:
            self.connection.sendfile(file, start, stop - start)

    def log_message(self, *_: object) -> None:
        pass


def _serve(folder: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=folder))
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1])
