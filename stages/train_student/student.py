"""The student: the CogVideoX transformer that is trained, its projector, and the tap between them.

Legend: B clip, F latent frame, C channel, H W latent or token grid, J token in time, T frame of the
teacher, N token, L text token, D width.
"""

from typing import Any

from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from stages.train_student.projector import Projector

BlockOutput = tuple[Tensor, Tensor]


class Student(nn.Module):
    """Transformer and projector under one forward pass, as the engine wants them.

    A hook on the taught block takes its image tokens. It is armed once per forward pass, so the
    block's second run, which gradient checkpointing makes in the backward pass, is not captured.
    """

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        projector: Projector | None = None,
        block: int | None = None,
    ) -> None:
        """Wrap `transformer`; with a `projector`, tap the block of that index."""
        super().__init__()
        self.transformer = transformer
        self.projector = projector
        self._armed = False
        self._tokens_BND: Tensor | None = None
        if projector is not None:
            if block is None or not 0 <= block < len(transformer.transformer_blocks):
                raise ValueError(
                    f"train.block must be under {len(transformer.transformer_blocks)}, "
                    f"the transformer's number of blocks, got {block}"
                )
            transformer.transformer_blocks[block].register_forward_hook(self._tap)

    def _tap(self, module: nn.Module, inputs: Any, output: BlockOutput) -> None:
        if self._armed:
            self._tokens_BND, self._armed = output[0], False

    def forward(
        self,
        latents_BFCHW: Tensor,
        text_BLD: Tensor,
        timestep_B: Tensor,
        token_grid: tuple[int, int, int],
        rotary: tuple[Tensor, Tensor] | None = None,
        ofs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the velocity and, if there is a projector, the features to compare.

        Args:
            latents_BFCHW: noisy latents, with the first frame's on further channels if the model
                takes them.
            text_BLD: text embeddings.
            timestep_B: int64.
            token_grid: tokens in time, height and width.
            rotary: cosines and sines of the positions.
            ofs: offset of CogVideoX 1.5 image-to-video.

        Returns:
            velocity_BFCHW, and features_BTHWC or None.
        """
        self._armed = self.projector is not None
        velocity_BFCHW = self.transformer(
            hidden_states=latents_BFCHW,
            encoder_hidden_states=text_BLD,
            timestep=timestep_B,
            ofs=ofs,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        if self.projector is None:
            return velocity_BFCHW, None
        tokens_BND, self._tokens_BND = self._tokens_BND, None
        assert tokens_BND is not None, "the tapped block did not run"
        return velocity_BFCHW, self.projector(tokens_BND.unflatten(1, token_grid))
