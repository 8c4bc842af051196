"""Local Gram Flow objective: similarities of each token to its window in the adjacent frame.

Legend: B clip, T map of the teacher, P pair of maps, H W token grid, C channel, K neighbour.
"""

import torch
from torch import Tensor

from stages.local_gram_flow import (
    flow_entropy,
    gram_flow_loss,
    local_gram_flow,
    reverse_pairs,
)
from stages.train_student.model.teacher import PairDirection, Teacher
from stages.train_student.objectives.config import LgfConfig
from stages.train_student.objectives.objective import Objective, only_valid

NEARLY_UNIFORM = 0.95
"""Entropy relative to a uniform choice from which a teacher is said to teach little."""


class LocalGramFlow(Objective[LgfConfig]):
    """KL divergence or squared error between the student's and the teacher's Gram flow, in float32.

    Source: Structure From Tracking, arXiv 2512.11792.
    """

    def __call__(self, student_BTHWC: Tensor, teacher: Teacher) -> Tensor:
        """loss_B, the mean over the directions of `pairs`.

        A pair is valid if both its maps are. A token's weight is taken from the query map: the
        first of a forward pair, the second of a backward pair.
        """
        lgf, valid_BT = self.settings, teacher.valid_BT
        assert valid_BT is not None, "a teacher says which maps are valid"
        weight_BTHW = None
        if lgf.foreground_weight != 1.0:
            weight_BTHW = teacher.token_weight(lgf.foreground_weight)
        losses = []
        for direction, (flow_BPHWK, teacher_BPHWK) in self.flows(student_BTHWC, teacher).items():
            query_maps = slice(None, -1) if direction == "forward" else slice(1, None)
            loss_B = gram_flow_loss(
                flow_BPHWK,
                teacher_BPHWK,
                temperature=lgf.temperature,
                divergence=lgf.divergence,
                valid_BP=valid_BT[:, :-1] & valid_BT[:, 1:],
                token_weight_BPHW=None if weight_BTHW is None else weight_BTHW[:, query_maps],
            )
            losses.append(loss_B)
        return torch.stack(losses).mean(0)

    def flows(
        self, student_BTHWC: Tensor, teacher: Teacher
    ) -> dict[PairDirection, tuple[Tensor, Tensor]]:
        """Similarities that are compared: flow_BPHWK of student and teacher, by direction."""
        lgf, valid_BT = self.settings, teacher.valid_BT
        assert valid_BT is not None, "a teacher says which maps are valid"
        student_BPHWK = local_gram_flow(
            only_valid(student_BTHWC, valid_BT), lgf.radius, kernel=lgf.kernel
        )
        of_teacher = teacher.gram_flows(lgf.radius, lgf.pairs, lgf.directions)
        return {
            direction: (
                student_BPHWK if direction == "forward" else reverse_pairs(student_BPHWK),
                teacher_BPHWK,
            )
            for direction, teacher_BPHWK in of_teacher.items()
        }

    def describe_teacher(self, teacher: Teacher) -> str | None:
        """The entropy of the teacher's Gram flow, and a warning if it is nearly uniform."""
        lgf, valid_BT = self.settings, teacher.valid_BT
        assert valid_BT is not None, "a teacher says which maps are valid"
        if lgf.divergence != "kl":
            return None
        # In a pair's other direction the entropy is much the same.
        flow_BPHWK = next(iter(teacher.gram_flows(lgf.radius, lgf.pairs, lgf.directions).values()))
        valid_BP = valid_BT[:, :-1] & valid_BT[:, 1:]
        if not valid_BP.any():
            return None
        entropy = float(flow_entropy(flow_BPHWK[valid_BP][None], lgf.temperature).mean())
        said = f"the teacher's Gram flow has {entropy:.3f} of the entropy of a uniform choice"
        if entropy < NEARLY_UNIFORM:
            return f"{said} (first batch)"
        return (
            f"warning: {said} (first batch), so that it says little about where structure moves; "
            f"a temperature below train.lgf.temperature={lgf.temperature:g} makes it more "
            "distinct, and so may other features (extract.teacher.features=memory_encoder)"
        )
