"""Official sentencepiece tokenizers, and the JSON tokenizer of the demo."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Tokenizer

from stages.students.weights import load_tokenizer

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


UMT5_PIECES = ("<pad>", "</s>", "<s>", "<unk>", "▁a", "▁lion", "▁walks", "▁")


@pytest.fixture
def umt5(tmp_path) -> Path:
    """A pipeline with the files of Wan's tokenizer folder: <s> is token 2, and <unk> is 3."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    vocabulary = [(piece, -float(place)) for place, piece in enumerate(UMT5_PIECES)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = named | {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"vocab_size": 400}')
    return tmp_path


def test_an_unknown_character_is_the_vocabularys_unknown_token(umt5: Path) -> None:
    tokens = load_tokenizer(umt5)("a lion 獅 walks", padding="max_length", max_length=9)
    by_hand = ["▁a", "▁lion", "▁", "<unk>", "▁walks", "</s>", "<pad>", "<pad>", "<pad>"]
    assert tokens.input_ids == [UMT5_PIECES.index(piece) for piece in by_hand]
    assert tokens.attention_mask == [1] * 6 + [0] * 3


def test_another_unknown_token_than_t5s_needs_the_json_file(umt5: Path) -> None:
    (umt5 / "tokenizer" / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 50),
        model_prefix=str(umt5 / "tokenizer" / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="has <unk> as token 3, where T5 has it as 2, and no tok"):
        load_tokenizer(umt5)
