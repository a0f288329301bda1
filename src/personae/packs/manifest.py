"""pack.json: what a pack holds. `docs/pack-format.md` is the specification."""

import hashlib
import json
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_serializer

from personae._types import dtype_name
from personae._version import __version__
from personae.checkpoints.folders import is_auxiliary_file
from personae.checkpoints.naming import is_safe_name
from personae.checkpoints.specs import READABLE
from personae.methods import Choice, Pool

FORMAT = "personae-pack"
FORMAT_VERSIONS = (1, 2)
MANIFEST_NAME = "pack.json"
TASKS = "tasks"
REFERENCE = "reference"
SHARED = "shared.safetensors"
ROUTER = "router.safetensors"

_DTYPES = {dtype_name(dtype): dtype for dtype in READABLE.values()}
_MOST_SHOWN = 60
_RECORDS = 4
"""Objects that a tensor's record lies in: manifest, tasks, task, tensors."""
_CODECS_OF_VERSION_1 = {"dts", "svd"}


Rule = Literal["amr_paper", "amr_paper_lean", "on_disk_fp32", "on_disk_native"]
"""Rules that sizes are counted by."""
_STORED: dict[str, str] = {"amr_paper": "counted", "amr_paper_lean": "counted_lean"}
"""What pack.json calls them, where that is another name."""
_READ = {stored: rule for rule, stored in _STORED.items()}


def _as_rule(name: Any) -> Any:
    return _READ.get(name, name) if isinstance(name, str) else name


Counting = Annotated[Rule, BeforeValidator(_as_rule)]
"""A rule, by its name or that of pack.json."""


def _task_name(name: str) -> str:
    if not is_safe_name(name):
        raise ValueError(f"{name[:_MOST_SHOWN]!r} is no safe task name")
    return name


def _auxiliary_name(name: str) -> str:
    folder, _, file = name.rpartition("/")
    # Folders of modules (sentence-transformers) have small files of their own, but no code.
    in_module = is_safe_name(folder) and is_auxiliary_file(file) and not file.endswith(".py")
    if not (is_auxiliary_file(name) or in_module):
        raise ValueError(
            f"{name[:_MOST_SHOWN]!r} is no small file of a model (configuration, tokenizer, code)"
        )
    return name


def _writable(text: str) -> str:
    """Paths may hold bytes that are no text, which JSON cannot say."""
    return text.encode(errors="replace").decode()


def _dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"{name[:_MOST_SHOWN]!r} is no dtype of a tensor")
    return name


# A pack may come from anybody, and what it says is read, written, removed and allocated.
TaskName = Annotated[str, AfterValidator(_task_name)]
AuxiliaryName = Annotated[str, AfterValidator(_auxiliary_name)]
Source = Annotated[str, AfterValidator(_writable)]
DtypeName = Annotated[str, AfterValidator(_dtype)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Amount = Annotated[float, Field(strict=True, ge=0, le=1e150, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Fingerprint = Annotated[str, Field(pattern="^xxh3:[0-9a-f]{32}$")]


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name; a name of a record is one."""
    return _DTYPES[name]


class Record(BaseModel):
    """Base of the records of a manifest: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BlockRecord(Record):
    """One coded block: `start:stop` along `axis` of a tensor, and the lengths of its parts."""

    axis: Count = 0
    start: Count
    stop: Count
    rank: Count | None = Field(default=None, description="Singular directions stored; None if none")
    parts: dict[str, Count] = Field(description="Part name to its number of elements")


class TensorRecord(Record):
    """One tensor of which the expert differs from the reference."""

    shape: tuple[Count, ...] = Field(description="The coded shape: that of the reference")
    blocks: tuple[BlockRecord, ...]
    bytes: Count = Field(description="Bytes of its parts in the task file")
    energy: Amount = Field(description="Squared norm of the delta")
    relative_error: Amount = Field(description="Squared norm of the error over that of the delta")

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

    shape: tuple[Count, ...]
    dtype: DtypeName
    bytes: Count


class RenamingRecord(Record):
    """The rule from reference names to the expert's names (see checkpoints.naming.Renaming)."""

    add: str = ""
    strip: str = ""
    plain: tuple[str, ...] = ()
    given: dict[str, str] = Field(
        default={}, description="Reference name to the expert's, where no prefix tells it"
    )


class AuxiliaryRecord(Record):
    """A small file beside the weights: stored in the task's folder, or the reference's own."""

    stored_in: Literal["task", "reference"]
    sha256: Sha256


class TaskRecord(Record):
    """One task of a pack."""

    file: str
    sha256: Sha256
    bytes: Count
    source: Source
    revision: str | None = None
    fingerprint: Fingerprint = Field(description="Of the expert's weights")
    parameters: dict[str, Any] = Field(description="The codec's parameters as used for this task")
    renaming: RenamingRecord = RenamingRecord()
    tensors: dict[str, TensorRecord] = Field(description="By reference name; unchanged: no entry")
    private: dict[str, PrivateRecord] = Field(description="By the expert's name")
    grown: tuple[str, ...] = Field(
        default=(), description="Reference names of which the expert has more rows, kept as private"
    )
    absent: tuple[str, ...] = Field(default=(), description="Reference names the expert lacks")
    spared: tuple[str, ...] = Field(
        default=(),
        description="Reference names taken although `skip` fits: other experts lack them",
    )
    dtypes: dict[str, DtypeName] = Field(
        default={}, description="By reference name, where the expert's dtype is another"
    )
    tied: dict[str, str] = Field(default={}, description="The expert's dropped name to kept name")
    companions: dict[AuxiliaryName, AuxiliaryRecord] = {}
    base_parameters: Count = Field(description="Parameters of the reference that the task shares")
    base_bytes: Count = Field(description="Bytes of those in the reference")
    counted_bits: Count = Field(description="Bits by the papers' rule, at the ranks stored")
    counted_lean_bits: Count = Field(
        description="The same with the fewest bits that carry the code"
    )
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
        whole = sum(t.energy for t in self.tensors.values()) or 1.0
        return {n: t.energy / whole for n, t in self.tensors.items() if t.treatment == "skipped"}

    @property
    def relative_error(self) -> float:
        """Squared norm of the error over that of the delta, over all coded tensors."""
        energy = sum(t.energy for t in self.tensors.values())
        lost = sum(t.energy * t.relative_error for t in self.tensors.values())
        return lost / energy if energy else 0.0


class ReferenceRecord(Record):
    """The model a pack is relative to."""

    kind: Literal["base", "merged"]
    source: Source = Field(
        description="As the user wrote it; for a merged one the folder in the pack"
    )
    revision: str | None = None
    fingerprint: Fingerprint
    method: str | None = Field(default=None, description="Merge method of a merged reference")
    method_parameters: dict[str, Any] = {}
    experts: tuple[str, ...] = Field(default=(), description="Tasks a merged reference is made of")


class SharedRecord(Record):
    """What all tasks share beside the reference: fp32 tensors, by reference name."""

    file: str
    sha256: Sha256
    bytes: Count
    tensors: dict[str, tuple[Count, ...]] = Field(description="Reference name to its shape")
    counted_bits: Count = Field(
        description="Bits by the papers' rule, of which a task has its share"
    )


class RouterRecord(Record):
    """What says which tasks a sample is of: features of a few examples of each task."""

    file: str
    sha256: Sha256
    bytes: Count
    examples: dict[TaskName, Count] = Field(description="Task to the number of its examples")
    width: Count = Field(description="Numbers of a feature")
    neighbours: Count = Field(description="How many of the nearest examples vote")
    mode: Choice = Field(description="Weights are shares of votes, or 1 for the task with most")
    pool: Pool = Field(description="How features are made of the states of tokens")


class Manifest(Record):
    """The whole of pack.json."""

    format: Literal["personae-pack"] = FORMAT
    tool_version: str = __version__
    method: str = Field(description="The codec")
    parameters: dict[str, Any] = Field(description="Its parameters as asked for")
    budget: str | None = None
    counting: Counting
    vector: Literal["task", "difference"]
    skip: tuple[str, ...] = ()
    private: tuple[str, ...] = ()
    reference: ReferenceRecord
    shared: SharedRecord | None = None
    router: RouterRecord | None = None
    tasks: dict[TaskName, TaskRecord] = {}

    @property
    def format_version(self) -> int:
        """The oldest version that can say what this pack holds."""
        described = any(
            task.characteristics or task.spared or task.renaming.given
            for task in self.tasks.values()
        )
        newer = described or self.shared or self.router or self.method not in _CODECS_OF_VERSION_1
        return 2 if newer or any(task.has_stacks for task in self.tasks.values()) else 1

    @property
    def unrouted(self) -> tuple[str, ...]:
        """The tasks that the router, if there is one, has no example of: they were added later."""
        known = None if self.router is None else self.router.examples
        return () if known is None else tuple(name for name in self.tasks if name not in known)

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as keywords of `recipe.PackSettings`."""
        keys = ("method", "parameters", "budget", "counting", "vector", "skip", "private")
        return {key: getattr(self, key) for key in keys}

    @field_serializer("counting")
    def _stored_counting(self, rule: Rule) -> str:
        return _STORED.get(rule, rule)

    def to_json(self) -> str:
        """Serialise with a checksum over everything else, so that a flipped byte is noticed."""
        content = self.model_dump(mode="json")
        for task in content["tasks"].values():
            if not task["spared"]:
                del task["spared"]
            if not task["renaming"]["given"]:
                del task["renaming"]["given"]
        if self.router is None:
            del content["router"]
        if self.format_version == 1:  # which has none of these keys
            del content["shared"]
            for task in content["tasks"].values():
                del task["characteristics"]
        content = {"format": FORMAT, "format_version": self.format_version} | content
        return _text(content | {"checksum": checksum(content)}) + "\n"


def _text(value: Any, depth: int = 0) -> str:
    """Indented JSON, but that lists, and all there is of one tensor, are on one line."""
    if depth == _RECORDS or not isinstance(value, dict) or not value:
        return json.dumps(value, separators=(",", ":"))
    margin = " " * (depth + 1)
    items = ",\n".join(
        f"{margin}{json.dumps(key)}: {_text(each, depth + 1)}" for key, each in value.items()
    )
    return f"{{\n{items}\n{margin[1:]}}}"


def checksum(content: dict[str, Any]) -> str:
    """Of the rest of pack.json.

    Raises:
        ValueError: if it holds a number that is not finite.
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
