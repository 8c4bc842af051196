"""A killed copy is completed by the next one, and can be read correctly in between."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cache_schema import (
    StoreNotFound,
    StoreReader,
)
from cache_schema.maintenance.copy import copy_store
from cache_schema.maintenance.drop import drop_clips
from tests.cache_schema.faults.operations import run_and_kill
from tests.cache_schema.made_stores import assert_whole, files_of
from tests.cache_schema.maintenance.copies import store_on_s3, travelling

KEYS = ["a0", "a1", "a2", "b0", "b1"]


@pytest.mark.parametrize("part", range(10))
def test_a_killed_copy_is_finished_by_the_next_one(
    part: int, tmp_path: Path, leaving_home: Path
) -> None:
    target = tmp_path / "copy" / leaving_home.name
    chance = random.Random(part)
    whole = tmp_path / "w" / leaving_home.name
    code, operations = run_and_kill(lambda: copy_store(leaving_home, whole), 0)
    assert code == 0
    kill_at = [1 + (part * operations + chance.randrange(operations)) // 10]
    kill_at += [chance.randrange(1, operations)] * (part % 2)  # and once more while it recovers
    for number in kill_at:
        run_and_kill(lambda: copy_store(leaving_home, target), number)
        if (target / "store.json").exists():
            assert_whole(target, KEYS)
        else:
            with pytest.raises(StoreNotFound):
                StoreReader(target)
    sent = {path: path.stat().st_ino for path in target.rglob("c.*")}
    copy_store(leaving_home, target)
    assert sent.items() <= {path: path.stat().st_ino for path in sent}.items()  # none sent twice
    assert files_of(target) == travelling(files_of(leaving_home))
    assert not (target / ".staging" / ".copy").exists()


@pytest.mark.parametrize("part", range(5))
def test_a_killed_update_never_loses_a_clip_that_both_have(
    part: int, tmp_path: Path, leaving_home: Path
) -> None:
    target = tmp_path / "copy" / leaving_home.name
    copy_store(leaving_home, target)
    drop_clips(leaving_home, ["a0", "b1"], detail="blurred")
    whole = shutil.copytree(target, tmp_path / "whole" / leaving_home.name)
    code, operations = run_and_kill(lambda: copy_store(leaving_home, whole), 0)
    assert code == 0
    chance = random.Random(part)
    run_and_kill(
        lambda: copy_store(leaving_home, target),
        1 + (part * operations + chance.randrange(operations)) // 5,
    )
    keys = list(StoreReader(target).keys)
    assert {"a1", "a2", "b0"} <= set(keys)
    assert_whole(target, keys)
    copy_store(leaving_home, target)
    assert files_of(target) == travelling(files_of(leaving_home))


_KILLED_PUT = """
import os, signal, sys
from cache_schema.maintenance import copy, copy_target

put, left = copy_target.UrlTarget.put, int(sys.argv[3])

def counted(self, path, data):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, path, data)

copy_target.UrlTarget.put = counted
copy.copy_store(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("part", range(3))
def test_a_killed_copy_to_s3_is_finished_by_the_next_one(
    part: int, leaving_home: Path, bucket: str
) -> None:
    url = f"{bucket}/{leaving_home.name}"
    puts = len(travelling(files_of(leaving_home)))
    kill_at = 1 + (part * puts + random.Random(part).randrange(puts)) // 3
    arguments = [sys.executable, "-c", _KILLED_PUT, str(leaving_home), url, str(kill_at)]
    killed = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -9
    with pytest.raises(StoreNotFound):
        StoreReader(url)
    report = copy_store(leaving_home, url)
    assert report.num_present >= kill_at - 8  # what was under way may be sent again
    assert store_on_s3(leaving_home) == travelling(files_of(leaving_home))
    assert_whole(url, KEYS)
