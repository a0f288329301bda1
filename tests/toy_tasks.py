"""Toy tasks with random labels, and a family of BERT-like experts for them."""

from pathlib import Path

import torch

from personae.evaluate import Task
from toys import perturb, toy_bert

NAMES = ("a", "b", "u", "v")


def toy_text_task(name: str, seed: int) -> Task:
    """Sixty random sentences of three classes."""
    generator = torch.Generator().manual_seed(seed)
    examples = {
        "input_ids": torch.randint(0, 40, (60, 8), generator=generator),
        "attention_mask": torch.ones(60, 8, dtype=torch.int64),
        "labels": torch.randint(0, 3, (60,), generator=generator),
    }
    classes = tuple(f"{name}{k}" for k in range(3))
    model_class = "AutoModelForSequenceClassification"
    return Task(name, model_class, "accuracy", classes, examples, examples)


def toy_text_family(folder: Path) -> Path:
    """A bare base, as on the hub, and four experts with a prefix and heads of their own."""
    from transformers import BertForSequenceClassification

    whole = toy_bert(folder / "whole")
    BertForSequenceClassification.from_pretrained(whole).bert.save_pretrained(folder / "base")
    for seed, name in enumerate(NAMES, 1):
        perturb(whole, folder / name, seed=seed, scale=0.3)
    return folder
