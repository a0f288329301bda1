"""The demo: a family trained from nothing but scikit-learn's digits, packed, rebuilt, scored."""

from collections.abc import Callable
from pathlib import Path

import torch

from personae.demo.digits import THREADS, train_family
from personae.evaluate import Record
from personae.evaluate.comparison import compare
from personae.evaluate.rows import demo_rows
from personae.run.work import Work


def run_demo(directory: Path, say: Callable[[str], None], work: Work) -> list[Record]:
    """Train base and experts, pack them by DTS-T and DTS-D, rebuild and score them.

    Args:
        directory: Where checkpoints and packs go; what is trained there already is kept.
        say: Told what is going on, a line each.
        work: Workers and progress.

    Returns:
        A record a method; two runs with the same versions return the same.
    """
    threads = torch.get_num_threads()
    tasks = train_family(directory, say)
    torch.set_num_threads(THREADS)  # scores must not depend on the machine's cores either
    try:
        return compare(
            directory / "base",
            {name: directory / name for name in tasks},
            list(tasks.values()),
            demo_rows(),
            keep=directory / "packs",
            work=work,
        )
    finally:
        torch.set_num_threads(threads)
