"""What a score is: its name, unit, range and direction."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A number computed per video; NaN where the video does not allow it."""

    name: str
    unit: str
    """1 for a fraction without a unit."""
    lowest: float
    highest: float
    better: Literal["higher", "lower"] | None
    """None if neither is better by itself: the score explains others, such as the motion."""
    description: str
    source: str = ""
    """Where the definition comes from; empty for this project."""

    def check(self, value: float) -> float:
        """Return a value, which must be NaN or within the range up to rounding.

        Raises:
            ValueError: It is outside: the score or its range is wrong.
        """
        slack = 1e-6 * max(1.0, abs(value))
        if not math.isnan(value) and not self.lowest - slack <= value <= self.highest + slack:
            raise ValueError(
                f"{self.name} is {value}, outside of {self.lowest:g} to {self.highest:g}"
            )
        return value
