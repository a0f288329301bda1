"""A task as a suite declares it, and what is read of it: data, classes, metric, head."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from personae._quiet import quiet_transformers
from personae._small_files import Unfit, read_json
from personae.checkpoints.opening import expanded
from personae.errors import Faults, PersonaeError, RecipeError, nearest
from personae.evaluate.data import Column, Columns, DataSettings, read_splits
from personae.evaluate.images import ImageSettings, Preprocessing
from personae.evaluate.metrics import check_fits, metric_name
from personae.evaluate.models import load_model
from personae.evaluate.tasks import Examples, Task, ZeroShot
from personae.evaluate.zero_shot import TEMPLATES, zero_shot_head
from personae.recipe._base import Strict

Problem = Literal["text_classification", "text_regression", "image_classification", "zero_shot"]

_MODEL_CLASSES: Mapping[Problem, str] = {
    "text_classification": "AutoModelForSequenceClassification",
    "text_regression": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "zero_shot": "AutoModel",
}
_LONGEST_TEXT = 512


class TaskSettings(Strict):
    """What a suite says of a task; all but `name` and `data` has a default."""

    name: str = Field(min_length=1)
    data: DataSettings
    problem: Problem = "text_classification"
    model_class: str | None = None
    metric: str | None = None
    classes: str | list[str] | None = None
    max_length: Annotated[int, Field(gt=0)] | None = None
    image: ImageSettings = Field(default=ImageSettings())
    templates: list[str] = Field(default=list(TEMPLATES))
    text_model: str | None = None

    @property
    def of_text(self) -> bool:
        """Whether its examples are texts."""
        return self.problem.startswith("text")

    @property
    def of_numbers(self) -> bool:
        """Whether its answers are numbers."""
        return self.problem == "text_regression"


def read_task(
    settings: TaskSettings, expert: Path, folder: Path, text_model: Path | None = None
) -> Task:
    """Read a task's data, and look whether expert, classes and metric fit it.

    Args:
        settings: What is declared.
        expert: The checkpoint directory of its expert.
        folder: From which relative paths count.
        text_model: A whole CLIP model, for tasks without a trained head.

    Raises:
        RecipeError: with all that is wrong.
    """
    faults = Faults()
    classes = _attempt(faults, lambda: _classes(settings, expert, folder))
    metric = _attempt(faults, lambda: _metric(settings, classes))
    model_class = _attempt(faults, lambda: _model_class(settings))
    _attempt(faults, lambda: _check_head(settings, expert, classes))
    _attempt(faults, lambda: _check_templates(settings))
    wanted: list[Column] = ["text"] if settings.of_text else ["image"]
    if "text_pair" in settings.data.columns:
        wanted.append("text_pair")
    if classes is not None or settings.of_numbers:
        named = None if settings.of_numbers else classes
        splits = _attempt(faults, lambda: read_splits(settings.data, wanted, folder, named))
    else:
        splits = None
    faults.raise_if_any(RecipeError)
    assert splits is not None and metric is not None and model_class is not None
    image = None if settings.of_text else settings.image.over(expert)
    found = {split: _encoded(settings, columns, expert, image) for split, columns in splits.items()}
    if "test" not in found:
        raise RecipeError("No split named test: what shall it be scored on?")
    return Task(
        name=settings.name,
        model_class=model_class,
        metric=metric,
        classes=tuple(classes or ()),
        train=found.get("train", {}),
        test=found["test"],
        validation=found.get("validation"),
        pixels=image.pixels if image is not None else None,
        zero_shot=_zero_shot(settings, classes or (), text_model),
    )


def _attempt(faults: Faults, step: Any) -> Any:
    """What a step gives; None where it finds faults, which are noted."""
    try:
        return step()
    except PersonaeError as error:
        faults.take(error)
        return None


def _metric(settings: TaskSettings, classes: Sequence[str] | None) -> str:
    default = "pearson_spearman" if settings.of_numbers else "accuracy"
    name = metric_name(settings.metric or default)
    if settings.of_numbers or classes is not None:
        check_fits(name, None if settings.of_numbers else len(classes or ()))
    return name


def _model_class(settings: TaskSettings) -> str:
    import transformers

    name = settings.model_class or _MODEL_CLASSES[settings.problem]
    if not hasattr(transformers, name):
        known = [one for one in dir(transformers) if one.startswith("AutoModel")]
        raise RecipeError(f"transformers has no class '{name}'. {nearest(name, known)}")
    return name


def _classes(settings: TaskSettings, expert: Path, folder: Path) -> list[str] | None:
    """Class names in label order: given, in a file, or in the expert's config.json.

    Raises:
        RecipeError: if there are none, or one twice.
    """
    if settings.of_numbers:
        return None
    if isinstance(settings.classes, list):
        found = settings.classes
    elif isinstance(settings.classes, str):
        found = _classes_in(folder / expanded(settings.classes))
    else:
        labels = _labels(expert)
        found = [str(labels[key]) for key in sorted(labels, key=int)]
        if settings.problem == "zero_shot":
            found = []
    if len(found) < 2:
        raise RecipeError("Two classes or more are needed: name them under classes.")
    if len({*found}) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise RecipeError(f"Two classes are named '{twice}'.")
    return found


def _classes_in(path: Path) -> list[str]:
    """Class names in a JSON file: a list, or a mapping with a list under `classes`.

    Raises:
        RecipeError: if it is another file.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise RecipeError(f"The classes in {path} cannot be read: {error.strerror}.") from error
    except Unfit as error:
        raise RecipeError(f"{path} {error}.") from error
    names = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{path} holds no list of class names.")
    return names


def _check_head(settings: TaskSettings, expert: Path, classes: Sequence[str] | None) -> None:
    """Refuse an expert whose head has another number of outputs than the task has answers.

    Raises:
        RecipeError: naming both.
    """
    if settings.problem == "zero_shot" or (classes is None and not settings.of_numbers):
        return
    outputs = len(_labels(expert)) or _config(expert).get("num_labels", 2)
    wanted = 1 if settings.of_numbers else len(classes or ())
    if outputs != wanted:
        answers = "a number is one output" if settings.of_numbers else f"there are {wanted} classes"
        raise RecipeError(
            f"The head of {expert} has {outputs} outputs, and {answers}. Name the classes that it "
            "was trained on, or another expert."
        )


def _check_templates(settings: TaskSettings) -> None:
    odd = [one for one in settings.templates if one.count("{}") != 1 or one.count("{") != 1]
    if odd or not settings.templates:
        told = f"'{odd[0]}' has not" if odd else "There is no template with"
        raise RecipeError(f"{told} one {{}} in the place of a class name: 'a photo of a {{}}.'")


def _labels(expert: Path) -> Mapping[str, Any]:
    """The names of the outputs of an expert's head, by their numbers; empty if it says none.

    Raises:
        RecipeError: if what it says is something else.
    """
    labels = _config(expert).get("id2label") or {}
    if not isinstance(labels, dict) or not all(key.isdecimal() for key in labels):
        raise RecipeError(f"{expert}: id2label in config.json is no mapping of numbers to names.")
    return labels


def _config(expert: Path) -> dict[str, Any]:
    try:
        content = read_json(expert / "config.json")
    except (OSError, Unfit, json.JSONDecodeError) as error:
        raise RecipeError(f"{expert} has no config.json that can be read: {error}.") from error
    return content if isinstance(content, dict) else {}


def _encoded(
    settings: TaskSettings, columns: Columns, expert: Path, image: Preprocessing | None
) -> Examples:
    """Columns as tensors: tokens of text, bytes of images."""
    labels = {"labels": torch.as_tensor(columns["label"])}
    if image is not None:
        return {"pixel_values": image.as_bytes(columns["image"])} | labels
    return _tokens(settings, columns, expert) | labels


def _tokens(settings: TaskSettings, columns: Columns, expert: Path) -> Examples:
    import transformers

    with quiet_transformers():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(expert)
        except Exception as error:  # transformers raises many kinds; all mean the same here
            raise RecipeError(f"{expert} has no tokenizer that transformers can read.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    longest = min(tokenizer.model_max_length, _LONGEST_TEXT)
    pairs = [list(columns["text_pair"])] if "text_pair" in columns else []
    found = tokenizer(
        list(columns["text"]),
        *pairs,
        truncation=True,
        max_length=settings.max_length or longest,
        padding=True,
        return_tensors="pt",
    )
    return {name: found[name] for name in tokenizer.model_input_names if name in found}


def _zero_shot(
    settings: TaskSettings, classes: Sequence[str], text_model: Path | None
) -> ZeroShot | None:
    import transformers

    if settings.problem != "zero_shot":
        return None
    assert text_model is not None
    model = load_model(text_model, "AutoModel")
    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(text_model)
    return zero_shot_head(model, tokenizer, classes, settings.templates)
