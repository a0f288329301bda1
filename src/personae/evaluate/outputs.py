"""What becomes of a model's outputs: what was written of it, beside itself, on the same inputs.

Of what fine-tuning changed of the outputs, the share that is lost: Σ‖y − ŷ‖² / Σ‖y − y₀‖², where y
are the original's outputs, ŷ those of what was written, and y₀ those of the base. What ŷ and y₀
have no tensor for, such as a head, is the original's own.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from personae._quiet import quiet_transformers
from personae._small_files import read_text
from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.built import build_module
from personae.checkpoints.class_fit import check_loaded, check_size
from personae.checkpoints.configuration import CONFIG, class_of
from personae.checkpoints.modules import read_auxiliary_file
from personae.errors import CheckpointError, RecipeError
from personae.family.align import align_one

EXAMPLES = 16
"""Inputs drawn where no texts are given."""
TOKENS = 32
"""Tokens of each of them, and the most of a text."""
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges")


@dataclass(frozen=True)
class OutputChange:
    """How outputs differ from the original's.

    Attributes:
        inputs: What was computed from, in words.
        lost: Of what fine-tuning changed of the outputs, the share that is lost; above 1 if they
            are further from the original's than the base's are. None if the base's are the same.
        agree: Share of answers (rows, or tokens) whose largest entry is the original's; None of
            outputs without several entries.
    """

    inputs: str
    lost: float | None
    agree: float | None


@dataclass(frozen=True)
class Comparison:
    """An original that can be run, and what it is to be run on.

    Attributes:
        original: The model.
        config: Its configuration, as transformers has it.
        model_class: Its class there.
        texts: Texts, or nothing for random inputs.
    """

    original: Checkpoint
    config: Any
    model_class: Any
    texts: tuple[str, ...] = ()


def comparable(original: Any, *, base: Any = None, texts: str | Path | None = None) -> Comparison:
    """Check all that `output_change` needs, so that nothing is written in vain.

    Args:
        original: The fine-tuned model: path, hub id.
        base: What it was fine-tuned from, if it is an adapter.
        texts: A file with a text in each line, to compare on; by default inputs are drawn.

    Raises:
        CheckpointError: if the original cannot be opened, or transformers cannot run it, or there
            are texts and it has no tokenizer.
        RecipeError: if there is no text.
    """
    opened = open_checkpoint(original, base=None if base is None else open_checkpoint(base))
    content = read_auxiliary_file(opened.auxiliary_files, CONFIG)
    bare = build_module(content, class_of(content)) if isinstance(content, dict) else None
    if bare is None:
        raise CheckpointError(
            f"Outputs of {opened.source} cannot be compared: transformers is not installed, or its "
            "config.json names no class that it has. Leave --against out."
        )
    check_size(bare, opened.specs)
    asked = Comparison(opened, bare.config, type(bare), _lines(texts))
    if asked.texts:
        _tokenizer(opened)
    return asked


def output_change(
    written: Any, original: Any, base: Any, *, texts: str | Path | None = None
) -> OutputChange:
    """Run an adapter on its base, or a checkpoint, beside the original: by default on drawn inputs.

    Three models are in memory one after the other, in fp32.

    Args:
        written: The adapter or checkpoint.
        original: The fine-tuned model that it was made from.
        base: What both are relative to.
        texts: A file with a text in each line; without it tokens or pixels are drawn at random, by
            a fixed seed.

    Raises:
        CheckpointError: if one of them cannot be opened, or run.
        RecipeError: if there is no text.
    """
    asked = comparable(original, base=base, texts=texts)
    with (
        closing(open_checkpoint(base)) as reference,
        closing(open_checkpoint(written, base=reference)) as rebuilt,
        closing(asked.original),
    ):
        inputs = [*_inputs(asked)]
        before, after, right = (
            _outputs(_model(asked, of), inputs) for of in (reference, rebuilt, None)
        )
    lost = sum(_distance(a, y) for a, y in zip(after, right, strict=True))
    changed = sum(_distance(b, y) for b, y in zip(before, right, strict=True))
    told = f"{len(inputs)} {'texts' if asked.texts else 'random inputs'}"
    return OutputChange(told, lost / changed if changed else None, _agreement(after, right))


def _lines(texts: str | Path | None) -> tuple[str, ...]:
    """The lines of a file that are not blank.

    Raises:
        RecipeError: if there are none, or it cannot be read.
    """
    if texts is None:
        return ()
    try:
        found = tuple(line for line in read_text(Path(texts)).splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{texts} cannot be read as text: {error}") from error
    if not found:
        raise RecipeError(f"{texts} has no text. Put one in each line.")
    return found


def _model(asked: Comparison, of: Checkpoint | None) -> nn.Module:
    """The original, with all that another model has too as it is there.

    Raises:
        CheckpointError: if transformers makes no such model of these tensors, or with others.
    """
    own = asked.original
    state: dict[str, Tensor] = {}
    if of is not None:
        aligned = align_one("original", of, own)
        for name in (*aligned.shared, *aligned.buffers):
            raw, value = aligned.files[name], of.read(name)
            shape = own.specs[raw].shape
            if shape != value.shape:  # it has grown
                value = torch.cat([value, own.read_rows(raw, len(value), shape[0])])
            state[raw] = value
    state |= {name: own.read(name) for name in own.specs if name not in state}
    state |= {dropped: state[kept] for dropped, kept in own.tied.items()}
    with quiet_transformers():
        try:
            model, told = asked.model_class.from_pretrained(
                None,
                config=asked.config,
                state_dict=state,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises many kinds; all mean the same here
            said = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(f"transformers cannot run {own.source}: {said}") from error
    check_loaded(asked.model_class, told, own.specs)
    return model.eval()


def _inputs(asked: Comparison) -> Iterator[Mapping[str, Tensor]]:
    """What models are run on, one input after another: no padding is needed.

    Raises:
        CheckpointError: if nothing can be drawn for such a model, or it has no tokenizer.
    """
    if asked.texts:
        for one in _of_texts(asked.original, asked.texts):
            yield _with_answer(one, asked)
        return
    config, draw = asked.config, torch.Generator().manual_seed(0)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    main = asked.model_class.main_input_name
    for _ in range(EXAMPLES):
        if main == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
            channels, side = getattr(config, "num_channels", 3), config.image_size
            yield {main: torch.randn(1, channels, side, side, generator=draw)}
        elif main == "input_ids" and isinstance(getattr(text, "vocab_size", None), int):
            longest = getattr(text, "max_position_embeddings", None) or TOKENS
            length = max(1, min(TOKENS, longest - 4))  # some begin to count above 0
            tokens = torch.randint(text.vocab_size, (1, length), generator=draw)
            end = getattr(config, "eos_token_id", None)
            if isinstance(end, int) and 0 <= end < text.vocab_size:
                tokens[:, -1] = end  # some answer there
            yield _with_answer({main: tokens}, asked)
        else:
            raise CheckpointError(
                f"No inputs can be drawn for {asked.model_class.__name__}, which takes {main}. "
                "Leave --against out."
            )


def _with_answer(tokens: dict[str, Tensor], asked: Comparison) -> dict[str, Tensor]:
    """For an encoder-decoder that generates, with the same tokens as its answer."""
    answers = asked.config.is_encoder_decoder and asked.model_class.can_generate()
    return tokens | ({"decoder_input_ids": tokens["input_ids"]} if answers else {})


def _tokenizer(original: Checkpoint) -> Any:
    """What reads texts for it.

    Raises:
        CheckpointError: if it has none.
    """
    transformers = importlib.import_module("transformers")
    lacking = CheckpointError(
        f"{original.source} has no tokenizer that transformers can read. Leave the texts out, and "
        "inputs are drawn at random."
    )
    files = original.auxiliary_files
    if not any(name.startswith(_TOKENIZERS) for name in files):  # else an empty one is built
        raise lacking
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(files[CONFIG].parent)
    except Exception as error:  # as for models
        raise lacking from error


def _of_texts(original: Checkpoint, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Texts as the original's tokenizer reads them.

    Raises:
        CheckpointError: if it has none.
    """
    tokenizer = _tokenizer(original)
    for text in texts:
        found = tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt")
        yield {name: one for name, one in found.items() if isinstance(one, Tensor)}


def _outputs(model: nn.Module, inputs: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Logits, or else the first tensor that it gives.

    Raises:
        CheckpointError: if it does not run on these inputs.
    """
    found: list[Tensor] = []
    for one in inputs:
        try:
            with torch.inference_mode():
                output = model(**one)
        except Exception as error:  # whatever a model raises
            said = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(
                f"{type(model).__name__} cannot be run on {', '.join(one)}: {said}"
            ) from error
        logits = getattr(output, "logits", None)
        found.append(output[0] if logits is None else logits)
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().sum())


def _agreement(found: Sequence[Tensor], right: Sequence[Tensor]) -> float | None:
    if right[0].shape[-1] < 2:
        return None
    pairs = zip(found, right, strict=True)
    same = [(one.argmax(dim=-1) == other.argmax(dim=-1)).flatten() for one, other in pairs]
    return float(torch.cat(same).double().mean())
