"""mergekit's own functions as oracle, in memory, from whatever Python has mergekit 0.1.5.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    MERGEKIT_PYTHON=/tmp/mergekit/bin/python pytest tests/methods/test_against_mergekit.py

Known differences, avoided here: masks of DARE and DELLA come from another generator, so that they
are compared at density 1 entry by entry, and below by their norms; of entries that tie with the
last one kept, an unstable sort picks there. The base of methods of task vectors is 0, so that what
is compared are these, not their rounded sums.
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
from registered import method_of
from safetensors.torch import load_file, save_file

from personae.recipe.merge_recipe import find_method

ORACLE = """
import json, sys, torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import load_file, save_file
inputs, cases = load_file(sys.argv[1]), json.loads(sys.argv[2])
results = {}
for number, (method, names, parameters) in enumerate(cases):
    results[str(number)] = merge_tensors(
        [inputs[n] for n in names], method, parameters=parameters, ids=names,
        base_index=names.index("base") if "base" in names else None,
    ).clone(memory_format=torch.contiguous_format)
save_file(results, sys.argv[3])
"""

WEIGHTS: list[Any] = [1.0, (0.5, 1.5, 0.7), (1.0, -0.5, 2.0)]
CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("linear", {"weight": weight, "normalize": normalize})
        for weight in WEIGHTS
        for normalize in (True, False)
    ),
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
CASES += [
    *(
        (method, {"weight": weight, "density": 1.0} | more)
        for method in ("della", "della_linear")
        for weight in WEIGHTS
        for more in ({}, {"normalize": True, "lambda": 0.5}, {"normalize": False})
    ),
    *(
        (method, {"weight": weight, "density": density} | more)
        for method in ("breadcrumbs", "breadcrumbs_ties")
        for weight in WEIGHTS
        for density in (0.2, 1.0, (0.1, 0.995, 0.33))
        for more in ({}, {"gamma": 0.1, "lambda": 0.5}, {"normalize": True, "rescale": True})
    ),
    *(("sce", {"select_topk": share}) for share in (0.0, 0.1, 0.5, 1.0)),
]
EXPERTS = ("a", "b", "c")
DRAWN = ("dare_linear", "dare_ties", "della_linear", "della")
MODEL_CASES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    *(
        ("slerp", ("base", other), {"t": t})
        for other in ("a", "near", "opposite", "zero")
        for t in (0.0, 0.3, 1.0)
    ),
    *(
        ("nuslerp", names, {"weight": dict(zip(names[-2:], weight, strict=True))} | more)
        for names in (("a", "b"), ("base", "a", "b"), ("a", "zero"), ("base", "near", "near_too"))
        for weight in ((1.0, 1.0), (0.2, 0.6), (1.0, -1.0))
        for more in (
            {},
            {"nuslerp_flatten": False},
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        )
    ),
    *(
        ("multislerp", names, {"weight": 0.7} | more)
        for names in (("a", "b"), ("base", "a", "b", "c"), ("base", "a"), ("base", "opposite"))
        for more in ({}, {"normalize_weights": False})
    ),
    ("multislerp", ("a", "mirrored"), {"weight": {"a": 1.0, "mirrored": 1.0}}),
    ("multislerp", ("a", "b", "c"), {"weight": {"a": 0.2, "b": 1.0, "c": -0.3}}),
    *(
        ("model_stock", names, {"filter_wise": filter_wise})
        for names in (("base", "a", "b"), ("base", "a", "b", "c"), ("base", "a", "apart"))
        for filter_wise in (False, True)
    ),
    *(("karcher", names, {}) for names in (("a", "b"), ("a", "b", "c"), ("a",), ("a", "zero"))),
    ("karcher", ("a", "b", "c"), {"max_iter": 2, "tol": 1e-3}),
    *(("nearswap", ("base", "a"), {"t": t}) for t in (1e-8, 0.01, 0.3, 100.0)),
    *(("arcee_fusion", ("base", other), {}) for other in ("a", "near", "base_too")),
    ("passthrough", ("a",), {}),
    ("passthrough", ("a",), {"scale": 0.5}),
]


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


def ask(inputs: dict[str, torch.Tensor], cases: list[Any], folder: Path) -> list[torch.Tensor]:
    """What mergekit makes of cases: method, names of inputs, parameters."""
    python = interpreter()
    if python is None:
        pytest.skip("mergekit is not installed; name a Python that has it with MERGEKIT_PYTHON")
    save_file({name: t.contiguous() for name, t in inputs.items()}, folder / "in.safetensors")
    out = folder / "out.safetensors"
    command = [python, "-c", ORACLE, str(folder / "in.safetensors"), json.dumps(cases), str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    results = load_file(out)
    return [results[str(number)] for number in range(len(cases))]


@pytest.fixture(scope="module")
def theirs(task_vectors: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What mergekit makes of all cases, and of those that are drawn (the last four)."""
    inputs = dict(zip(EXPERTS, task_vectors, strict=True)) | {"base": torch.zeros(40, 25)}
    one: dict[str, Any] = {"weight": (1.0, 0.0, 0.0), "density": 0.3}
    cases = [
        (
            method,
            [*EXPERTS] if method == "linear" else [*EXPERTS, "base"],
            {key: by_expert(key, value) for key, value in settings.items()},
        )
        for method, settings in [*CASES, *((method, one) for method in DRAWN)]
    ]
    return ask(inputs, cases, tmp_path_factory.mktemp("mergekit"))


def ours(method: str, task_vectors: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    return method_of(find_method(method, "mergekit"), **settings)(task_vectors, name="w")


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n][0]}")
def test_the_same_task_vector(number: int, task_vectors: torch.Tensor, theirs: list[Any]):
    method, settings = CASES[number]
    merged = ours(method, task_vectors, settings)
    torch.testing.assert_close(merged, theirs[number], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("place", "method"), [*enumerate(DRAWN)])
def test_dropping_restores_the_same_norm(
    place: int, method: str, task_vectors: torch.Tensor, theirs: list[Any]
):
    """One expert alone: whatever was dropped, the L1 norm is that of its task vector."""
    settings: dict[str, Any] = {"weight": (1.0, 0.0, 0.0), "density": 0.3}
    merged, other = ours(method, task_vectors, settings), theirs[len(CASES) + place]
    norm = task_vectors[0].abs().sum()
    torch.testing.assert_close(merged.abs().sum(), norm)
    torch.testing.assert_close(other.abs().sum(), norm)
    for kept in (merged, other):
        assert 0.2 < (kept != 0).float().mean() < 0.4
        if method.startswith("della"):  # from 0.15 to 0.45 by rank: 0.225 and 0.375 in the halves
            small = task_vectors[0].abs().argsort(dim=1).argsort(dim=1) < 12
            few, many = ((kept[part] != 0).float().mean() for part in (small, ~small))
            assert few < 0.29 < many


@pytest.fixture(scope="module")
def models() -> dict[str, torch.Tensor]:
    """A base, three experts, and what is degenerate."""
    base, a, b, c = torch.randn(4, 40, 25, generator=torch.Generator().manual_seed(4))
    experts = {"base": base, "a": base + 0.5 * a, "b": base + b + 0.3 * a, "c": base + c + 0.2 * a}
    return experts | {
        "near": base + 0.01 * a,
        "near_too": base + 0.01 * a + 1e-4 * b,
        "opposite": -base,
        "mirrored": -base - 0.5 * a,
        "apart": base - 0.3 * a + 0.1 * b,
        "zero": torch.zeros(40, 25),
        "base_too": base.clone(),
    }


@pytest.fixture(scope="module")
def their_models(
    models: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> list[torch.Tensor]:
    cases = [(method, list(names), settings) for method, names, settings in MODEL_CASES]
    return ask(models, cases, tmp_path_factory.mktemp("mergekit"))


@pytest.mark.parametrize(
    "number", range(len(MODEL_CASES)), ids=lambda n: f"{n}-{'-'.join(MODEL_CASES[n][:1])}"
)
def test_the_same_model(
    number: int, models: dict[str, torch.Tensor], their_models: list[torch.Tensor]
):
    method, names, given = MODEL_CASES[number]
    cls = find_method(method, "mergekit")
    experts = [name for name in names if name != "base"]
    settings = {
        key: tuple(value[name] for name in experts) if isinstance(value, dict) else value
        for key, value in given.items()
    }
    has_base, stack = "base" in names, torch.stack([models[name] for name in names])
    added = torch.zeros(40, 25)
    if has_base and cls.needs in ("deltas", "base", "either"):
        added = models["base"]
        stack = torch.stack([models[name] for name in experts]) - added
    merged = added + method_of(cls, **settings)(stack)
    torch.testing.assert_close(merged, their_models[number], rtol=2e-5, atol=2e-5)
