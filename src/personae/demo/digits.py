"""The demo's family: five experts on the handwritten digits that come with scikit-learn.

A small vision transformer is trained on all five tasks at once for a short time, so that the
experts start near each other, and then fine-tuned on each of them to the end.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from personae.demo.training import Progress, complete_directory, joined, train, with_new_head
from personae.evaluate import Examples, Task, save_model

MODEL_CLASS = "AutoModelForImageClassification"
THREADS = 1
"""More would only wait for each other on tensors this small, and for good on a busy machine."""
SEED = 0
TEST_IMAGES = 450

Images = Float[Tensor, "_ 8 8"]
Digits = Int[Tensor, " _"]


def digit(images: Images, digits: Digits) -> tuple[Images, Digits]:
    """Which digit is it?"""
    return images, digits


def parity(images: Images, digits: Digits) -> tuple[Images, Digits]:
    """Is it even or odd?"""
    return images, digits % 2


def turned(images: Images, digits: Digits) -> tuple[Images, Digits]:
    """By how many quarters was it turned? Asked of 2, 3, 4, 5 and 7: the rest turn into digits."""
    images = images[torch.isin(digits, torch.tensor([2, 3, 4, 5, 7]))].repeat(2, 1, 1)
    quarters = torch.arange(len(images)) % 4
    pairs = zip(images, quarters.tolist(), strict=True)
    return torch.stack([torch.rot90(image, k) for image, k in pairs]), quarters


def negative(images: Images, digits: Digits) -> tuple[Images, Digits]:
    """Which digit is it, seen in a mirror with black and white exchanged?"""
    return -images.flip(2), digits


def scrambled(images: Images, digits: Digits) -> tuple[Images, Digits]:
    """Which digit is it, with its pixels dealt out anew, always in the same way?"""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(SEED))
    return images.flatten(1)[:, order].reshape(-1, 8, 8), digits


TASKS: dict[str, tuple[Callable[[Images, Digits], tuple[Images, Digits]], tuple[str, ...]]] = {
    "digit": (digit, tuple("0123456789")),
    "parity": (parity, ("even", "odd")),
    "turned": (turned, ("not", "left", "upside down", "right")),
    "negative": (negative, tuple("0123456789")),
    "scrambled": (scrambled, tuple("0123456789")),
}


def tasks() -> dict[str, Task]:
    """Make the five tasks; the same 450 images are kept for testing in all of them."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    images = torch.as_tensor(pixels).float().reshape(-1, 8, 8)[order] / 8 - 1
    digits = torch.as_tensor(labels)[order]

    def examples(name: str, part: slice) -> Examples:
        shown, labels = TASKS[name][0](images[part], digits[part])
        return {"pixel_values": shown[:, None].contiguous(), "labels": labels}

    return {
        name: Task(
            name=name,
            model_class=MODEL_CLASS,
            metric="accuracy",
            classes=classes,
            train=examples(name, slice(TEST_IMAGES, None)),
            test=examples(name, slice(TEST_IMAGES)),
        )
        for name, (_, classes) in TASKS.items()
    }


def train_family(directory: Path, progress: Progress = lambda _: None) -> dict[str, Task]:
    """Train the base and the experts into `directory/base` and `directory/NAME`.

    What is there already is kept. Two runs with the same versions give the same numbers: the
    number of threads is fixed, every random draw is seeded, and the global random state is
    left as it was.

    Args:
        directory: Where the checkpoints go.
        progress: Told what is being trained, and the loss after each epoch.

    Returns:
        Task name to task.
    """
    family = tasks()
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        base = directory / "base"
        if not base.is_dir():
            progress("base: all tasks together")
            model = _untrained(sum(len(task.classes) for task in family.values()))
            train(
                model,
                joined(list(family.values())),
                epochs=3,
                learning_rate=1e-3,
                seed=SEED,
                progress=progress,
            )
            with complete_directory(base) as partial:
                save_model(model, partial)
        for name, task in family.items():
            if (directory / name).is_dir():
                continue
            progress(f"{name}: {len(task.train['labels'])} images")
            model = with_new_head(base, task, SEED)
            train(
                model,
                task.train,
                epochs=16,
                learning_rate=1.5e-3,
                head_learning_rate=2e-3,
                seed=SEED,
                progress=progress,
            )
            with complete_directory(directory / name) as partial:
                save_model(model, partial)
    finally:
        torch.set_num_threads(threads)
    return family


def _untrained(classes: int) -> nn.Module:
    """Make a vision transformer of 0.7 M parameters that sees an image as four patches."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    config.num_labels = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ViTForImageClassification(config)
