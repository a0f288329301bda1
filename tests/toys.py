"""Tiny random transformers models, saved as ordinary checkpoint directories, and look-alikes.

Every builder draws from its own seed and leaves the global generator as it was.
"""

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def toy_bert(
    directory: Path,
    seed: int = 0,
    num_labels: int = 3,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1GB",
) -> Path:
    """BERT with a classification head: two layers of width 16, vocabulary 40."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    config.num_labels = num_labels
    return _save(
        lambda: BertForSequenceClassification(config), directory, seed, dtype, max_shard_size
    )


def toy_roberta(directory: Path, seed: int = 0, num_labels: int = 3) -> Path:
    """RoBERTa, whose head has two layers: two layers of width 16, vocabulary 40."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=14,
    )
    config.num_labels = num_labels
    return _save(
        lambda: RobertaForSequenceClassification(config), directory, seed, torch.float32, "1GB"
    )


def toy_clip_vision(directory: Path, seed: int = 0) -> Path:
    """The image encoder of CLIP: two layers of width 16, four 4x4 patches."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    return _save(lambda: CLIPVisionModel(config), directory, seed, torch.float32, "1GB")


def toy_vit(
    directory: Path,
    seed: int = 0,
    num_labels: int = 3,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1GB",
) -> Path:
    """ViT with a classification head: two layers of width 16, four 4x4 patches (conv weights)."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    config.num_labels = num_labels
    return _save(lambda: ViTForImageClassification(config), directory, seed, dtype, max_shard_size)


def toy_gpt2(
    directory: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1GB",
) -> Path:
    """GPT-2 with a tied output layer and Conv1D weights (in x out): two layers of width 16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    return _save(lambda: GPT2LMHeadModel(config), directory, seed, dtype, max_shard_size)


def toy_llama(
    directory: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1GB",
    tied: bool = False,
) -> Path:
    """Llama: two layers of width 16, grouped heads, output layer of its own unless `tied`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=12,
        tie_word_embeddings=tied,
    )
    return _save(lambda: LlamaForCausalLM(config), directory, seed, dtype, max_shard_size)


def toy_t5(
    directory: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "1GB",
) -> Path:
    """T5 with one embedding shared by encoder, decoder and output: one layer each of width 16."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return _save(lambda: T5ForConditionalGeneration(config), directory, seed, dtype, max_shard_size)


def load(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors directory, sharded or not (for comparisons in tests)."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def perturb(
    src_dir: Path,
    dst_dir: Path,
    seed: int,
    scale: float = 0.01,
    names: Collection[str] | None = None,
) -> Path:
    """Write a fine-tuned look-alike: gaussian noise of `scale` on floating tensors, or on `names`.

    Files, shards, dtypes and auxiliary files stay as they were.
    """
    shutil.copytree(src_dir, dst_dir)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(dst_dir.glob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            tensor = tensors[name]
            if tensor.is_floating_point() and (names is None or name in names):
                noise = scale * torch.randn(tensor.shape, generator=generator)
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return dst_dir


def write_sharded(directory: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    """Write shards by file name, with an index that fits them."""
    directory.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        apart = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(apart, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def _save(
    build: Callable[[], Any],
    directory: Path,
    seed: int,
    dtype: torch.dtype,
    max_shard_size: int | str,
) -> Path:
    """Build under a seed of its own, add noise so that no norm or bias is trivial, and save."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
