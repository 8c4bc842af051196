"""A clip size, and a tiny Grounding DINO of the official classes."""

from pathlib import Path

import pytest
import torch

from stages.clips import ClipsConfig
from tests.stages.extract_features.prompts.noise_clip import HEIGHT, NUM_FRAMES, WIDTH

MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?")
WORDS = (*MARKS, "a", "the", "dog", "cat", "red", "ball", "runs", "over", "grass")


@pytest.fixture(scope="session")
def clips() -> ClipsConfig:
    return ClipsConfig(path=Path("unused"), num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="session")
def tiny_grounding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has it: random weights, a few words."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("grounding")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    bert = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=12,
        max_text_len=16,
    )
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        model.model.decoder.layer_norm.weight.mul_(0.05)  # scores that differ, well below 1
    model.save_pretrained(folder)
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(
        folder
    )
    return folder
