"""Models on the Hugging Face hub: headers by range request, weights only once they are read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import repo_folder_name

from personae.checkpoints.folders import Folder, local_folder
from personae.checkpoints.headers import (
    Header,
    as_entry,
    as_metadata,
    make_header,
    not_valid,
    read_header,
)
from personae.errors import CheckpointError

_Answer = TypeVar("_Answer")

# The hub's HTTP library differs between its versions; the roots of its errors are found from ours.
_UNREACHABLE: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
_TELLING_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def hub_folder(source: str) -> Folder:
    """List a hub model's files at one commit; download none.

    The revision is resolved to a commit once, and everything after asks for that commit. When
    the hub cannot be reached, or `HF_HUB_OFFLINE` is set, what the cache has is served instead.

    Args:
        source: `org/name` or `org/name@revision`.

    Raises:
        CheckpointError: The model cannot be found, entered or reached.
    """
    repo, _, revision = source.partition("@")
    if constants.HF_HUB_OFFLINE:
        return _cached_folder(source, repo, revision, "HF_HUB_OFFLINE is set")
    # The endpoint is looked up now rather than at import, so a mirror can be set at any time.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="personae")
    try:
        info = _ask(source, lambda: api.model_info(repo, revision=revision or None))
    except _UNREACHABLE as error:
        return _cached_folder(source, repo, revision, str(error).splitlines()[0])
    commit = str(info.sha)

    def locate(file: str) -> Path:
        path = _fetch(source, lambda: api.hf_hub_download(repo, file, revision=commit))
        _remember(repo, revision or constants.DEFAULT_REVISION, commit)
        return Path(path)

    def header(file: str) -> tuple[Header, list[str]]:
        cached = try_to_load_from_cache(repo, file, revision=commit)
        if isinstance(cached, str):
            return read_header(Path(cached))
        return _remote_header(api, source, repo, file, commit)

    names = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return Folder(source, names, locate, header, commit, is_local=False)


def _remote_header(
    api: HfApi, source: str, repo: str, file: str, commit: str
) -> tuple[Header, list[str]]:
    """Fetch one file's header by range request."""
    where = f"{source}/{file}"
    try:
        found: Any = _fetch(
            source, lambda: api.parse_safetensors_file_metadata(repo, file, revision=commit)
        )
        entries = {
            name: as_entry(tensor.dtype, tensor.shape, tensor.data_offsets)
            for name, tensor in found.tensors.items()
        }
        return make_header(where, entries, as_metadata(found.metadata), None)
    except (ValueError, TypeError, AttributeError):
        return Header({}, {}, {}), [not_valid(where)]


def _remember(repo: str, revision: str, commit: str) -> None:
    """Note in the cache which commit a branch or tag stood for, so that it is found offline.

    The hub's library does so only for downloads that name the branch, and ours name the commit.
    """
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    reference = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    if revision != commit and not (reference.is_file() and reference.read_text() == commit):
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


def _cached_folder(source: str, repo: str, revision: str, why: str) -> Folder:
    """Describe what the cache has of a model, as a local folder of its commit.

    Raises:
        CheckpointError: Nothing of it is in the cache.
    """
    for file in _TELLING_FILES:
        cached = try_to_load_from_cache(repo, file, revision=revision or None)
        if isinstance(cached, str):
            snapshot = Path(cached).parent
            return local_folder(snapshot, source, revision=snapshot.name)
    raise CheckpointError(
        f"{source} is not in the hub cache, and the hub was not asked or did not answer ({why}). "
        "Go online, or pass a local directory."
    )


def _fetch(source: str, request: Callable[[], _Answer]) -> _Answer:
    """Ask the hub for something that has no substitute.

    Raises:
        CheckpointError: It was refused or the hub did not answer.
    """
    try:
        return _ask(source, request)
    except _UNREACHABLE as error:
        raise CheckpointError(
            f"{source}: the hub did not answer ({str(error).splitlines()[0]}). Try again; what was "
            "downloaded so far is kept."
        ) from error


def _ask(source: str, request: Callable[[], _Answer]) -> _Answer:
    """Ask the hub, and say of a refusal what can be done.

    Raises:
        CheckpointError: The hub answered, and refused. Errors of the connection pass through.
    """
    try:
        return request()
    except GatedRepoError as error:
        what = "is gated. Accept its conditions on its hub page, then log in: hf auth login."
        raise CheckpointError(f"{source} {what}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: the hub has no such model, or it is private. Check the name; for a private "
            "model log in first: hf auth login. (There is no such local path either.)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{source}: the model has no such revision. Name a branch, tag or commit after '@'."
        ) from error
    except (EntryNotFoundError, HFValidationError, SafetensorsParsingError) as error:
        raise CheckpointError(f"{source}: {str(error).splitlines()[0]}") from error
