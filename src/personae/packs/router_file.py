"""router.safetensors: features of a few examples of each task, by which samples are told apart."""

from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from personae._safetensors import open_safetensors
from personae.errors import PackError
from personae.family.finite import is_finite
from personae.packs.manifest import RouterRecord


def read_router(path: Path, record: RouterRecord) -> dict[str, Float[Tensor, "example dim"]]:
    """Task to the features of its examples, fp32; tasks in the order of their names.

    Raises:
        PackError: if the file is no safetensors file or does not fit its record, or a feature is
            not finite.
    """
    expected = {task: (count, record.width) for task, count in sorted(record.examples.items())}
    try:
        file = open_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise PackError(f"{path} cannot be read: {error}") from error
    slices = {name: file.get_slice(name) for name in file.keys()}
    found = {name: tuple(one.get_shape()) for name, one in slices.items()}
    if found != expected or any(one.get_dtype() != "F32" for one in slices.values()):
        raise PackError(
            f"{path} does not fit its record in pack.json: it holds other features, or not in "
            "fp32. Restore it from a copy, or fit the router again."
        )
    features = {task: file.get_tensor(task) for task in expected}
    odd = [task for task, one in features.items() if not is_finite(one)]
    if odd:
        raise PackError(
            f"{path}: features of {', '.join(odd)} are not finite. The pack was damaged or "
            "changed: fetch it again, or fit the router again."
        )
    return features
