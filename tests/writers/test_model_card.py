"""Model cards: front matter the hub reads, and a recipe that comes back as it was."""

import re
from dataclasses import replace

import yaml
from hypothesis import given
from hypothesis import strategies as st

from personae.writers.model_card import CardFacts, Source, model_card

FACTS = CardFacts(
    title="merged_news",
    method="ties",
    summary="Trim each task vector, elect one sign per entry, merge the entries that agree.",
    paper="arXiv:2306.01708",
    conventions="papers",
    parameters={"density": 0.2, "reduce": "mean"},
    base=Source("base", "org/base@main", "0f3c"),
    experts=[
        Source("news", "org/news", "77aa", {"weight": [0.0, 1.0]}),
        Source("law", "./local/law"),
    ],
    recipe="merge_method: ties\nbase_model: org/base@main\n",
    versions={"personae": "0.1.0", "torch": "2.6.0"},
    dtype="bfloat16",
    notes=["density is *global*"],
)

WHOLE = """\
---
base_model:
- org/base
- org/news
library_name: transformers
tags:
- merge
- personae
---

# merged_news

A merge of 2 models by **ties**, relative to their base `org/base@main`. Weights are bfloat16.

## Models

| model | from | revision | parameters |
|---|---|---|---|
| base | `org/base@main` | `0f3c` |  |
| news | `org/news` | `77aa` | weight = `[0.0, 1.0]` |
| law | `./local/law` | local |  |

## Method

ties: Trim each task vector, elect one sign per entry, merge the entries that agree. \
[arXiv:2306.01708](https://arxiv.org/abs/2306.01708)

| parameter | value |
|---|---|
| `density` | `0.2` |
| `reduce` | `mean` |

## Recipe

Written to a file, `personae merge FILE.yaml OUT` runs it again.

```yaml
merge_method: ties
base_model: org/base@main
```

## Notes

* density is \\*global\\*

Made with personae 0.1.0, torch 2.6.0.
"""


def test_a_whole_card():
    assert model_card(FACTS) == WHOLE


def test_local_models_are_no_ids_of_the_hub():
    experts = [Source("a", "/home/me/a"), Source("b", "./b")]
    card = model_card(replace(FACTS, base=None, experts=experts, parameters={}, notes=()))
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["merge", "personae"]}
    assert "relative to their average." in card
    assert "## Notes" not in card


def test_another_convention_and_tokenizer_are_said():
    card = model_card(replace(FACTS, conventions="mergekit", tokenizer="expert news"))
    assert "ties (as mergekit means it): Trim" in card
    assert "The tokenizer is that of expert news." in card


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n`")))
def test_the_recipe_comes_back_whatever_is_in_it(text):
    card = model_card(replace(FACTS, recipe=text))
    found = re.search(r"runs it again\.\n\n(`{3,})yaml\n(.*?)\n\1\n", card, flags=re.DOTALL)
    assert found is not None and found[2] == text.strip()


def test_names_and_places_break_no_table():
    odd = Source("a_b|c", "dir|x/`y`", None, {"weight": "a|b"})
    card = model_card(replace(FACTS, experts=[odd]))
    row = next(line for line in card.splitlines() if line.startswith("| a"))
    assert row == r"| a\_b\|c | `` dir\|x/`y` `` | local | weight = `a\|b` |"
