"""Where compiled code is kept, and what happens where it cannot be, or Numba is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CALL = """
import logging
logging.basicConfig(level=logging.DEBUG, format="%(message)s")
logging.getLogger("numba").setLevel(logging.WARNING)
import numpy as np
from personae import kernels
values = np.empty(1, np.float32)
kernels.widen(np.array([0x3F80], np.uint16), values)
print(values[0], sum(kernels.widen.stats.cache_hits.values()))
"""


def run(code: str, **environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr


def test_code_is_kept_in_the_users_cache(tmp_path: Path):
    first, _ = run(CALL, XDG_CACHE_HOME=str(tmp_path))
    again, _ = run(CALL, XDG_CACHE_HOME=str(tmp_path))
    assert (first, again) == ("1.0 0", "1.0 1")
    assert list(tmp_path.glob("personae/kernels-*/*/*.nbi"))


def test_without_a_place_to_keep_it_code_is_compiled_in_memory(tmp_path: Path):
    (tmp_path / "file").touch()  # no directory can be made below it
    found, logged = run(CALL, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert found.startswith("1.0")
    assert "compiled in memory" in logged


def test_the_users_numba_cache_holds_a_folder_for_these_loops(tmp_path: Path):
    """Numba alone would take old code for new: it looks at the file of the outer loop only."""
    run(CALL, NUMBA_CACHE_DIR=str(tmp_path))
    assert [path.name[:8] for path in tmp_path.iterdir()] == ["kernels-"]
    (tmp_path / "file").touch()
    found, logged = run(CALL, NUMBA_CACHE_DIR=str(tmp_path / "file"))
    assert found.startswith("1.0") and "compiled in memory" in logged


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_damaged_code_is_compiled_again_and_kept(kind: str, damage: str, tmp_path: Path):
    run(CALL, XDG_CACHE_HOME=str(tmp_path))
    for path in tmp_path.rglob(f"*.{kind}"):
        content = path.read_bytes()
        spoilt = {"empty": b"", "cut": content[: len(content) // 2], "text": b"no code\n" * 50}
        path.write_bytes(spoilt[damage])
    found, logged = run(CALL, XDG_CACHE_HOME=str(tmp_path))
    assert found == "1.0 0" and "compiled again" in logged
    assert run(CALL, XDG_CACHE_HOME=str(tmp_path))[0] == "1.0 1"


def test_loops_do_not_run_uncompiled():
    code = """
from personae import kernels
try:
    kernels.trim
except Exception as error:
    print(type(error).__name__, error)
"""
    found, _ = run(code, NUMBA_DISABLE_JIT="1")
    assert found.startswith("MethodError") and "NUMBA_DISABLE_JIT" in found


def test_without_numba_the_error_names_the_fix():
    code = """
import sys
sys.modules["numba"] = None
from personae import kernels
try:
    kernels.trim
except Exception as error:
    print(type(error).__name__, error)
"""
    found, _ = run(code)
    assert found.startswith("MethodError")
    assert "pip install numba" in found


def test_numba_is_loaded_only_where_loops_run():
    code = """
import sys
import personae.cli, personae.methods, personae.commands.merge
print("numba" in sys.modules)
"""
    assert run(code)[0] == "False"
