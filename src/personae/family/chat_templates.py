"""The chat template of a merged model: one by name, that of most models, or a text of one's own."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from personae._small_files import Unfit, read_text
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.vocabulary import read_json
from personae.errors import CheckpointError

AUTO = "auto"
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_OTHERS = ("chat_template.json",)

TEMPLATES: Mapping[str, str] = {
    "alpaca": (
        "{% set system = messages | selectattr('role', 'equalto', 'system') | list %}"
        "{{ (system | last).content | trim if system else '' }}\n\n"
        "{% set heads = {'user': 'Instruction', 'assistant': 'Response',"
        " 'user_context': 'Input'} %}"
        "{% for message in messages if message.role in heads %}"
        "### {{ heads[message.role] }}:\n{{ message.content | trim }}"
        "{{ '' if loop.last else '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}"
        "{{ '\\n\\n### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "exaone": (
        "{% if messages[0].role != 'system' %}[|system|][|endofturn|]\n{% endif %}"
        "{% for message in messages %}[|{{ message.role }}|]{{ message.content }}"
        "{{ '' if message.role == 'user' else '[|endofturn|]' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set said = namespace(by_system='') %}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{% set said.by_system = message.content + '\n\n' %}"
        "{% elif message.role == 'user' %}"
        "{{ ' [INST] ' + said.by_system + message.content + ' [/INST]' }}"
        "{% set said.by_system = '' %}"
        "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
        "{% else %}{{ raise_exception('A message is of system, user or assistant.') }}"
        "{% endif %}{% endfor %}"
    ),
}
"""Formats by the names that mergekit has for them."""


def template_fault(said: str) -> str:
    """What is wrong with a chat template; empty if nothing."""
    if said == AUTO or said in TEMPLATES or "{" in said:
        return ""
    known = ", ".join([AUTO, *TEMPLATES])
    return f"chat_template = '{said}': expected one of {known}, or the text of a Jinja template."


def with_template(
    files: Mapping[str, Path | bytes], said: str | None, models: Iterable[Checkpoint]
) -> dict[str, Path | bytes]:
    """Small files with the chat template that is wanted; as they are if none is.

    It goes into a file of its own, and for older loaders into the tokenizer's configuration too.

    Args:
        files: Relative name to the file, or to its content.
        said: `auto` for the template that most models have, a name, or the template itself.
        models: Whose templates count, the first of several that as many have.

    Raises:
        CheckpointError: if a tokenizer's configuration is damaged.
    """
    if said is None:
        return {**files}
    template = _most_common(models) if said == AUTO else TEMPLATES.get(said, said)
    if template is None:
        return {**files}
    found = {name: file for name, file in files.items() if name not in _OTHERS}
    found[_FILE] = template.encode()
    if _CONFIG in files:
        file = files[_CONFIG]
        config = json.loads(file) if isinstance(file, bytes) else read_json(file)
        config["chat_template"] = template
        found[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def _most_common(models: Iterable[Checkpoint]) -> str | None:
    found = [template.strip() for template in map(_template_of, models) if template]
    return Counter(found).most_common(1)[0][0] if found else None


def _template_of(model: Checkpoint) -> str | None:
    """The chat template of a model, the default one of several.

    Raises:
        CheckpointError: if a file with it is damaged.
    """
    if _FILE in model.auxiliary_files:
        try:
            return read_text(model.auxiliary_files[_FILE])
        except Unfit as error:
            path = model.auxiliary_files[_FILE]
            raise CheckpointError(f"{path} {error}. Copy or download it again.") from error
    if _CONFIG not in model.auxiliary_files:
        return None
    config = read_json(model.auxiliary_files[_CONFIG])
    said: Any = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(said, list):
        named = [one for one in said if isinstance(one, dict)]
        said = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return said if isinstance(said, str) else None
