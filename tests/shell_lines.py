"""Shell lines in which `personae` is this interpreter's."""

import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, line: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a line in a folder, with a terminal of 200 columns."""
    return subprocess.run(
        ["bash", "-c", f'personae() {{ "{sys.executable}" -m personae "$@"; }}; {line}'],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )
