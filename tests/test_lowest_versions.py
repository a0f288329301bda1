"""The floors of dependencies, as `scripts/lowest_versions.py` reads them."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "lowest_versions.py"))


def test_everything_that_users_install_has_a_floor():
    lines = SCRIPT["requirements"](ROOT / "pyproject.toml")
    found = SCRIPT["floors"](lines)
    assert {"torch", "typer", "transformers", "matplotlib"} <= found.keys()
    assert "ruff" not in found


def test_the_highest_of_several_floors_holds():
    assert SCRIPT["floors"](["a>=4.9", "b>=1", "a>=4.56"]) == {"a": "4.56", "b": "1"}
    with pytest.raises(SystemExit, match="'numpy' has no floor"):
        SCRIPT["floors"](["numpy"])
