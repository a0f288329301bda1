"""personae compose: a model for a task that has no expert."""

from pathlib import Path
from typing import Annotated

import typer

from personae.cli import console, options
from personae.cli.texts import texts_from, weights_from
from personae.commands import compose as composing
from personae.encoders import text_encoder
from personae.errors import RecipeError
from personae.packs.reader import Pack
from personae.packs.weighting import TEMPERATURE, Weighting, given, weigh, weighable

_OF_LIKE = ("gamma", "temperature", "encoder", "template")
_OF_WRITING = ("head", "base", "shard_size", "overwrite", "workers", "memory", "device")


def compose(
    context: typer.Context,
    pack: Annotated[Path, typer.Argument(help="The pack's directory.")],
    like: Annotated[
        list[str] | None,
        typer.Option(
            help="What the task is about: class names separated by commas, a sentence, or @FILE "
            "with one text per line; repeatable."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER,…", help="The weight of each task, instead of --like."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory to write; without it, only weights are shown."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="Attach the head of a task of the pack, or of a checkpoint."),
    ] = None,
    gamma: Annotated[
        str | None,
        typer.Option(help="Weights from cosines: ratio or softmax.", show_default="ratio"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of softmax.", show_default=str(TEMPERATURE))
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Text encoder: minilm, or a directory or hub id of a sentence encoder or CLIP.",
            show_default="minilm",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Sentence that each text is put into, such as 'a photo of a {}'."),
    ] = None,
    base: options.Base = None,
    shard_size: options.ShardSize = "5GB",
    overwrite: options.Overwrite = False,
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Compose a model for an unseen task: the reference plus a weighted sum of the tasks' deltas.

    Heads are not part of the sum; --head attaches one.
    """
    shard_bytes = options.bytes_of("--shard-size", shard_size)
    if bool(like) == bool(weights):
        raise RecipeError(
            "Say what the task is like (--like TEXT), or give --weights; one of them."
        )
    options.refuse_unused(
        context,
        (
            "With --weights, leave out {}: only --like has such options.",
            _OF_LIKE if weights else (),
        ),
        ("Nothing is written without --out: leave out {}.", _OF_WRITING if out is None else ()),
    )
    opened = Pack(pack)
    if weights:
        weighting = given(weights_from(weights), opened.manifest, pack)
    else:
        weighting = _weighting(opened, like or [], gamma or "ratio", temperature, encoder, template)
    written = None
    if out is not None:
        with options.working(workers, memory, device) as work:
            written = composing.compose(
                pack,
                weighting,
                out,
                base=base,
                head=head,
                overwrite=overwrite,
                shard_bytes=shard_bytes,
                work=work,
            )
    if json:
        console.facts(weighting.to_json() | {"path": written and str(written)})
        return
    _show(weighting)
    if written is None:
        for text in weighting.notes:
            console.note(text)
    else:
        console.out.print(f"composed in {written}", markup=False)


def _weighting(
    pack: Pack,
    like: list[str],
    gamma: str,
    temperature: float | None,
    encoder: str | None,
    template: str | None,
) -> Weighting:
    texts = texts_from(like, "--like")
    weighable(pack, texts, gamma=gamma, temperature=temperature)
    embed = text_encoder(encoder or "minilm", template=template or "{}")
    return weigh(pack, texts, embed, gamma=gamma, temperature=temperature)


def _show(weighting: Weighting) -> None:
    if weighting.cosines is None:
        rows = [[name, f"{weight:.4f}"] for name, weight in weighting.weights.items()]
        console.table("", ["task", "weight"], rows)
        return
    few = ", ".join(weighting.like[:5])
    more = f" and {len(weighting.like) - 5} more" if len(weighting.like) > 5 else ""
    count = "1 text" if len(weighting.like) == 1 else f"{len(weighting.like)} texts"
    console.out.print(f"like {count}: {few}{more}; encoder: {weighting.encoder}", markup=False)
    rows = [
        [name, f"{weighting.cosines[name]:.4f}", f"{weight:.4f}"]
        for name, weight in weighting.weights.items()
    ]
    console.table("", ["task", "cosine", "weight"], rows)
