"""Names that versions of torch and transformers give to one tensor.

Files hold the names of the version that wrote them; loaders take the old and the new ones. This
table has the most common ones, and needs no library; see `published_renames` for all others.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable

# What a version calls otherwise, and the name that stands here for both.
_RENAMED = (
    # The BERT of 2018.
    (re.compile(r"(^|\.)LayerNorm\.gamma$"), r"\1LayerNorm.weight"),
    (re.compile(r"(^|\.)LayerNorm\.beta$"), r"\1LayerNorm.bias"),
    # Weight normalisation as torch.nn.utils.parametrizations has it since torch 2.0.
    (re.compile(r"(^|\.)weight_g$"), r"\1parametrizations.weight.original0"),
    (re.compile(r"(^|\.)weight_v$"), r"\1parametrizations.weight.original1"),
    # Mixtral before transformers 5.
    (re.compile(r"(^|\.)block_sparse_moe\."), r"\1mlp."),
    # Models of vision and language since transformers 4.52: `language_model.model.layers` is
    # `model.language_model.layers`, `visual` is `model.visual`, `language_model.lm_head` `lm_head`.
    (re.compile(r"^((model|language_model)\.)+(?=.)"), ""),
)


def canonical(name: str) -> str:
    """One name for all that versions call a tensor; for comparing, not for files.

    Examples:
        >>> canonical("language_model.model.norm.weight"), canonical("bert.LayerNorm.gamma")
        ('norm.weight', 'bert.LayerNorm.weight')
    """
    for old, new in _RENAMED:
        name = old.sub(new, name)
    return name


def by_canonical(names: Iterable[str], rename: Callable[[str], str] = canonical) -> dict[str, str]:
    """Canonical name to name, without those that two names share: they are told apart as is."""
    short = {name: rename(name) for name in names}
    count = Counter(short.values())
    return {short[name]: name for name in short if count[short[name]] == 1}
