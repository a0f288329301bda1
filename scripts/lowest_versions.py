"""Run the tests with the lowest version of every direct dependency that pyproject.toml allows.

    python scripts/lowest_versions.py [--venv FOLDER] [--python PYTHON] [-- ARGUMENTS OF PYTEST]

A virtual environment gets `NAME==FLOOR` for each `NAME>=FLOOR` of the package and its extras; of
all else, the tools of the tests included, what pip finds to go with these. It is kept: another run
only repeats the tests. Old releases of torch come from PyPI with the libraries of CUDA, 6 GB.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("beartype", "hypothesis", "peft", "pytest", "pytest-xdist", "hatchling", "editables")
"""What runs the tests; of `dev`, without what checks the code."""

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)>=(?P<floor>[\d.]+)")


def requirements(pyproject: Path) -> list[str]:
    """What users install: the dependencies, and those of every extra but `dev`."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    lines = project["dependencies"] + [line for name, of in extras if name != "dev" for line in of]
    return [line for line in lines if not line.startswith(f"{project['name']}[")]  # of others here


def floors(lines: Iterable[str]) -> dict[str, str]:
    """Each package's lowest version; where extras differ, the highest of these."""
    found: dict[str, str] = {}
    for line in lines:
        match = _REQUIREMENT.fullmatch(line)
        if match is None:
            sys.exit(f"pyproject.toml: '{line}' has no floor. Write NAME>=VERSION.")
        name, floor = match.groups()
        found[name] = max(found.get(name, "0"), floor, key=_release)
    return found


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def install(venv: Path, interpreter: str, pins: list[str]) -> Path:
    """The environment's interpreter; the environment is made unless it has these pins already."""
    python, note = venv / "bin" / "python", venv / "pins.txt"
    if note.exists() and note.read_text(encoding="utf-8").splitlines() == pins:
        return python
    subprocess.run([interpreter, "-m", "venv", "--clear", venv], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *pins, *TOOLS], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT], check=True)
    note.write_text("\n".join(pins), encoding="utf-8")
    return python


def main() -> None:
    """Install, show what there is, test."""
    parser = argparse.ArgumentParser(description="The tests, with the lowest versions allowed.")
    parser.add_argument("--venv", type=Path, default=ROOT / "runs" / "lowest")
    parser.add_argument("--python", default=sys.executable, help="makes the environment")
    parser.add_argument("tests", nargs="*", default=["-n", "2"], help="arguments of pytest")
    arguments = parser.parse_args()
    lowest = floors(requirements(ROOT / "pyproject.toml"))
    pins = [f"{name}=={floor}" for name, floor in lowest.items()]
    python = install(arguments.venv, arguments.python, pins)
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "freeze"], check=True)
    sys.exit(subprocess.run([python, "-m", "pytest", *arguments.tests], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
