"""mergekit's own functions as oracle, in memory, from whatever Python has mergekit 0.1.5.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    MERGEKIT_PYTHON=/tmp/mergekit/bin/python pytest tests/methods/test_against_mergekit.py

Known differences, avoided here: masks of DARE come from another generator, so that DARE is compared
at density 1 entry by entry, and below by its norms; of entries that tie with the last one kept, an
unstable sort picks there. The base is 0, so that what is compared are task vectors, not their
rounded sums.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from registered import mergekits
from safetensors.torch import load_file, save_file

ORACLE = """
import json, sys
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import load_file, save_file
inputs, cases = load_file(sys.argv[1]), json.loads(sys.argv[2])
names = sorted(inputs)
results = {}
for number, (method, parameters) in enumerate(cases):
    listed = [n for n in names if method != "linear" or n != "base"]
    results[str(number)] = merge_tensors(
        [inputs[n] for n in listed], method, parameters=parameters, ids=listed,
        base_index=None if method == "linear" else listed.index("base"),
    )
save_file(results, sys.argv[3])
"""

WEIGHTS: list[Any] = [1.0, (0.5, 1.5, 0.7), (1.0, -0.5, 2.0)]
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("linear", {"weight": weight}) for weight in WEIGHTS),
    *(
        ("task_arithmetic", {"weight": weight, "normalize": normalize, "lambda": 0.7})
        for weight in WEIGHTS
        for normalize in (False, True)
    ),
    *(
        ("ties", {"weight": weight, "density": density} | more)
        for weight in WEIGHTS
        for density in (0.2, 0.5, 1.0, (0.1, 0.9, 0.33))
        for more in ({}, {"normalize": False, "lambda": 0.5}, {"rescale": True})
    ),
    *(
        (method, {"weight": weight, "density": 1.0} | more)
        for method in ("dare_linear", "dare_ties")
        for weight in WEIGHTS
        for more in ({}, {"normalize": True, "lambda": 0.5})
    ),
]
EXPERTS = ("a", "b", "c")


def interpreter() -> str | None:
    """The Python to ask."""
    if "MERGEKIT_PYTHON" in os.environ:
        return os.environ["MERGEKIT_PYTHON"]
    return sys.executable if importlib.util.find_spec("mergekit") else None


def by_expert(name: str, value: Any) -> Any:
    return dict(zip(EXPERTS, value, strict=True)) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def task_vectors() -> torch.Tensor:
    return torch.randn(3, 40, 25, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def theirs(task_vectors: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What mergekit makes of all cases, and of DARE at density 0.3 (the last two)."""
    python = interpreter()
    if python is None:
        pytest.skip("mergekit is not installed; name a Python that has it with MERGEKIT_PYTHON")
    folder = tmp_path_factory.mktemp("mergekit")
    stacks = dict(zip(EXPERTS, task_vectors, strict=True)) | {"base": torch.zeros(40, 25)}
    save_file({name: t.contiguous() for name, t in stacks.items()}, folder / "in.safetensors")
    one: dict[str, Any] = {"weight": (1.0, 0.0, 0.0), "density": 0.3}
    asked = [*CASES, ("dare_linear", one), ("dare_ties", one)]
    cases = [(m, {key: by_expert(key, value) for key, value in p.items()}) for m, p in asked]
    out = folder / "out.safetensors"
    command = [python, "-c", ORACLE, str(folder / "in.safetensors"), json.dumps(cases), str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    results = load_file(Path(out))
    return [results[str(number)] for number in range(len(asked))]


def ours(method: str, task_vectors: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    return mergekits(method, **settings)(task_vectors, name="w")


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n][0]}")
def test_the_same_task_vector(number: int, task_vectors: torch.Tensor, theirs: list[Any]):
    method, settings = CASES[number]
    merged = ours(method, task_vectors, settings)
    torch.testing.assert_close(merged, theirs[number], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "place"), [("dare_linear", -2), ("dare_ties", -1)])
def test_dare_restores_the_same_norm(
    method: str, place: int, task_vectors: torch.Tensor, theirs: list[Any]
):
    """One expert alone: whatever was dropped, the L1 norm is that of its task vector."""
    settings: dict[str, Any] = {"weight": (1.0, 0.0, 0.0), "density": 0.3}
    merged = ours(method, task_vectors, settings)
    norm = task_vectors[0].abs().sum()
    torch.testing.assert_close(merged.abs().sum(), norm)
    torch.testing.assert_close(theirs[place].abs().sum(), norm)
    for kept in (merged, theirs[place]):
        assert 0.2 < (kept != 0).float().mean() < 0.4
