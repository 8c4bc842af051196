"""SAM2's memory bank, limited to the memories that later steps can read."""

# Legend: B stream of the batch, C channel, H W grid of the memories.

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class MemoryBank:
    """Memories and object pointers by step, in the layout that sam2's SAM2Base reads.

    The prompted step's entry is kept; older ones are dropped once SAM2, which looks back over a
    fixed number of steps, no longer reads them. The results do not change.
    """

    memory_reach: int
    """Number of steps back to the oldest memory that SAM2 reads."""
    pointer_reach: int
    """Number of steps back to the oldest object pointer that SAM2 reads."""
    outputs: dict[str, dict[int, dict[str, Any]]] = field(
        default_factory=lambda: {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    )
    """The prompted step's entry, and those of later steps."""
    _positions_1CHW: torch.Tensor | None = None

    @classmethod
    def of(cls, model: Any) -> "MemoryBank":
        """Return an empty bank with the reach of a `SAM2Base`."""
        # With a stride r, memories are at multiples of r, so the oldest can be r - 1 steps further.
        stride = model.memory_temporal_stride_for_eval
        return cls(
            memory_reach=max(1, 1 + (model.num_maskmem - 2) * stride),
            pointer_reach=model.max_obj_ptrs_in_encoder - 1,
        )

    def store(
        self,
        step: int,
        *,
        memory_BCHW: torch.Tensor,
        positions_BCHW: torch.Tensor,
        pointer_BC: torch.Tensor,
    ) -> None:
        """Store the step's memory and pointer; drop what no later step can read.

        Args:
            step: Number of the visit, from 0, the prompted one.
            memory_BCHW: The memories, in the storage dtype.
            positions_BCHW: Their position encoding, the same at every step and for every stream.
            pointer_BC: The object pointers.
        """
        if self._positions_1CHW is None:
            self._positions_1CHW = positions_BCHW[:1].clone()
        entry = {
            "maskmem_features": memory_BCHW,
            "maskmem_pos_enc": [self._positions_1CHW.expand(len(memory_BCHW), -1, -1, -1)],
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
