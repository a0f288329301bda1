"""Memory of measuring and extracting: what is asked for is not exceeded, inside operations too."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from families import saved
from memory_count import peak_bytes
from personae.errors import BudgetError
from personae.family.carried import Carried
from personae.family.opened import open_family
from personae.run.changes import of_expert
from personae.run.extract import measure, write_adapter
from personae.run.work import Work
from personae.writers.adapter import AdapterSpec, AdapterWriter

NAME, SHAPE, RANK = "layers.0.up.weight", (1800, 600), 16


def asked(run: Callable[[Work], Any]) -> int:
    """The memory that a run says it needs."""
    with pytest.raises(BudgetError) as refused:
        run(Work(workers=1, memory=1))
    found = re.search(r"needs ([\d,]+) bytes", str(refused.value))
    assert found
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_memory_than_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=draw)
    saved({NAME: weight.to(dtype)}, tmp_path / "base")
    saved({NAME: (weight + torch.randn(SHAPE, generator=draw)).to(dtype)}, tmp_path / "expert")
    carried = Carried({NAME: "layers.0.up"}, {}, (), ())
    spec = AdapterSpec({"layers.0.up": SHAPE}, {"layers.0.up": RANK}, dtype)
    with open_family(tmp_path / "base", {"x": tmp_path / "expert"}, for_pack=True) as family:
        changes = of_expert(family.experts["x"], family.base)

        def look(work: Work) -> None:
            measure(changes, [NAME], spectra=True, work=work)

        def write(work: Work) -> None:
            folder = tmp_path / f"out{work.memory}"
            folder.mkdir()
            with AdapterWriter(folder, spec) as writer:
                write_adapter(changes, carried, {NAME: RANK}, frozenset(), dtype, writer, work)

        for run in (look, write):
            needed = asked(run)
            run(Work(workers=1))  # imports
            assert peak_bytes(partial(run, Work(workers=1, memory=needed))) <= needed
