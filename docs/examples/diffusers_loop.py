"""A plain CogVideoX training loop in diffusers, with the Local Gram Flow loss added to it.

Legend: B clip, C channel, T frame or map of the teacher, F latent frame, H W pixels or latents,
J H W token in time, height and width, K neighbour.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import CogVideoXPipeline
from torch import Tensor, nn

from cache_schema import StoreReader, find_store
from stages.local_gram_flow import gram_flow_loss, local_gram_flow, time_weights
from stages.train_student.model.student import BlockTap, Projector
from stages.train_student.model.teacher import Teacher


class GramFlowTerm(nn.Module):
    """Local Gram Flow loss between the output of a transformer block and a cache's teacher."""

    def __init__(self, block: nn.Module, width: int, cache: str, radius: int = 3) -> None:
        super().__init__()
        self.tap, self.radius = BlockTap(block), radius
        self.reader = StoreReader(find_store(cache, "teacher"))
        self.projector = Projector(width, (512, 256, 256), smooth=True)

    def forward(self, keys: list[str], num_frames: int, token_grid: tuple[int, ...]) -> Tensor:
        """Compare the tokens that the tap took with the clips' teacher: mean loss, a scalar."""
        tokens_BJHWC = self.tap.take().unflatten(1, token_grid)
        teacher = Teacher.read(
            self.reader,
            keys,
            num_frames=num_frames,
            token_grid=token_grid[1:],
            device=tokens_BJHWC.device,
        )
        maps = teacher.valid_BT.shape[1]  # one per frame, or one per latent frame
        student_BTHWC = self.projector(tokens_BJHWC, time_weights(maps, num_frames))
        return gram_flow_loss(
            local_gram_flow(student_BTHWC, self.radius),
            teacher.gram_flows(self.radius)["forward"],
            temperature=0.1,
            divergence="kl",
            valid_BP=teacher.valid_BT[:, :-1] & teacher.valid_BT[:, 1:],
        ).mean()


def train(
    pipe: CogVideoXPipeline,
    batches: Iterable[tuple[Tensor, list[str], list[str]]],
    cache: str,
    *,
    block: int = 25,
    weight: float = 0.5,
    learning_rate: float = 1e-5,
) -> list[tuple[float, float]]:
    """Fine-tune all weights of the transformer; the two losses of each step.

    Args:
        pipe: CogVideoX 1.0, text-to-video.
        batches: videos [B, C, T, H, W] in [-1, 1], their captions, and their keys in the cache.
        cache: folder of the teacher's store.
    """
    transformer, config = pipe.transformer.train(), pipe.transformer.config
    transformer.enable_gradient_checkpointing()
    width = config.num_attention_heads * config.attention_head_dim
    gram_flow = GramFlowTerm(transformer.transformer_blocks[block], width, cache)  # added
    gram_flow.to(transformer.device)  # added
    optimizer = torch.optim.AdamW(
        [*transformer.parameters(), *gram_flow.parameters()],  # added: the projector's
        lr=learning_rate,
    )
    losses = []
    for video_BCTHW, captions, keys in batches:
        with torch.no_grad():
            latents_BCFHW = pipe.vae.encode(video_BCTHW).latent_dist.sample()
            text_BLD, _ = pipe.encode_prompt(
                captions,
                do_classifier_free_guidance=False,
                max_sequence_length=config.max_text_seq_length,
            )
        clean_BFCHW = latents_BCFHW.transpose(1, 2) * pipe.vae.config.scaling_factor
        noise_BFCHW = torch.randn_like(clean_BFCHW)
        steps = pipe.scheduler.config.num_train_timesteps
        timestep_B = torch.randint(0, steps, (len(keys),), device=clean_BFCHW.device)
        rotary = None
        if config.use_rotary_positional_embeddings:
            rotary = pipe._prepare_rotary_positional_embeddings(
                *video_BCTHW.shape[-2:], clean_BFCHW.shape[1], clean_BFCHW.device
            )
        with gram_flow.tap:  # added
            velocity_BFCHW = transformer(
                pipe.scheduler.add_noise(clean_BFCHW, noise_BFCHW, timestep_B),
                text_BLD,
                timestep_B,
                image_rotary_emb=rotary,
            ).sample
        target_BFCHW = pipe.scheduler.get_velocity(clean_BFCHW, noise_BFCHW, timestep_B)
        diffusion = F.mse_loss(velocity_BFCHW, target_BFCHW)
        _, num_latents, _, height, width = clean_BFCHW.shape  # added
        grid = (num_latents, height // config.patch_size, width // config.patch_size)  # added
        auxiliary = gram_flow(keys, video_BCTHW.shape[2], grid)  # added
        (diffusion + weight * auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((diffusion.item(), auxiliary.item()))
    return losses
