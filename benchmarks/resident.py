"""Eight tasks of a 1 % pack in memory: bytes beside the reference alone, and what decoding costs.

    python benchmarks/resident.py                          # BERT-base's shapes, a budget of 1 %
    python benchmarks/resident.py --width 64 --layers 2    # a smoke test
    python benchmarks/resident.py --keep runs/bench/bert   # leaves the pack there for the next run

Experts are a classifier with random weights and noise on all of them, packed by DTS, used in
`factored` mode. `held`: decoded tensors in the cache. `resident`: the reference, these and the task
files, which are mapped, over the reference. `peak`, of the first cache: the same with the growth of
the process's anonymous memory in place of what is held, from a pass of the reference alone to the
peak of passes of all tasks; what passes leave in holes between blocks counts. Times are of the
processor, on one thread, medians of turns: the machine may have other work.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from personae import DTS, Pack, add_tasks, load, pack
from setting import peak_memory, show


def make_pack(folder: Path, options: argparse.Namespace) -> Path:
    """The pack, task by task; what is there is kept."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        intermediate_size=4 * options.width,
    )
    model, packed = BertForSequenceClassification(config), folder / "pack"
    if not packed.exists():
        model.save_pretrained(folder / "base")
    for number in range(options.tasks):
        name = f"task-{number}"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.001 * torch.randn_like(parameter))
        if packed.exists() and name in Pack(packed).tasks:
            continue
        model.save_pretrained(folder / "expert")
        expert = {name: folder / "expert"}
        if number:
            add_tasks(packed, expert)
        else:
            pack(folder / "base", expert, packed, DTS(), budget=options.budget)
    return packed


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each size of the cache; before them, the reference alone."""
    packed = make_pack(folder, options)
    torch.set_num_threads(1)
    tasks = [*Pack(packed).tasks]
    tokens = torch.randint(1000, 2000, (options.batch, options.tokens))
    mixed = [name for name, _ in zip(itertools.cycle(tasks), tokens, strict=False)]
    first, *others = options.cache
    reference = load(packed, mode="factored", cache=first)
    codes = sum(task.bytes for task in Pack(packed).tasks.values())
    nbytes = sum(parameter.nbytes for parameter in reference.model.parameters())

    def alone() -> None:
        reference.deactivate()
        reference(tokens)

    def peak(run: Any) -> int:
        with peak_memory() as peaks:
            run()
        return peaks["anonymous"]

    ways: dict[str, Callable[[], object]] = {"reference": alone}
    held: dict[str, int] = {}
    with torch.no_grad():
        alone()  # which reads the weights
        before = peak(alone)
        growth = max(peak(lambda: reference(tokens, tasks=mixed)) for _ in range(3)) - before
        runtimes = {first: reference}
        runtimes |= {size: load(packed, mode="factored", cache=size) for size in others}
        for size, runtime in runtimes.items():
            ways[f"mixed {size}"] = lambda r=runtime: r(tokens, tasks=mixed)
            ways[f"one {size}"] = lambda r=runtime: r(tokens, tasks=tasks[0])
            ways[f"mixed {size}"]()
            held[size] = runtime.cached_bytes
        seconds = {way: list[float]() for way in ways}
        for (way, run), turn in itertools.product(ways.items(), range(options.repeats + 1)):
            start = time.process_time()
            run()
            if turn:  # the first one fills the caches again
                seconds[way].append(time.process_time() - start)
        took = {way: statistics.median(found) for way, found in seconds.items()}
    return [
        {
            "cache": size,
            "held_mb": held[size] / 1e6,
            "codes_mb": codes / 1e6,
            "reference_mb": nbytes / 1e6,
            "resident": 1 + (codes + held[size]) / nbytes,
            "peak": 1 + (codes + growth) / nbytes if size == first else None,
            "reference_ms": 1000 * took["reference"],
            "one_task_over": took[f"one {size}"] / took["reference"],
            "mixed_over": took[f"mixed {size}"] / took["reference"],
        }
        for size in options.cache
    ]


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--budget", default="1%")
    parser.add_argument("--cache", nargs="+", default=["4%", "64GB"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.keep or Path(folder), options)
    show(f"{options.tasks} tasks, budget {options.budget}, {options.batch} rows", rows)


if __name__ == "__main__":
    main()
