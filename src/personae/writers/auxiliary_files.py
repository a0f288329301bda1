"""The small files of a checkpoint: configuration, tokenizer, generation settings."""

import shutil
from collections.abc import Mapping
from pathlib import Path


def write_auxiliary_files(files: Mapping[str, Path | bytes], directory: Path) -> None:
    """Write small files, given by relative name as a file to copy or as content."""
    for relative, content in files.items():
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)
