"""Tensors that a model ties to each other and a file stores twice: copies of an embedding.

A model with tied embeddings has one matrix under several names. Most files hold it under one; some
hold a copy under each (`lm_head.weight` beside `model.embed_tokens.weight`, T5's `shared.weight`,
`encoder.embed_tokens.weight` and `lm_head.weight`). Here a copy is one more tied name of the one
tensor, and `Checkpoint.copies` tells which names are to be written again.

Headers come before weights everywhere else. Whether two tensors are the same only their bytes
tell, so those of input embeddings and output layers are compared here when a family is aligned:
where names and shapes allow it, in chunks, and up to the first that differs. A copy may be stored
in a dtype of its own, and is written again in that; see `copies_written`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.configuration import CONFIG, TIED
from personae.checkpoints.vocabulary import is_input_embedding, is_output_layer, read_json

_CHUNK_BYTES = 32 << 20


class WithCopies:
    """A checkpoint that stores tensors under several names, seen with each tensor once.

    Attributes:
        model: The checkpoint as it is stored.
    """

    def __init__(self, model: Checkpoint, copies: Mapping[str, str]) -> None:
        """See a model without `copies`, by the names of what they are copies of; reads nothing."""
        self.model = model
        self.source, self.revision = model.source, model.revision
        self.auxiliary_files: Mapping[str, Path] = model.auxiliary_files
        self.specs: Mapping[str, TensorSpec] = {
            name: spec for name, spec in model.specs.items() if name not in copies
        }
        noted = {dropped: copies.get(kept, kept) for dropped, kept in model.tied.items()}
        self.tied: Mapping[str, str] = {**noted, **copies}
        again = {name: model.specs[name].dtype for name in copies}
        self.copies: Mapping[str, torch.dtype] = {**model.copies, **again}

    def read(self, name: str) -> Tensor:
        """Return one tensor; see `Checkpoint.read`."""
        return self.model.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop`; see `Checkpoint.read_rows`."""
        return self.model.read_rows(name, start, stop)

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return the model's own; see `Checkpoint.factors`."""
        return self.model.factors(name)

    def same_as_base(self, name: str) -> bool:
        """Whether the model knows it to be the base's; see `Checkpoint.same_as_base`."""
        return self.model.same_as_base(name)

    def close(self) -> None:
        """Close the model."""
        self.model.close()


def each_once(model: Checkpoint, apart: Collection[str] = ()) -> Checkpoint:
    """A reference with each tensor once, whatever copies it stores; see `WithCopies`.

    Args:
        model: The reference, as it is stored.
        apart: Names of tensors that are no copies, though they hold the same.

    Raises:
        CheckpointError: Its config.json is damaged, or a file changed since it was opened.
    """
    may_go, config = model.specs.keys() - {*apart}, _config(model)
    ties_output = config is None or ties_embedding(config)
    copies = _find_copies(model, may_go, ties_output, has_two_models=_has_two_models(config))
    return WithCopies(model, copies) if copies else model


def as_stored(model: Checkpoint) -> Checkpoint:
    """The checkpoint with every tensor that it stores, copies too."""
    return model.model if isinstance(model, WithCopies) else model


def still_tied(
    copies: Mapping[str, torch.dtype], tied: Mapping[str, str]
) -> dict[str, torch.dtype]:
    """The copies of a model that a view of it still has among its tied names."""
    return {name: dtype for name, dtype in copies.items() if name in tied}


def copies_written(
    tied: Mapping[str, str],
    specs: Mapping[str, TensorSpec],
    reference_names: Mapping[str, str],
    stored: Mapping[str, TensorSpec],
) -> dict[str, torch.dtype]:
    """The names in `tied` that a reference stores, each with the dtype it is to be written in.

    It is the reference's, unless the tensor itself is written in another one than it has there:
    then all of its names have that.

    Args:
        tied: Dropped name to kept name, of what is written.
        specs: Its tensors, each once.
        reference_names: What the reference calls its tensors and their copies.
        stored: The reference's tensors, copies too.
    """
    found: dict[str, torch.dtype] = {}
    for name in tied.keys() & reference_names.keys():
        kept, own = specs[tied[name]], stored[reference_names[name]]
        beside = stored.get(reference_names.get(kept.name, ""))
        as_there = beside is not None and beside.dtype == kept.dtype
        alike = own.is_floating and kept.is_floating
        found[name] = own.dtype if as_there and alike else kept.dtype
    return found


def each_once_beside(
    expert: Checkpoint, reference: Checkpoint, reference_name: Callable[[str], str]
) -> Checkpoint:
    """An expert without copies of what the reference has once.

    Copies that the reference lacks altogether are left out where both models' config.json ties
    them, so that whoever loads the expert needs none.

    Args:
        expert: The expert.
        reference: What it is aligned with.
        reference_name: The expert's stored name to the reference's.

    Raises:
        CheckpointError: A config.json is damaged, or a file changed since it was opened.
    """
    named = {name: reference_name(name) for name in expert.specs}
    may_go = {name for name, known in named.items() if known not in reference.specs}
    if says_tied(reference) is not True or says_tied(expert) is False:
        may_go = {name for name in may_go if named[name] in reference.tied}
    copies = _find_copies(expert, may_go, ties_output=True)
    return WithCopies(expert, copies) if copies else expert


def says_tied(model: Checkpoint) -> bool | None:
    """Whether a model's config.json ties its output layer to its embedding; None without one.

    Like the readers of config.json, it takes silence for yes.

    Raises:
        CheckpointError: It is damaged.
    """
    config = _config(model)
    return None if config is None else ties_embedding(config)


def _has_two_models(config: Mapping[str, Any] | None) -> bool:
    """Whether encoder and decoder are models of their own, or nothing says that they are not.

    Those of transformers' EncoderDecoderModel may begin as one, with equal embeddings, and are not
    tied; those of T5 or BART share one by the nature of their class.
    """
    if config is None:
        return True
    parts = (config.get("encoder"), config.get("decoder"))
    return all(isinstance(part, dict) for part in parts) and not config.get("tie_encoder_decoder")


def _config(model: Checkpoint) -> dict[str, Any] | None:
    """A model's config.json; None without one.

    Raises:
        CheckpointError: It is damaged.
    """
    path = model.auxiliary_files.get(CONFIG)
    if path is None:
        return None
    config = read_json(path)
    return config if isinstance(config, dict) else {}


def ties_embedding(config: Mapping[str, Any]) -> bool:
    """Whether a configuration ties the output layer to the embedding; silence means that it does.

    Examples:
        >>> ties_embedding({}), ties_embedding({"text_config": {"tie_word_embeddings": False}})
        (True, False)
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    said = [part[TIED] for part in parts if isinstance(part.get(TIED), bool)]
    return not said or any(said)


def _find_copies(
    model: Checkpoint, may_go: Collection[str], ties_output: bool, *, has_two_models: bool = False
) -> dict[str, str]:
    """The names in `may_go` of copies, each with the name of the nearest tensor it equals.

    With two models, an embedding in the one is no copy of one in the other.
    """
    copies: dict[str, str] = {}
    for group in _alike(model.specs, ties_output):
        kept: list[str] = []
        for name in group:
            known = kept if name in may_go else []
            if has_two_models and is_input_embedding(name):
                known = [one for one in known if name.startswith(_around(one))]
            nearest = sorted(known, key=lambda one: -_modules_shared(one, name))
            twin = next((one for one in nearest if is_copy(model, name, model, one)), None)
            if twin is None:
                kept.append(name)
            else:
                copies[name] = twin
    return copies


def embedding_of(output: str, inputs: Collection[str]) -> str | None:
    """The embedding that an output layer is tied to, by their names; None where that is open.

    The one in the module that the output layer is in. An encoder and a decoder may have one each:
    the output layer is the decoder's.

    Args:
        output: The output layer.
        inputs: Input embeddings, each tensor once.

    Examples:
        >>> embedding_of("decoder.cls.predictions.decoder.weight",
        ...              ["encoder.embeddings.word_embeddings.weight",
        ...               "decoder.bert.embeddings.word_embeddings.weight"])
        'decoder.bert.embeddings.word_embeddings.weight'
        >>> embedding_of("lm_head.weight", ["a.wte.weight", "b.wte.weight"])
    """
    most = max((_modules_shared(name, output) for name in inputs), default=0)
    nearest = [name for name in inputs if _modules_shared(name, output) == most]
    if len(nearest) > 1:
        nearest = [name for name in nearest if "decoder" in name.split(".")]
    return nearest[0] if len(nearest) == 1 else None


def _modules_shared(name: str, other: str) -> int:
    """In how many modules two tensors both are."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])


def _around(name: str) -> str:
    """What the names begin with of all that is in the model whose embedding this is."""
    module = name.rpartition(".")[0]
    return module[: module.rfind(".") + 1]


def _alike(specs: Mapping[str, TensorSpec], ties_output: bool) -> Iterator[list[str]]:
    """Groups of names that may be one tensor, the likeliest to be kept first.

    Input embeddings of one shape; output layers of their shape, and the biases of these.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    inputs = {n: s for n, s in specs.items() if len(s.shape) == 2 and is_input_embedding(n)}
    rows = {spec.shape[0] for spec in inputs.values()}
    for name, spec in specs.items():
        is_bias = len(spec.shape) == 1 and spec.shape[0] in rows
        of_output = ties_output and (len(spec.shape) == 2 or is_bias) and is_output_layer(name)
        if spec.is_floating and spec.numel and (name in inputs or of_output):
            groups.setdefault(spec.shape, []).append(name)
    for shape, names in groups.items():
        if len(shape) == 1 or any(name in inputs for name in names):
            yield sorted(names, key=lambda name: (name not in inputs, name.count("."), name))


def is_copy(model: Checkpoint, name: str, other: Checkpoint, other_name: str) -> bool:
    """Whether a tensor of `model` is that of `other`, to the bit, in its own dtype.

    A copy in fewer bits is the other one rounded. One in more bits has nothing that the other one
    lacks. Read in chunks, up to the first that differs.
    """
    spec, other_spec = model.specs[name], other.specs[other_name]
    if spec.shape != other_spec.shape:
        return False
    rows = max(1, _CHUNK_BYTES * spec.shape[0] // max(spec.nbytes, other_spec.nbytes, 1))
    for start in range(0, spec.shape[0], rows):
        stop = min(start + rows, spec.shape[0])
        ours, theirs = model.read_rows(name, start, stop), other.read_rows(other_name, start, stop)
        if not torch.equal(_bytes(ours), _bytes(theirs.to(ours.dtype))):
            return False
    return True


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)
