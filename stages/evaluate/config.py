"""Settings of evaluation."""

from pydantic import Field

from stages.config import ScoreGroup, Section
from stages.video_features.config import FeaturesConfig
from stages.video_scores.vbench.config import VBenchConfig


class EvaluateConfig(Section):
    """Scores of generated videos."""

    scores: tuple[ScoreGroup, ...] = Field(default=("structure", "appearance"), min_length=1)
    """Groups of scores. structure tracks the subject with the settings of extract.teacher, and
    reads videos at the size, length and rate of data; the others read whole videos. figures is for
    the demo, whose prompts name the kind of figure; vbench needs networks (evaluate.vbench)."""
    vbench: VBenchConfig = VBenchConfig()
    """Networks of VBench's dimensions."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap that gives the 95% intervals."""
    features: FeaturesConfig = FeaturesConfig()
    max_skipped: float = Field(default=0.1, ge=0.0, le=1.0)
    """Maximum fraction of videos without a partner or without scores; above it the command exits
    with 3. 0.1 is usual."""
