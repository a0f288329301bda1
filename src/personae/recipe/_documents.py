"""Several recipes in one file, parted by `---`: which is merged from which.

Each but one has a `name`, by which others list what it gives among their models. They may stand in
any order. The one without a name, or if all have one the last, gives the output.
"""

from collections.abc import Sequence

from personae.checkpoints.naming import is_safe_name
from personae.recipe._faults import Fault
from personae.recipe._yaml import Document
from personae.recipe.merge_recipe import MergeRecipe


def names_of(documents: Sequence[Document], faults: Sequence[list[Fault]]) -> list[str | None]:
    """The names of documents; that of the output is None.

    Args:
        documents: All of a file.
        faults: Of each document; gets what is wrong with its name.
    """
    names: list[str | None] = []
    for document, wrong in zip(documents, faults, strict=True):
        name = document.content.get("name")
        if name is not None and not (isinstance(name, str) and is_safe_name(name)):
            text = f"name = {name!r}: expected letters, digits, '.', '_' and '-'."
            wrong.append(Fault(("name",), text))
            name = f"#{len(names)}"
        elif name in names and name is not None:
            wrong.append(Fault(("name",), f"Two documents are named '{name}'. Rename one."))
        names.append(name)
    unnamed = [n for n, name in enumerate(names) if name is None]
    for n in unnamed[:-1]:
        text = "Two documents have no 'name'. Name all but the one that gives the output."
        faults[n].append(Fault(("merge_method",), text))
    if not unnamed:
        names[-1] = None
    return names


def in_order(recipes: Sequence[MergeRecipe], faults: Sequence[list[Fault]]) -> list[MergeRecipe]:
    """Recipes after those that they are merged from; the last gives the output.

    Args:
        recipes: All of a file.
        faults: Of each; gets recipes that no other uses, or that use each other.
    """
    by_name = {recipe.name: recipe for recipe in recipes}
    ordered: list[MergeRecipe] = []
    under_way: list[str | None] = []

    def visit(name: str | None) -> None:
        recipe = by_name[name]
        if recipe in ordered:
            return
        if name in under_way:
            text = f"'{name}' is merged from itself, through {under_way[-1]}."
            faults[recipes.index(recipe)].append(Fault(("name",), text))
            return
        under_way.append(name)
        for other in recipe.models:
            named = other.partition("+")[0]
            if named in by_name:
                visit(named)
        under_way.pop()
        ordered.append(recipe)

    visit(None)
    for n, recipe in enumerate(recipes):
        if recipe not in ordered:
            text = f"Nothing is merged from '{recipe.name}'. Leave the document out, or use it."
            faults[n].append(Fault(("name",), text))
    return ordered
