"""What SAM2 remembers along a track, and no more than later steps can reach; for
`two_way_tracking`.
"""

# Legend: B stream of the batch, C channel, H W grid of the memories.

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class MemoryBank:
    """Memories and object pointers by step, in the layout that sam2's SAM2Base reads; old ones go.

    The prompted step's stay for good. Dropping the others changes nothing: SAM2 looks back over a
    fixed number of steps.
    """

    memory_reach: int
    """Steps back to the oldest memory that is looked at."""
    pointer_reach: int
    """Steps back to the oldest object pointer that is looked at."""
    outputs: dict[str, dict[int, dict[str, Any]]] = field(
        default_factory=lambda: {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    )
    """The prompted step's entry, and the later ones'."""
    _positions_1CHW: torch.Tensor | None = None

    @classmethod
    def of(cls, model: Any) -> "MemoryBank":
        """An empty bank that reaches back as far as a `SAM2Base` does."""
        # With a stride r the memories lie at multiples of r, so the oldest can be r - 1 further.
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
        """Keep the step's memory and pointer; drop what no later step can reach.

        Args:
            step: Number of the visit, from 0, the prompted one.
            memory_BCHW: In the format that memories are kept in.
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
