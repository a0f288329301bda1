"""What a pack says, held to itself, to its codec and to its reference, before anything is read.

A pack may come from anybody, and its checksums are no secret: whatever it says is wrong until it
has been checked. Types, closed sets and ranges are the manifest's; here is what fields say of each
other.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from personae._small_files import read_json
from personae._types import TensorSpec
from personae._version import __version__
from personae.checkpoints.naming import Renaming
from personae.errors import MethodError, PackError
from personae.methods import CODECS, Block, Codec, block_layout, build, lookup, misfits
from personae.packs.manifest import (
    FORMAT,
    FORMAT_VERSIONS,
    MANIFEST_NAME,
    REFERENCE,
    ROUTER,
    SHARED,
    TASKS,
    BlockRecord,
    Manifest,
    PrivateRecord,
    RouterRecord,
    SharedRecord,
    TaskRecord,
    TensorRecord,
    checksum,
    dtype_of,
)

_MOST_TOLD = 8
_MOST_SHOWN = 60
_MOST_ELEMENTS = 2**53


def parse_manifest(path: Path) -> Manifest:
    """Read and check a pack.json.

    Raises:
        PackError: if it is missing, damaged, foreign, of a newer version, or contradicts itself.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise PackError(
            f"{path.parent} is no pack: it has no {MANIFEST_NAME}. "
            "Give the directory that 'personae pack' wrote."
        ) from None
    except (ValueError, OSError) as error:
        raise PackError(f"{path} cannot be read ({error}). Restore it from a copy.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PackError(f'{path} does not say "format": "{FORMAT}"; it is no pack of this tool.')
    version = content.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise PackError(
            f"{path} is of pack format {_shown(version)}; this tool ({__version__}) reads formats "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}. Update personae."
        )
    stated = content.pop("checksum", None)
    try:
        found = checksum(content)
    except ValueError:
        raise PackError(_malformed(path, ["it holds a number that is not finite"])) from None
    if stated != found:
        raise PackError(f"{path} is damaged: its checksum does not hold. Restore it from a copy.")
    del content["format_version"]
    try:
        manifest = Manifest(**content)
    except ValidationError as error:
        raise PackError(_malformed(path, _texts(error))) from error
    if manifest.format_version > version:
        raise PackError(_malformed(path, [f"it holds what format {version} cannot say"]))
    faults = [*_faults(manifest)]
    if faults:
        raise PackError(_malformed(path, faults))
    return manifest


def codec_of(manifest: Manifest, task: TaskRecord | None = None) -> Codec:
    """The codec with the parameters that were asked for, or those used for a task.

    Raises:
        PackError: if there is no such codec, or it has no such parameters.
    """
    if manifest.method not in CODECS:
        raise PackError(f"there is no codec {_shown(manifest.method)}")
    try:
        parameters = manifest.parameters if task is None else task.parameters
        return build(lookup(CODECS, manifest.method), parameters)
    except MethodError as error:
        raise PackError(str(error)) from error


def block_shape(shape: tuple[int, ...], block: BlockRecord) -> tuple[int, ...]:
    """Shape of a block of a tensor of this shape."""
    return Block(block.axis, block.start, block.stop).shape_in(shape)


def own_path(directory: Path, relative: str) -> Path:
    """Where a file or folder of a pack lies, there or not; links are not followed.

    Raises:
        PackError: if it, or a folder it is in, is a link: what lies behind one is not the pack's.
    """
    path = directory
    for part in PurePosixPath(relative).parts:
        path /= part
        if path.is_symlink():
            raise PackError(
                f"{path} is a link, and nothing behind a link is read, written or removed as a "
                "part of a pack. Copy the pack with its links followed (cp -RL)."
            )
    return path


def check_fit(where: Path, name: str, task: TaskRecord, specs: Mapping[str, TensorSpec]) -> None:
    """Hold the record of a task to the headers of the reference.

    Raises:
        PackError: naming what is not the reference's: names, shapes, dtypes, rows.
    """
    faults = [*_misfits(task, specs)]
    if faults:
        raise PackError(
            f"{where}: task '{name}' does not fit its reference: {_joined(faults)}. The pack was "
            "damaged or changed: fetch it again."
        )


def expert_names(task: TaskRecord, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The expert's name of each reference tensor it has, other than those kept whole."""
    rule, absent, grown = _rule(task), set(task.absent), set(task.grown)
    names: dict[str, str] = {}
    for ref_name in specs:
        name = rule.expert_name(ref_name)
        if ref_name not in absent and (name not in task.private or ref_name in grown):
            names[name] = ref_name
    return names


def stored_names(task: TaskRecord, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """What a task calls the reference's tensors, absent ones too: its name to the reference's."""
    rule = _rule(task)
    return {rule.expert_name(name): name for name in specs}


def _faults(manifest: Manifest) -> Iterator[str]:
    """What is wrong with a manifest, as far as itself and its codec tell."""
    reference = manifest.reference
    merged = manifest.vector == "difference"
    if (reference.kind == "merged") != merged or (merged and reference.source != REFERENCE):
        yield (
            f"reference: {reference.kind} {_shown(reference.source)}, where vectors are "
            f"{manifest.vector}"
        )
    try:
        codec = codec_of(manifest)
    except PackError as error:
        yield str(error)
        return
    if manifest.shared is not None:
        yield from _shared_faults(manifest.shared, codec)
    elif codec.shares and manifest.tasks:
        yield f"shared: {manifest.method} needs what tasks share, and there is none"
    if manifest.router is not None:
        yield from _router_faults(manifest.router, manifest.tasks)
    if len({name.lower() for name in manifest.tasks}) < len(manifest.tasks):
        yield "tasks: two have one name, case ignored"
    for name, task in manifest.tasks.items():
        for fault in _task_faults(manifest, name, task):
            yield f"tasks.{name}: {fault}"


def _shared_faults(shared: SharedRecord, codec: Codec) -> Iterator[str]:
    if not codec.shares:
        yield "shared: this codec shares nothing"
    if shared.file != SHARED:
        yield f"shared: file {_shown(shared.file)}, expected {SHARED}"
    if shared.bytes < sum(4 * prod(shape) for shape in shared.tensors.values()):
        yield f"shared: {shared.bytes} bytes cannot hold its tensors"


def _router_faults(router: RouterRecord, tasks: Mapping[str, TaskRecord]) -> Iterator[str]:
    if router.file != ROUTER:
        yield f"router: file {_shown(router.file)}, expected {ROUTER}"
    numbers = (router.width, router.neighbours, *router.examples.values())
    if not router.examples or not all(numbers):
        yield "router: it has no examples, no features, or nothing that votes"
    if router.bytes < 4 * router.width * sum(router.examples.values()):
        yield f"router: {router.bytes} bytes cannot hold its features"
    for name in router.examples.keys() - tasks.keys():
        yield f"router: examples of {_shown(name)}, which is no task here"


def _task_faults(manifest: Manifest, name: str, task: TaskRecord) -> Iterator[str]:
    if task.file != f"{TASKS}/{name}.safetensors":
        yield f"file {_shown(task.file)}, expected {TASKS}/{name}.safetensors"
    if task.bytes < task.coded_bytes + task.private_bytes:
        yield f"{task.bytes} bytes cannot hold its tensors"
    yield from _name_faults(task)
    for key, private in task.private.items():
        if private.bytes != _private_bytes(private):
            yield f"private {_shown(key)}: {private.bytes} bytes do not fit its shape and dtype"
    try:
        codec = codec_of(manifest, task)
    except PackError as error:
        yield str(error)
        return
    for name in set(codec.of_family) - task.parameters.keys():
        yield f"parameters: {name} is missing"
    common = manifest.shared.tensors if manifest.shared else {}
    for key, tensor in task.tensors.items():
        if common.get(key, tensor.shape) != tensor.shape:
            yield f"tensor {_shown(key)}: what tasks share of it has another shape"
        for fault in _tensor_faults(codec, tensor):
            yield f"tensor {_shown(key)}: {fault}"


def _name_faults(task: TaskRecord) -> Iterator[str]:
    """What is wrong with the names in a record, one list against the others."""
    absent, grown, rule = set(task.absent), set(task.grown), _rule(task)
    for field in ("absent", "grown", "spared"):
        names = getattr(task, field)
        if len(set(names)) < len(names):
            yield f"{field} names a tensor twice"
    for name in (*task.tensors, *task.grown, *task.dtypes, *task.spared):
        if name in absent:
            yield f"{_shown(name)} is absent, and yet told of"
    for name in grown:
        if rule.expert_name(name) not in task.private:
            yield f"{_shown(name)} has more rows than the reference, which are not kept"
    for name in (*task.tensors, *task.dtypes):
        if name not in grown and rule.expert_name(name) in task.private:
            yield f"{_shown(name)} is kept whole, and yet told of"
    for dropped, kept in task.tied.items():
        if kept in task.tied or dropped in task.private:
            yield f"{_shown(dropped)} is tied to {_shown(kept)}, and one of them is no such name"


def _tensor_faults(codec: Codec, tensor: TensorRecord) -> Iterator[str]:
    shape, blocks = tensor.shape, tensor.blocks
    if not 1 <= prod(shape) <= _MOST_ELEMENTS or not blocks:
        yield f"shape {_shown(list(shape))} in {len(blocks)} blocks"
        return
    axis, reached = blocks[0].axis, 0
    for block in blocks:
        if block.axis != axis or block.start != reached or block.stop <= block.start:
            break
        reached = block.stop
    if axis >= max(len(shape), 1) or reached != (shape[axis] if shape else 1):
        yield f"its blocks do not cover shape {_shown(list(shape))} in order"
        return
    size = 0
    for block in blocks:
        own = block_shape(shape, block)
        faults = misfits(codec, block.parts, own, block.rank)
        yield from (f"block of shape {_shown(list(own))}: {fault}" for fault in faults)
        if not faults:
            layout = block_layout(codec, block.parts, own, block.rank)
            size += sum(layout[part].dtype.itemsize * n for part, n in block.parts.items())
    if size != tensor.bytes:
        yield f"{tensor.bytes} bytes are not those of its parts"


def _misfits(task: TaskRecord, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """What is wrong with the record of a task beside the headers of its reference."""
    told = (
        *(*task.tensors, *task.grown, *task.absent, *task.spared),
        *(*task.dtypes, *task.renaming.plain, *task.renaming.given),
    )
    unknown = [name for name in dict.fromkeys(told) if name not in specs]
    yield from (f"the reference has no {_shown(name)}" for name in unknown)
    if unknown:
        return
    for name, tensor in task.tensors.items():
        if tensor.shape != specs[name].shape or not specs[name].is_floating:
            yield f"{_shown(name)} is coded as {_shown(list(tensor.shape))}, {_told(specs[name])}"
    for name, dtype in task.dtypes.items():
        if _is_floating(dtype) != specs[name].is_floating:
            yield f"{_shown(name)} becomes {dtype}, {_told(specs[name])}"
    for name in task.grown:
        rows = task.private[_rule(task).expert_name(name)]
        if not rows.shape or rows.shape[1:] != specs[name].shape[1:] or not specs[name].shape:
            yield f"{_shown(name)} grows by {_shown(list(rows.shape))}, {_told(specs[name])}"
    names = expert_names(task, specs)
    kept = set(names) | task.private.keys()
    whole = {_rule(task).expert_name(name) for name in specs} & task.private.keys()
    if len(names) + len(whole - names.keys()) + len(task.absent) < len(specs):
        yield "two tensors of the reference become one name"
    for dropped, target in task.tied.items():
        if dropped in kept or target not in kept:
            yield f"{_shown(dropped)} is tied to {_shown(target)}, and one of them is no such name"


def _rule(task: TaskRecord) -> Renaming:
    rule = task.renaming
    return Renaming(add=rule.add, strip=rule.strip, plain=frozenset(rule.plain), given=rule.given)


def _private_bytes(private: PrivateRecord) -> int:
    return prod(private.shape) * dtype_of(private.dtype).itemsize


def _is_floating(dtype: str) -> bool:
    return dtype_of(dtype).is_floating_point


def _told(spec: TensorSpec) -> str:
    return f"the reference's is {spec.dtype_name} {_shown(list(spec.shape))}"


def _malformed(path: Path, faults: list[str]) -> str:
    return f"{path} is malformed: {_joined(faults)}. Fetch the pack again."


def _joined(faults: list[str]) -> str:
    more = f"; and {len(faults) - _MOST_TOLD} more" if len(faults) > _MOST_TOLD else ""
    return "; ".join(faults[:_MOST_TOLD]) + more


def _texts(error: ValidationError) -> list[str]:
    """What pydantic found, without the values, which may be of any length."""
    return [
        f"{'.'.join(str(place)[:_MOST_SHOWN] for place in fault['loc'] if place != '[key]')}: "
        + fault["msg"].removeprefix("Value error, ")
        for fault in error.errors(include_url=False, include_input=False)
    ]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
