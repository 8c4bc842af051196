"""The README's table is the registry's."""

import re
from pathlib import Path

from stages import evaluate
from stages.video_scores.groups import SCORES

README = Path(evaluate.__file__).parent / "README.md"


def test_the_table_lists_every_score():
    rows = re.findall(
        r"^\| `([a-z_]+)` \| (\w+) \| ([^|]+?) \| (\w*) ?\|", README.read_text(), re.MULTILINE
    )
    assert rows == [
        (score.name, group, score.unit, score.better or "")
        for group, scores in SCORES.items()
        for score in scores
    ]
