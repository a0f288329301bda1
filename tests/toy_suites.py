"""A suite on the toy family of BERT-like experts: sentences in files, a tokenizer, a YAML file."""

import json
from pathlib import Path

from toy_tasks import toy_text_family

WORDS = [f"w{n}" for n in range(35)]
CLASSES = ["low", "middle", "high"]
NAMES = ("a", "b")


def sentence(n: int) -> str:
    return " ".join(WORDS[(n * k + k) % 35] for k in range(1, 4 + n % 4))


def add_tokenizer(directory: Path) -> None:
    """A word-level tokenizer of the toy vocabulary of 40."""
    from transformers import BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    BertTokenizer(vocab=str(directory / "vocab.txt")).save_pretrained(directory)


def write_data(folder: Path, count: int = 24) -> None:
    folder.mkdir(parents=True)
    for split, shift in (("train", 100), ("test", 0)):
        rows = [{"text": sentence(n + shift), "label": n % 3} for n in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")


SUITE = """\
base_model: base
models: [{model: a}, {model: b}]
task_defaults:
  data: {source: "data/{name}", splits: {test: test}}
  classes: [low, middle, high]
tasks:
  - name: a
  - name: b
    metric: matthews
methods:
  - individual
  - base
  - name: TIES
    merge: {method: ties, parameters: {density: 0.5}}
  - name: DTS
    pack: {parameters: {rank_fraction: 0.5}}
"""


def toy_suite(folder: Path, text: str = SUITE) -> Path:
    """The suite's file, beside all that it names."""
    toy_text_family(folder)
    for name in NAMES:
        add_tokenizer(folder / name)
        write_data(folder / "data" / name)
    (folder / "suite.yaml").write_text(text, "utf-8")
    return folder / "suite.yaml"
