"""Tiny random encoders with a tokenizer made by hand, saved as ordinary directories."""

import json
from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "dog", "bird", "train"]


def _tokenizer(directory: Path, length: int = 8) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],  # as CLIP's; its model takes no others
    ).save_pretrained(directory)


def toy_sentence_encoder(directory: Path, pooling: str | None = None) -> Path:
    """A BERT of one layer of width 16; `pooling` as sentence-transformers notes it."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(directory)
    _tokenizer(directory)
    if pooling is not None:
        modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("mean_tokens", "cls_token")}
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling/config.json").write_text(
            json.dumps(modes | {f"pooling_mode_{pooling}": True})
        )
    return directory


def toy_clip(directory: Path) -> Path:
    """A CLIP whose towers have one layer of width 16, projecting to width 6."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=3,
        bos_token_id=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(directory)
    _tokenizer(directory)
    return directory
