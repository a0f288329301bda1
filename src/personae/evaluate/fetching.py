"""Models of the hub as folders of this machine, which tasks are scored from."""

from pathlib import Path

from personae.checkpoints.opening import expanded, is_hub_id
from personae.errors import CheckpointError

_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.bin")


def fetched(model: str) -> Path:
    """The folder of a model: its own, or that of the hub's cache, filled if it has to be.

    Args:
        model: A path, or `org/name[@revision]`.

    Raises:
        CheckpointError: if there is neither, naming what to fetch.
    """
    path = expanded(model)
    if path.is_dir() or not is_hub_id(model):
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"There is no checkpoint directory at '{path}' (one with a config.json). Train or "
                "download it first, or name a model of the hub (org/name)."
            )
        return path
    from huggingface_hub import snapshot_download

    repo, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[*_FILES]))
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        at = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"The model {model} cannot be had from the hub: {said} Fetch it where there is a "
            f"network: hf download {repo}{at}"
        ) from error
