"""A tracker's memory bank, limited to the memories that later steps can read."""

# Legend: B stream of the batch, C channel.

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class MemoryBank:
    """Memories and object pointers by step, in the layout that sam2's SAM2Base reads.

    The prompted step's entry is kept; older ones are dropped once the tracker, which looks back
    over a fixed number of steps, no longer reads them. The results do not change.
    """

    memory_reach: int
    """Number of steps back to the oldest memory that the tracker reads."""
    pointer_reach: int
    """Number of steps back to the oldest object pointer that the tracker reads."""
    outputs: dict[str, dict[int, dict[str, Any]]] = field(
        default_factory=lambda: {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    )
    """The prompted step's entry, and those of later steps."""
    _positions: torch.Tensor | None = None

    def store(
        self,
        step: int,
        *,
        memory: torch.Tensor,
        positions: torch.Tensor,
        pointer_BC: torch.Tensor,
    ) -> None:
        """Store the step's memory and pointer; drop what no later step can read.

        Args:
            step: Number of the visit, from 0, the prompted one.
            memory: The memories, [B, ...], in the storage dtype.
            positions: Their position encoding, the same at every step and for every stream.
            pointer_BC: The object pointers.
        """
        if self._positions is None:
            self._positions = positions[:1].clone()
        entry = {
            "maskmem_features": memory,
            "maskmem_pos_enc": [self._positions.expand_as(memory)],
            "obj_ptr": pointer_BC,
        }
        if step == 0:
            self.outputs["cond_frame_outputs"][0] = entry
            return
        recent = self.outputs["non_cond_frame_outputs"]
        recent[step] = entry
        for old in [s for s in recent if s <= step - self.memory_reach]:
            recent[old]["maskmem_features"] = None
            if old <= step - self.pointer_reach:
                del recent[old]
