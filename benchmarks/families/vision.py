"""Train a small vision transformer on the eight vision tasks, into `runs/families/vision`.

The base is trained from scratch on all tasks together, with one head over all classes; each
expert is the base fine-tuned on its own task with a new head.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import typer
from common import DATA, RUNS, TESTED, VALIDATION, classes_of, say, train_experts
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from personae.demo.training import complete_directory, joined, train, with_new_head
from personae.evaluate import Examples, Task, save_model

TASKS = (
    "mnist",
    "fashion_mnist",
    "kmnist",
    "notmnist",
    "sign_digits",
    "bccd_cells",
    "omniglot_alphabets",
    "quickdraw3",
)
MODEL_CLASS = "AutoModelForImageClassification"
IMAGE_SIZE = 32


def pixels(images: np.ndarray) -> Tensor:
    """Turn uint8 images into (N, 3, 32, 32) in [-1, 1]; grey is repeated, 28 padded with black."""
    values = torch.from_numpy(images).float() / 127.5 - 1
    grey = values.ndim == 3
    values = values[:, None].expand(-1, 3, -1, -1) if grey else values.movedim(-1, 1)
    margin = (IMAGE_SIZE - values.shape[-1]) // 2
    return functional.pad(values, (margin,) * 4, value=-1.0).contiguous()


def examples(images: np.ndarray, labels: Tensor) -> Examples:
    """Images as the model takes them, with their labels."""
    return {"pixel_values": pixels(images), "labels": labels}


def read_task(
    name: str, data: Path = DATA, limit: int | None = None, tested: int | None = TESTED
) -> Task:
    """Read one task.

    Args:
        name: The task's.
        data: Holds `vision/NAME`.
        limit: Training examples, drawn at random; validation takes the last of the same draw,
            which of small tasks were trained on.
        tested: Test examples, drawn at random; all of them where None.
    """
    directory = data / "vision" / name
    with np.load(directory / "data.npz") as arrays:
        splits = {
            split: (arrays[f"{split}_images"], torch.from_numpy(arrays[f"{split}_labels"]))
            for split in ("train", "test")
        }

    def drawn(split: str, kept: slice) -> Examples:
        images, labels = splits[split]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[kept]
        return examples(images[order.numpy()], labels[order])

    return Task(
        name=name,
        model_class=MODEL_CLASS,
        metric="accuracy",
        classes=classes_of(directory),
        train=drawn("train", slice(limit)),
        test=drawn("test", slice(tested)),
        validation=drawn("train", slice(-VALIDATION, None)),
    )


def train_base(tasks: Sequence[Task], epochs: int, seed: int) -> nn.Module:
    """Train the base from scratch on all tasks together."""
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    config.num_labels = sum(len(task.classes) for task in tasks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = ViTForImageClassification(config)
    train(
        base,
        joined(tasks),
        epochs=epochs,
        learning_rate=1e-3,
        batch_size=128,
        seed=seed,
        progress=say,
    )
    return base


def main(
    tasks: str = ",".join(TASKS),
    epochs: int = 4,
    base_epochs: int = 6,
    limit: int = 4000,
    seed: int = 0,
    threads: int = 1,
    data: Path = DATA,
    out: Path = RUNS / "vision",
) -> None:
    """Train the base if it is not there yet, then every expert that is not."""
    torch.set_num_threads(threads)
    base = out / "base"
    if not base.is_dir():
        say("base: all tasks together")
        model = train_base([read_task(name, data, limit) for name in TASKS], base_epochs, seed)
        with complete_directory(base) as partial:
            save_model(model, partial)

    def expert(task: Task) -> nn.Module:
        model = with_new_head(base, task, seed)
        train(
            model,
            task.train,
            epochs=epochs,
            learning_rate=5e-4,
            head_learning_rate=2e-3,
            batch_size=64,
            seed=seed,
            progress=say,
        )
        return model

    train_experts(
        [read_task(name, data, limit) for name in tasks.split(",")], out, expert, save_model
    )


if __name__ == "__main__":
    typer.run(main)
