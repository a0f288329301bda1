"""What importing loads: nothing heavy for the package, nothing optional for its core."""

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import personae
from personae import CODECS, LEARNED_METHODS, MERGE_METHODS

SOURCE = Path(__file__).parents[1] / "src"
OPTIONAL = (
    *("transformers", "peft", "sklearn", "ray", "datasets", "accelerate", "matplotlib"),
    *("fastapi", "uvicorn", "prometheus_client"),
)
# What needs an extra says so where it is used; these are run by commands that need it.
EXTRA = ("personae.demo", "personae.evaluate", "personae.serve", "personae.__main__")


def _run(code: str, source: Path = SOURCE) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, personae; dir(personae); personae.__version__\n"
        f"print([name for name in ('torch', 'pydantic', *{OPTIONAL}) if name in sys.modules])"
    )
    assert _run(code) == "[]"


def test_the_command_line_loads_what_one_command_needs_when_it_runs():
    code = (
        "import sys, personae.cli\n"
        "print([n for n in ('personae.evaluate', 'personae.runtime.loaded', 'personae.serve.tasks')"
        " if n in sys.modules])"
    )
    assert _run(code) == "[]"


def test_every_core_module_imports_without_the_extras_and_leaves_cuda_alone():
    found = [module.name for module in pkgutil.walk_packages(personae.__path__, "personae.")]
    core = [name for name in found if not name.startswith(EXTRA)]
    assert {"personae.cli.pack", "personae.commands.pack", "personae.ops.svd"} <= set(core)
    code = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
for name in {core}:
    importlib.import_module(name)
import torch
print(torch.cuda.is_initialized(), [n for n in {OPTIONAL} if n in sys.modules])
"""
    assert _run(code) == "False []"


def test_a_new_method_is_one_file(tmp_path: Path):
    """Its class and its function are public names, found in its file alone."""
    package = tmp_path / "personae"
    shutil.copytree(SOURCE / "personae", package, ignore=shutil.ignore_patterns("__pycache__"))
    method = (package / "methods" / "merge" / "task_arithmetic.py").read_text("utf-8")
    renamed = method.replace("TaskArithmetic", "Midway").replace("task_arithmetic", "midway")
    (package / "methods" / "merge" / "midway.py").write_text(renamed, "utf-8")
    code = """
import sys, personae
assert {"Midway", "midway"} <= set(dir(personae)) and "torch" not in sys.modules
from personae import *
import torch
print(Midway(scale=0.5)(torch.ones(2, 3)).tolist(), midway(torch.ones(2, 1), scale=2).item())
"""
    assert _run(code, tmp_path) == "[1.0, 1.0, 1.0] 4.0"


def test_every_public_name_is_there():
    for name in personae.__all__:
        assert getattr(personae, name) is not None, name
    methods = [*MERGE_METHODS.values(), *CODECS.values(), *LEARNED_METHODS.values()]
    named = {*MERGE_METHODS, *LEARNED_METHODS, *(cls.__name__ for cls in methods)}
    assert named <= set(personae.__all__) == set(dir(personae))
    try:
        personae.no_such_name  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    except AttributeError as error:
        assert str(error) == "module 'personae' has no attribute 'no_such_name'"
    else:
        raise AssertionError("a name out of nowhere")
