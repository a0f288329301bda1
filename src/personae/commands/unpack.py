"""Rebuilds an expert from a pack and its reference, as an ordinary checkpoint directory."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from personae._small_files import Unfit, read_json
from personae.checkpoints.naming import shown
from personae.packs.reader import Pack
from personae.run.outline import auxiliary_files_of
from personae.run.output import check_output, write_model
from personae.run.rebuilt import Rebuilt, left_in_words
from personae.run.reference import open_reference
from personae.run.work import Work
from personae.writers import SHARD_BYTES


def unpack(
    pack: str | Path,
    task: str,
    out: str | Path,
    *,
    base: Any = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    work: Work | None = None,
) -> Path:
    """Rebuild one expert as a checkpoint directory that `transformers` loads.

    Args:
        pack: The pack's directory.
        task: Which expert.
        out: Directory to write; must not exist, or be empty.
        base: Where the reference is, if not where the pack says.
        overwrite: Replace `out` if it exists.
        shard_bytes: Most bytes in one weight file.
        work: Workers, memory bound, device of the decoding, progress.

    Returns:
        The directory written.

    Raises:
        PersonaeError: if the pack, its reference or the output is not what it should be.
    """
    work = work or Work()
    device = work.torch_device
    out = Path(out).absolute()
    opened = Pack(Path(pack))
    left = left_in_words(opened.task(task))
    check_output(out, overwrite, inputs=[opened.directory, opened.reference_source(base)])
    work.fact("left", opened.task(task).left)
    if left:
        work.note(f"{task}: {left}")
    with closing(open_reference(opened, base, work)) as reference:
        rebuilt = Rebuilt(opened, task, reference, device)
        auxiliary_files = auxiliary_files_of(opened, task, reference)
        note_code(opened, auxiliary_files, work)
        write_model(
            out,
            list(rebuilt.specs.values()),
            rebuilt.read,
            tied=rebuilt.record.tied,
            copies=rebuilt.copies,
            computed=rebuilt.coded,
            auxiliary_files=auxiliary_files,
            cost=lambda spec: rebuilt.cost(rebuilt.reference_names.get(spec.name, "")),
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            stage=f"unpacking {task}",
            work=work,
        )
    return out


def note_code(pack: Pack, files: Mapping[str, Path | bytes], work: Work) -> None:
    """Name the files from a pack that loading with `trust_remote_code` would run, or that ask it.

    A pack may be anybody's.
    """
    from_pack = {
        name: path
        for name, path in files.items()
        if isinstance(path, Path) and path.is_relative_to(pack.directory)
    }
    found = [name for name, path in from_pack.items() if name.endswith(".py") or _asks(path)]
    if found:
        work.note(
            f"code comes from the pack: {shown(found)}; read it before you load the model with "
            "trust_remote_code"
        )


def _asks(path: Path) -> bool:
    """Whether a configuration names classes to be loaded from files."""
    if not path.name.endswith("config.json"):
        return False
    try:
        content = read_json(path)
    except Unfit:
        return False
    return isinstance(content, dict) and "auto_map" in content
