"""A tiny CogVideoX folder and tiny stores, made once, and a way to train on them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from cache_schema import ArraySpec, StoreSettings, StoreWriter
from stages.clips.config import ClipsConfig
from stages.config import BaseModelConfig
from stages.progress import SilentProgress
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.gram_flow import compute_gram_flow, encode_gram_flow, flow_arrays_spec
from stages.train_student.config import TrainConfig
from tests.fingerprints import fingerprint_of

FRAMES, HEIGHT, WIDTH = 9, 32, 48
LATENT = (3, 4, 4, 6)  # frames, channels, height, width
GRID = (2, 3)
TEXT = (8, 16)
TEACHER_WIDTH = 10
KEYS = tuple(f"clip/{number}" for number in range(5))
SCRIPT = Path(__file__).with_name("train_in_subprocess.py")


def tiny_transformer(**changes):
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": LATENT[1],
        "out_channels": LATENT[1],
        "time_embed_dim": 16,
        "text_embed_dim": TEXT[1],
        "max_text_seq_length": TEXT[0],
        "num_layers": 2,
        "sample_height": LATENT[2],
        "sample_width": LATENT[3],
        "sample_frames": FRAMES,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXTransformer3DModel(**(settings | changes))


def tiny_scheduler(**changes):
    settings = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 3.0,
        "timestep_spacing": "trailing",
    }
    return CogVideoXDDIMScheduler(**(settings | changes))


def tiny_vae(**changes):
    settings = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (4, 4, 4, 4),
        "latent_channels": LATENT[1],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "scaling_factor": 0.7,
    }
    return AutoencoderKLCogVideoX(**(settings | changes))


def save_pipeline(folder, *, transformer=None, vae=None, scheduler=None):
    (transformer or tiny_transformer()).save_pretrained(folder / "transformer")
    (vae or tiny_vae()).save_config(folder / "vae")
    (scheduler or tiny_scheduler()).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    return folder


def write_store(root, kind, shapes, keys=KEYS, values=None, change=None, skipped=None):
    """A store of random arrays, the same for the same kind and key on every call.

    `valid` is all ones; `change` makes other arrays of a key and its arrays.
    """
    names = {4: "tchw", 2: "ld", 1: "t"}
    specs = {
        name: ArraySpec(
            dtype="uint8" if name == "valid" else "float16",
            shape=shape,
            dimension_names=tuple(names[len(shape)]),
        )
        for name, shape in shapes.items()
    }
    settings = StoreSettings(kind=kind, arrays=specs, values=values or {})
    writer = StoreWriter.open(root, settings, provenance={})
    with writer.shard("00000", source="made up") as shard:
        for key in keys:
            digest = hashlib.sha256(f"{kind}/{key}".encode()).digest()
            numbers = np.random.default_rng(list(digest))
            arrays = {name: _values(name, shape, numbers) for name, shape in shapes.items()}
            shard.add(
                key,
                arrays if change is None else change(key, arrays),
                fingerprint=fingerprint_of(key),
            )
        for key, reason in (skipped or {}).items():
            shard.skip(key, reason, "made up", fingerprint=fingerprint_of(key))
        shard.commit()
    return writer.path


def _values(name, shape, numbers):
    if name == "valid":
        return np.ones(shape, np.uint8)
    values = numbers.standard_normal(shape).astype(np.float16)
    return np.abs(values) * np.float16(0.1) if name.endswith("std") else values


LATENT_SHAPES = {"mean": LATENT, "std": LATENT}
DRAWS = 3
IMAGE_SHAPES = {"image_mean": (DRAWS, *LATENT[1:]), "image_std": (DRAWS, *LATENT[1:])}
IMAGE_VALUES = {"image_noise": {"draws": DRAWS}}


def teacher_shapes(maps=FRAMES, grid=GRID, width=TEACHER_WIDTH):
    return {"features": (maps, *grid, width), "valid": (maps,)}


def write_teacher(root, dtype="float16", *, keys=KEYS, maps=FRAMES, values=None):
    """A teacher store of `features_of`, as extraction encodes them."""
    specs = feature_arrays_spec((maps, *GRID, TEACHER_WIDTH), dtype)
    made = {key: encode_features(features_of(key, maps), dtype) for key in keys}
    return _write_forms(root, "teacher", specs, made, maps, values)


def write_gram_flow(root, dtype="float16", *, radius=1, keys=KEYS, maps=FRAMES, values=None):
    """A gram_flow store of the same features, rounded to float16 first, as extraction does."""
    specs = flow_arrays_spec(maps - 1, *GRID, radius, dtype)
    made = {}
    for key in keys:
        rounded = features_of(key, maps).half()
        flow_PHWK = compute_gram_flow(rounded, radius=radius, token_grid=GRID)
        made[key] = encode_gram_flow(flow_PHWK, dtype)
    values = {"pairs": "forward"} | (values or {})
    return _write_forms(root, "gram_flow", specs, made, maps, values)


def features_of(key, maps=FRAMES):
    """A key's features in float64: tokens of unit norm that change slowly, as real ones do."""
    digest = hashlib.sha256(f"features/{key}".encode()).digest()
    numbers = np.random.default_rng(list(digest))
    still_HWC = numbers.standard_normal((*GRID, TEACHER_WIDTH))
    moving_THWC = numbers.standard_normal((maps, *GRID, TEACHER_WIDTH))
    features_THWC = torch.from_numpy(still_HWC + 0.3 * moving_THWC)
    return torch.nn.functional.normalize(features_THWC, dim=-1)


def _write_forms(root, kind, specs, made, maps, values):
    valid = ArraySpec(dtype="uint8", shape=(maps,), dimension_names=("t",))
    settings = StoreSettings(kind=kind, arrays=specs | {"valid": valid}, values=values or {})
    writer = StoreWriter.open(root, settings, provenance={})
    with writer.shard("00000", source="made up") as shard:
        for key, arrays in made.items():
            shard.add(
                key, arrays | {"valid": np.ones(maps, np.uint8)}, fingerprint=fingerprint_of(key)
            )
        shard.commit()
    return writer.path


def write_inputs(root, *, latents=None, **kwargs):
    """Text and latents; `latents` are settings of the latents' store."""
    write_store(root, "text", {"embeds": TEXT}, **kwargs)
    write_store(root, "latents", LATENT_SHAPES, values=latents, **kwargs)


def write_cache(root, *, maps=FRAMES, image=False, **kwargs):
    write_store(root, "text", {"embeds": TEXT}, **kwargs)
    if image:
        of_images = kwargs | {"values": IMAGE_VALUES}
        write_store(root, "latents", LATENT_SHAPES | IMAGE_SHAPES, **of_images)
    else:
        write_store(root, "latents", LATENT_SHAPES, **kwargs)
    write_store(root, "teacher", teacher_shapes(maps), **kwargs)
    return root


@pytest.fixture(scope="session")
def tiny():
    """The helpers above, for tests: test modules cannot import a conftest."""
    return SimpleNamespace(**globals())


@pytest.fixture(scope="session", autouse=True)
def no_page():
    """Curves take seconds: a run's page is made by the tests that look at it alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "stages.train_student.validation.validation.write_report", lambda run_dir: None
        )
        yield


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache"))


CLIPS = ClipsConfig(path=Path("unused"), num_frames=FRAMES, height=HEIGHT, width=WIDTH)


def train_settings(run_dir, **changes):
    settings = {
        "run_dir": str(run_dir),
        "steps": 4,
        "batch_size": 2,
        "checkpoint_every": 2,
        "log_every": 2,
        "loader_workers": 0,
        "block": 1,
        "lgf": {"radius": 1, "projector_widths": (16, 8, 8)},
        "lora": {"rank": 4, "alpha": 2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "deepspeed": {"zero_stage": 2, "precision": "fp32"},
    }
    for name, value in changes.items():
        settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    return settings


class Lines(SilentProgress):
    """Keeps what would be printed above the bars."""

    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


@pytest.fixture
def lines():
    return Lines()


@pytest.fixture(scope="session")
def train(base_model, cache):
    """Train in this process: train(run_dir, **changed settings) -> TrainSummary."""

    def run(run_dir, *, base=base_model, cache_root=cache, progress=None, **changes):
        from stages.train_student.train import train_student

        return train_student(
            TrainConfig(**train_settings(run_dir, **changes)),
            CLIPS,
            BaseModelConfig(path=str(base)),
            cache_root,
            resolved_config={"train": {"steps": changes.get("steps", 4)}},
            provenance={"made by": "a test"},
            progress=progress or SilentProgress(),
        )

    return run


@pytest.fixture(scope="session")
def train_process(base_model, cache):
    """Start training in a process of its own: train_process(run_dir, …) -> Popen."""

    def start(run_dir, *, processes=1, fault="", base=base_model, cache_root=cache, **changes):
        request = {
            "train": train_settings(run_dir, **changes),
            "clips": CLIPS.model_dump(mode="json"),
            "base": str(base),
            "cache": str(cache_root),
            "fault": fault,
        }
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={processes}"]
        root = Path(__file__).parents[3]
        environment = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.Popen(
            [*launcher, str(SCRIPT), json.dumps(request)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture(scope="session")
def train_ranks(base_model, cache):
    """Train in forks of one process: train_ranks(run_dir, processes=2, fault=…, …) -> answer.

    The answer has `codes` and `told` of each rank, `errors` and `seconds`; faults/fork_server.py
    says what may be asked.
    """
    script = Path(__file__).with_name("faults") / "fork_server.py"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[3])}
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:

        def run(
            run_dir,
            *,
            processes=1,
            fault=None,
            spoil="",
            look=False,
            base=base_model,
            cache_root=cache,
            **changes,
        ):
            request = {
                "train": train_settings(run_dir, **changes),
                "clips": CLIPS.model_dump(mode="json"),
                "base": str(base),
                "cache": str(cache_root),
                "processes": processes,
                "fault": fault,
                "spoil": spoil,
                "look": look,
                "timeout_s": 250,
            }
            print(json.dumps(request), file=server.stdin, flush=True)
            return SimpleNamespace(**json.loads(server.stdout.readline()))

        yield run
        server.stdin.close()
