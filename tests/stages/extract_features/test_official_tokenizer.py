"""Official sentencepiece tokenizers, and the JSON tokenizer of the demo."""

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import T5Tokenizer

CAPTIONS = ("A lion walks across a dry savanna at sunset.", "A woman pushes a weighted sled.")
EXTRA = [f"<extra_id_{number}>" for number in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files and settings of CogVideoX's tokenizer folders, over a small vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 50),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    size = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "spiece.model")
    ).vocab_size()
    special = {
        "additional_special_tokens": EXTRA,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    files = {
        "added_tokens.json": {token: size + 99 - i for i, token in enumerate(EXTRA)},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            **special,
            "extra_ids": 100,
            "legacy": True,
            "model_max_length": 226,
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("caption", CAPTIONS)
def test_it_gives_the_numbers_that_sentencepiece_gives(folder: Path, caption: str) -> None:
    tokens = T5Tokenizer.from_pretrained(folder)(
        caption, padding="max_length", max_length=226, truncation=True
    ).input_ids
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    expected = [*pieces.encode(caption), 1]
    assert tokens == expected + [0] * (226 - len(expected))
