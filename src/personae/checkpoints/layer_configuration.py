"""What config.json says of layers: how many there are, and of what kind each is.

Counts have many names (`num_hidden_layers`, `n_layer`, `decoder_layers`), and are found by these
and their value. The kind of a layer is said in one of three ways, each told by its form:

* a list with an entry for each layer (`layer_types`, `no_rope_layers`), also as GPT-Neo writes it,
  some kinds and how often they recur; and a list of the numbers of some layers (`mlp_only_layers`);
* a number of layers at the beginning that are of one kind (`first_k_dense_replace`);
* a period, every so many layers (`decoder_sparse_step`, `sliding_window_pattern`).

Lists follow the layers wherever they go. A beginning and a period can only be kept where the layers
that come out are of the kinds that they say; elsewhere this refuses.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from personae.errors import Faults

_COUNT = re.compile(r"(num_|n_)?((hidden|encoder|decoder|transformer)_)?(layers?|blocks?)|depth")
_LISTED = re.compile(r"(^|_)(layers?|blocks?|layer_ids|layer_ind\w+)(_|$)")
_NO_LIST_OF_LAYERS = re.compile(r"architectures|\w*token_ids?|depths|hidden_sizes")
_BEGINNING = re.compile(r"first_k_\w+|max_window_layers|num_(dense|hash)_layers")
_PERIOD = re.compile(
    r"\w*(sparse_step|layer_(period|step|interval|freq)|sliding_window_pattern|every_n_layers"
    r"|attention_interval)"
)
_OF_ATTENTION = re.compile(r"window|attn|attention")
_KINDS = "layer_types"
"""Where it is there, it says the kind of attention, and no number does."""
_OUTPUTS = ("stage_names", "out_features", "out_indices")
"""Layers a backbone gives out; without these keys it is the last one."""


class Origin(NamedTuple):
    """A layer of the output.

    Attributes:
        model: The model it is of, for texts.
        config: What its config.json says.
        layers: How many that model has.
        layer: Which of them it is.
    """

    model: str
    config: Mapping[str, Any]
    layers: int
    layer: int


def layer_counts(config: Mapping[str, Any]) -> dict[str, int]:
    """Every number of layers in a configuration, and in those within it."""
    found: dict[str, int] = {}
    for key, value in config.items():
        if _COUNT.fullmatch(key) and isinstance(value, int) and not isinstance(value, bool):
            found[key] = value
        elif key.endswith("_config") and isinstance(value, dict):
            found |= {f"{key}.{inner}": count for inner, count in layer_counts(value).items()}
    return found


def with_layers(
    config: dict[str, Any], prefix: str, layers: int, origins: Sequence[Origin], faults: Faults
) -> dict[str, Any]:
    """A configuration for other layers in one stack of a model.

    Args:
        config: What describes the model as it was.
        prefix: What the names of the layers begin with.
        layers: How many there were.
        origins: The layers that come out, in order.
        faults: Gets what cannot be said.
    """
    path = _place(config, prefix, layers)
    inside = _at(config, path)
    said = [_at(origin.config, path) for origin in origins]
    changed = dict(inside) | {key: len(origins) for key in _count_keys(inside, prefix, layers)}
    if "decoder" in prefix and "num_layers" in inside and "num_decoder_layers" not in inside:
        changed["num_decoder_layers"] = len(origins)
    if [(o.layers, o.layer) for o in origins] == [(layers, n) for n in range(layers)]:
        if all(_of_layers(one, layers) == _of_layers(inside, layers) for one in said):
            return config
    for key in _of_layers(inside, layers):
        changed[key] = _relisted(key, inside[key], layers, origins, said, faults)
    for key in inside:
        if not (_OF_ATTENTION.search(key) and _says_otherwise(inside)):
            changed |= _counted(key, inside, origins, said, faults)
    for key in _OUTPUTS:
        changed.pop(key, None)
    return _put(config, path, changed)


def _says_otherwise(config: Mapping[str, Any]) -> bool:
    """Whether no number says of what kind the attention of a layer is."""
    return bool(config.get(_KINDS)) or config.get("use_sliding_window") is False


def kinds(config: Mapping[str, Any], prefix: str, layers: int) -> list[tuple[Any, ...]]:
    """What a configuration says of each layer."""
    inside = _at(config, _place(config, prefix, layers))
    lists = [_entries(value, layers) for value in _of_layers(inside, layers).values()]
    periods = [v for k, v in inside.items() if _PERIOD.fullmatch(k) and _is_count(v)]
    starts = [v for k, v in inside.items() if _BEGINNING.fullmatch(k) and _is_count(v)]
    return [
        (
            *(str(entries[n]) for entries in lists),
            *(n % p for p in periods),
            *(n < s for s in starts),
        )
        for n in range(layers)
    ]


def _place(config: Mapping[str, Any], prefix: str, layers: int) -> tuple[str, ...]:
    """Where in a configuration the layers of a stack are counted: a configuration inside, or ()."""
    inner = [
        key
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict) and layers in _own(value).values()
    ]
    named = [key for key in inner if key.removesuffix("_config")[:3] in prefix]
    if layers in _own(config).values() and not named:
        return ()
    return (*(named or inner)[:1],)


def _own(config: Mapping[str, Any]) -> dict[str, int]:
    return {key: count for key, count in layer_counts(config).items() if "." not in key}


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    for key in path:
        inside = config.get(key)
        config = inside if isinstance(inside, dict) else {}
    return config


def _put(config: dict[str, Any], path: tuple[str, ...], inside: dict[str, Any]) -> dict[str, Any]:
    return config | {path[0]: inside} if path else inside


def _count_keys(config: Mapping[str, Any], prefix: str, layers: int) -> Iterator[str]:
    """The keys that count the layers of a stack: of a decoder's those that say so, if any do."""
    counts = {key for key, count in _own(config).items() if count == layers}
    of_decoder = {key for key in counts if "decoder" in key}
    if "decoder" in prefix and of_decoder:
        yield from of_decoder
    elif "encoder" in prefix:
        yield from counts - of_decoder
    else:
        yield from counts


def _of_layers(config: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    """The lists that say something of each layer, or name some."""
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, list)
        and not _NO_LIST_OF_LAYERS.fullmatch(key)
        and (_LISTED.search(key) or _repeated(value) or _is_table(value, layers))
        and (_is_selection(value, layers) or len(_entries(value, layers)) == layers)
    }


def _is_table(value: list[Any], layers: int) -> bool:
    """Whether a list holds a number for each of many layers: few may be of something else."""
    return layers > 4 and len(value) == layers and all(map(_is_number, value))


def _entries(value: list[Any], layers: int) -> list[Any]:
    """What a list says of each layer, in order; another number of entries if it is no such list."""
    if _is_selection(value, layers):
        return [n in value for n in range(layers)]
    if _repeated(value):
        return [kind for some, count in value for kind in some * count]
    return value


def _is_selection(value: list[Any], layers: int) -> bool:
    """Whether a list holds the numbers of some layers."""
    numbers = all(map(_is_count, value))
    return numbers and value == sorted({*value}) and all(0 <= n < layers for n in value)


def _repeated(value: list[Any]) -> bool:
    """Whether it is GPT-Neo's: pairs of some kinds and how often they recur."""
    return bool(value) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], list)
        and _is_count(pair[1])
        for pair in value
    )


def _relisted(
    key: str,
    value: list[Any],
    layers: int,
    origins: Sequence[Origin],
    said: Sequence[Mapping[str, Any]],
    faults: Faults,
) -> list[Any]:
    """A list for the layers that come out."""
    entries: list[Any] = []
    for origin, inside in zip(origins, said, strict=True):
        theirs = inside.get(key)
        own = _entries(theirs, origin.layers) if isinstance(theirs, list) else []
        if len(own) != origin.layers:
            faults.add(
                f"config.json of {origin.model} does not say '{key}' of its {origin.layers} "
                "layers, as that of the first model does. Stack models of one architecture."
            )
            return value
        entries.append(own[origin.layer])
    if _is_selection(value, layers):
        return [n for n, is_in in enumerate(entries) if is_in]
    return [[entries, 1]] if _repeated(value) else entries


def _counted(
    key: str,
    config: Mapping[str, Any],
    origins: Sequence[Origin],
    said: Sequence[Mapping[str, Any]],
    faults: Faults,
) -> dict[str, int]:
    """A period or a beginning that the layers which come out keep.

    Returns:
        The key with another number, if it has one then.
    """
    count = config[key]
    is_start, is_period = _BEGINNING.fullmatch(key), _PERIOD.fullmatch(key)
    if not (is_start or is_period) or not _is_count(count) or count < 1:
        return {}
    others = [o.model for o, inside in zip(origins, said, strict=True) if inside.get(key) != count]
    if others and is_period:
        faults.add(
            f"config.json of {others[0]} has another '{key}' than the first model, {count}. Stack "
            "models that agree in it."
        )
    elif is_period:
        odd = next((n for n, o in enumerate(origins) if n % count != o.layer % count), None)
        if odd is not None:
            faults.add(
                f"'{key}: {count}' of config.json says the kind of a layer by its number. Layer "
                f"{odd} would be layer {origins[odd].layer} of {origins[odd].model}, which is of "
                f"another kind: let the numbers differ by multiples of {count}."
            )
    else:
        early = [o.layer < inside.get(key, 0) for o, inside in zip(origins, said, strict=True)]
        if early != sorted(early, reverse=True):
            faults.add(
                f"'{key}: {count}' of config.json says that the first layers are of another kind. "
                f"Layer {early.index(False)} would be of the others', and layer "
                f"{len(early) - 1 - early[::-1].index(True)} of theirs: keep those first."
            )
        elif all(early) and max(inside.get(key, 0) for inside in said) >= len(origins):
            return {}  # all of them were, whatever the number
        else:
            return {key: sum(early)}
    return {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
