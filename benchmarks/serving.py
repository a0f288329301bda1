"""Tasks in memory: samples a second and switching, beside PEFT with adapters of the same rank.

    python benchmarks/serving.py                           # eight tasks of BERT-base's shapes
    python benchmarks/serving.py --width 64 --layers 2     # a smoke test

The experts are LoRA adapters on every linear layer of a classifier with random weights; the pack
is made of them, so that both sides hold factors of one rank. All ways run in turns, `--repeats`
times, after one round that warms them up; figures are medians. A batch has `--batch` rows, which in
`mixed` are of all tasks in turn. `load_adapter` reads an adapter from disk; `cold` is an activation
with the decoding of the task, as in its first pass; `warm` finds it decoded.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from personae import SVD, Pack, Runtime, load, pack
from setting import machine, show


def make_family(folder: Path, options: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """A classifier and LoRA adapters of it, both with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        intermediate_size=4 * options.width,
    )
    base, adapters = folder / "base", dict[str, Path]()
    BertForSequenceClassification(config).save_pretrained(base)
    for number in range(options.tasks):
        name = f"task-{number}"
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=options.rank,
            target_modules="all-linear",
            task_type="SEQ_CLS",
        )
        model = get_peft_model(BertForSequenceClassification.from_pretrained(base), lora)
        for key, tensor in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(tensor, std=0.01)
        model.save_pretrained(str(folder / name))
        adapters[name] = folder / name
    return base, adapters


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall seconds of each way."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round only warms up
                seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(found) for way, found in seconds.items()}


def decode(runtime: Runtime, task: str) -> None:
    """Activate a task of which nothing is decoded, and decode it all."""
    runtime._catalogue._cache.drop(task)
    runtime.activate(task)
    for path in runtime._catalogue.paths(task).values():
        for given in (*path.whole.values(), *path.low_rank.values()):
            given()


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], ...]:
    """Time everything; rows of computing, and of switching."""
    base, adapters = make_family(folder, options)
    codec = SVD(rank_fraction=options.rank / options.width)
    packed: Pack = pack(base, adapters, folder / "pack", codec)
    factored = load(packed.directory, mode="factored", cache="4GB")
    merged = load(packed.directory)
    reference = BertForSequenceClassification.from_pretrained(base).eval()
    names = [*adapters]
    peft: Any = PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(base), adapters[names[0]], names[0]
    )
    for name in names[1:]:
        peft.load_adapter(adapters[name], name)
    peft.eval()
    tokens = torch.randint(1000, 2000, (options.batch, options.tokens))
    tasks = [name for name, _ in zip(itertools.cycle(names), range(options.batch), strict=False)]
    merged.activate(names[0])
    factored.activate(names[0])
    with torch.no_grad():
        computing = in_turns(
            {
                "reference": lambda: reference(tokens),
                "merged": lambda: merged(tokens),
                "factored": lambda: factored(tokens),
                "factored_mixed": lambda: factored(tokens, tasks=tasks),
                "peft": lambda: peft(tokens),
                "peft_mixed": lambda: peft(tokens, adapter_names=tasks),
            },
            options.repeats,
        )
    order = itertools.cycle(names)
    switching = in_turns(
        {
            "merged": lambda: merged.activate(next(order)),
            "factored_warm": lambda: factored.activate(next(order)),
            "factored_cold": lambda: decode(factored, next(order)),
            "peft_set_adapter": lambda: peft.set_adapter(next(order)),
            "peft_load_adapter": lambda: (
                peft.load_adapter(adapters[names[0]], "new"),
                peft.delete_adapter("new"),
            ),
        },
        options.repeats,
    )
    rows = [
        {
            "way": way,
            "ms": 1000 * seconds,
            "rows_a_second": options.batch / seconds,
            "times_the_reference": seconds / computing["reference"],
            "times_PEFT": seconds / computing["peft_mixed" if "mixed" in way else "peft"],
        }
        for way, seconds in computing.items()
    ]
    switches = [{"way": way, "ms": 1000 * seconds} for way, seconds in switching.items()]
    return rows, switches


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        computing, switching = measure(Path(folder), options)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": computing, "switching": switching}))
        return
    show(f"{options.tasks} tasks of rank {options.rank}, {options.batch} rows", computing)
    show("switching", switching)


if __name__ == "__main__":
    main()
