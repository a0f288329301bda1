"""Bytes that decoded tasks of a pack take in memory, beside the reference alone.

    python benchmarks/resident.py                          # BERT-base's shapes, a budget of 1 %
    python benchmarks/resident.py --width 64 --layers 2    # a smoke test

Experts are a classifier with random weights and noise on all of them, packed by DTS. Tasks are
activated one after the other in `factored` mode. Counted are bytes of tensors, not of the process.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from personae import DTS, load, pack
from setting import show


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each task that is decoded beside those before it."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        intermediate_size=4 * options.width,
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder / "base")
    reference = sum(parameter.nbytes for parameter in model.parameters())
    experts: dict[str, Path] = {}
    for number in range(options.tasks):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.001 * torch.randn_like(parameter))
        experts[f"task-{number}"] = folder / f"task-{number}"
        model.save_pretrained(experts[f"task-{number}"])
    packed = pack(folder / "base", experts, folder / "pack", DTS(), budget=options.budget)
    runtime = load(packed.directory, mode="factored", cache="64GB")
    rows: list[dict[str, Any]] = []
    for number, task in enumerate(experts):
        runtime.activate(task)
        rows.append(
            {
                "tasks_decoded": number + 1,
                "on_disk_%": 100 * packed.tasks[task].bytes / reference,
                "decoded_mb": runtime.cached_bytes / 1e6,
                "reference_mb": reference / 1e6,
                "over_reference": 1 + runtime.cached_bytes / reference,
            }
        )
    return rows


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--budget", default="1%")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options)
    show(f"tasks in memory, budget {options.budget}", rows)


if __name__ == "__main__":
    main()
