"""pack.json: what a pack holds. `docs/pack-format.md` is the specification."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from personae._small_files import read_json
from personae._version import __version__
from personae.checkpoints.naming import is_safe_name
from personae.errors import PackError

FORMAT = "personae-pack"
FORMAT_VERSIONS = (1, 2)
MANIFEST_NAME = "pack.json"

_CODECS_OF_VERSION_1 = {"dts", "svd"}


def _inside(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"'{path}' leads out of the pack")
    return path


def _task_name(name: str) -> str:
    if not is_safe_name(name):
        raise ValueError(f"'{name}' is no safe task name")
    return name


# A pack may come from anybody: what it names is read, written and removed.
InnerPath = Annotated[str, AfterValidator(_inside)]
TaskName = Annotated[str, AfterValidator(_task_name)]


class Record(BaseModel):
    """Base of the records of a manifest: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BlockRecord(Record):
    """One coded block: `start:stop` along `axis` of a tensor, and the lengths of its parts."""

    axis: int = 0
    start: int
    stop: int
    rank: int | None = Field(default=None, description="Singular directions stored; None if none")
    parts: dict[str, int] = Field(description="Part name to its number of elements")


class TensorRecord(Record):
    """One tensor of which the expert differs from the reference."""

    shape: tuple[int, ...] = Field(description="The coded shape: that of the reference")
    blocks: tuple[BlockRecord, ...]
    bytes: int = Field(description="Bytes of its parts in the task file")
    energy: float = Field(description="Squared norm of the delta")
    relative_error: float = Field(description="Squared norm of the error over that of the delta")

    @property
    def rank(self) -> int | None:
        """Largest rank over the blocks; None if no block was decomposed."""
        return max((b.rank for b in self.blocks if b.rank is not None), default=None)

    @property
    def is_stack(self) -> bool:
        """Whether its blocks are the matrices of a stack."""
        return len(self.shape) == 3 and len(self.blocks) == self.shape[0] > 1

    @property
    def treatment(self) -> Literal["coded", "exact", "skipped"]:
        """Whether it is coded, kept exact, or left as in the reference."""
        parts = {part for block in self.blocks for part in block.parts}
        if "exact" in parts and parts <= {"exact", "rows"}:
            return "exact"
        return "coded" if parts else "skipped"


class PrivateRecord(Record):
    """One tensor, or the extra rows of one, kept whole."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


class RenamingRecord(Record):
    """The rule from reference names to the expert's names (see checkpoints.naming.Renaming)."""

    add: str = ""
    strip: str = ""
    plain: tuple[str, ...] = ()


class CompanionRecord(Record):
    """A small file beside the weights: stored in the task's folder, or the reference's own."""

    stored_in: Literal["task", "reference"]
    sha256: str


class TaskRecord(Record):
    """One task of a pack."""

    file: InnerPath
    sha256: str
    bytes: int
    source: str
    revision: str | None = None
    fingerprint: str = Field(description="Of the expert's weights")
    parameters: dict[str, Any] = Field(description="The codec's parameters as used for this task")
    renaming: RenamingRecord = RenamingRecord()
    tensors: dict[str, TensorRecord] = Field(description="By reference name; unchanged: no entry")
    private: dict[str, PrivateRecord] = Field(description="By the expert's name")
    grown: tuple[str, ...] = Field(
        default=(), description="Reference names of which the expert has more rows, kept as private"
    )
    absent: tuple[str, ...] = Field(default=(), description="Reference names the expert lacks")
    dtypes: dict[str, str] = Field(
        default={}, description="By reference name, where the expert's dtype is another"
    )
    tied: dict[str, str] = Field(default={}, description="The expert's dropped name to kept name")
    companions: dict[InnerPath, CompanionRecord] = {}
    base_parameters: int = Field(description="Parameters of the reference that the task shares")
    base_bytes: int = Field(description="Bytes of those in the reference")
    counted_bits: int = Field(description="Bits by the papers' rule, at the ranks stored")
    counted_lean_bits: int = Field(description="The same with the fewest bits that carry the code")
    characteristics: tuple[str, ...] = Field(
        default=(), description="What the task is about: class names, or a description"
    )

    @property
    def private_bytes(self) -> int:
        """Bytes of tensors kept whole."""
        return sum(p.bytes for p in self.private.values())

    @property
    def coded_bytes(self) -> int:
        """Bytes of all coded parts."""
        return sum(t.bytes for t in self.tensors.values())

    @property
    def has_stacks(self) -> bool:
        """Whether some tensor is coded as a stack of matrices."""
        return any(t.is_stack for t in self.tensors.values())

    @property
    def left(self) -> dict[str, float]:
        """Changed tensors left as in the reference, to their share of the delta's squared norm."""
        whole = sum(t.energy for t in self.tensors.values())
        left = {n: t.energy / whole for n, t in self.tensors.items() if t.treatment == "skipped"}
        return left

    @property
    def relative_error(self) -> float:
        """Squared norm of the error over that of the delta, over all coded tensors."""
        energy = sum(t.energy for t in self.tensors.values())
        lost = sum(t.energy * t.relative_error for t in self.tensors.values())
        return lost / energy if energy else 0.0


class ReferenceRecord(Record):
    """The model a pack is relative to."""

    kind: Literal["base", "merged"]
    source: str = Field(description="As the user wrote it; for a merged one the folder in the pack")
    revision: str | None = None
    fingerprint: str
    method: str | None = Field(default=None, description="Merge method of a merged reference")
    method_parameters: dict[str, Any] = {}
    experts: tuple[str, ...] = Field(default=(), description="Tasks a merged reference is made of")


class SharedRecord(Record):
    """What all tasks share beside the reference: fp32 tensors, by reference name."""

    file: InnerPath
    sha256: str
    bytes: int
    tensors: dict[str, tuple[int, ...]] = Field(description="Reference name to its shape")
    counted_bits: int = Field(description="Bits by the papers' rule, of which a task has its share")


class Manifest(Record):
    """The whole of pack.json."""

    format: Literal["personae-pack"] = FORMAT
    tool_version: str = __version__
    method: str = Field(description="The codec")
    parameters: dict[str, Any] = Field(description="Its parameters as asked for")
    budget: str | None = None
    counting: str
    vector: Literal["task", "difference"]
    skip: tuple[str, ...] = ()
    private: tuple[str, ...] = ()
    reference: ReferenceRecord
    shared: SharedRecord | None = None
    tasks: dict[TaskName, TaskRecord] = {}

    @property
    def format_version(self) -> int:
        """The oldest version that can say what this pack holds."""
        described = any(task.characteristics for task in self.tasks.values())
        newer = described or self.shared or self.method not in _CODECS_OF_VERSION_1
        return 2 if newer or any(task.has_stacks for task in self.tasks.values()) else 1

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as keywords of `recipe.PackSettings`."""
        keys = ("method", "parameters", "budget", "counting", "vector", "skip", "private")
        return {key: getattr(self, key) for key in keys}

    def to_json(self) -> str:
        """Serialise with a checksum over everything else, so that a flipped byte is noticed."""
        content = self.model_dump(mode="json")
        if self.format_version == 1:  # which has none of these keys
            del content["shared"]
            for task in content["tasks"].values():
                del task["characteristics"]
        content = {"format": FORMAT, "format_version": self.format_version} | content
        return json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n"


def parse_manifest(path: Path) -> Manifest:
    """Read and check a pack.json.

    Raises:
        PackError: if it is missing, damaged, foreign, or of a newer version.
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
    if version not in FORMAT_VERSIONS:
        raise PackError(
            f"{path} is of pack format {version}; this tool ({__version__}) reads formats "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}. Update personae."
        )
    stated = content.pop("checksum", None)
    if stated != _checksum(content):
        raise PackError(f"{path} is damaged: its checksum does not hold. Restore it from a copy.")
    del content["format_version"]
    try:
        manifest = Manifest(**content)
    except ValidationError as error:
        raise PackError(f"{path} is malformed: {error}") from error
    if manifest.format_version > version:
        raise PackError(f"{path} is malformed: it holds what format {version} cannot say.")
    return manifest


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
