"""Chat templates: by name, of most models, or a text of one's own; what they render."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from personae.checkpoints import open_checkpoint
from personae.family.chat_templates import TEMPLATES, template_fault, with_template
from toy_vocabularies import model, tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]
RENDERED = {
    "alpaca": "Be brief.\n\n### Instruction:\n2 + 2?\n\n### Response:\n4",
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
    ),
    "exaone": ("[|system|]Be brief.[|endofturn|]\n[|user|]2 + 2?\n[|assistant|]4[|endofturn|]\n"),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    ),
    "mistral": "<s> [INST] Be brief.\n\n2 + 2? [/INST] 4</s>",
}


def rendered(template: str, messages: list[dict[str, str]], **more: Any) -> str:
    """As transformers renders it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return environment.from_string(template).render(messages=messages, **tokens, **more)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_by_name_renders(name: str) -> None:
    assert rendered(TEMPLATES[name], TALK) == RENDERED[name]


def test_where_the_assistant_is_to_go_on() -> None:
    ends = {
        "alpaca": "\n\n### Response:\n",
        "chatml": "<|im_start|>assistant\n",
        "exaone": "[|assistant|]",
        "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "mistral": "[/INST]",
    }
    for name, end in ends.items():
        assert rendered(TEMPLATES[name], TALK[:2], add_generation_prompt=True).endswith(end)


def written(directory: Path, said: str | None, *models: Path) -> dict[str, Any]:
    """The files after a template is put into those of the first model."""
    opened = [open_checkpoint(one) for one in models]
    found = with_template(opened[0].auxiliary_files, said, opened)
    return {name: file for name, file in found.items() if isinstance(file, bytes)}


def talker(directory: Path, template: str | None, **more: Any) -> Path:
    """A model with a chat template in a file, or in the tokenizer's configuration."""
    model(directory, 4, tokenizer())
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    if more:
        file = directory / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return directory


def test_a_template_is_written_where_loaders_look(tmp_path: Path) -> None:
    a = talker(tmp_path / "a", "old")
    found = written(tmp_path, "{{ messages }}", a)
    assert found["chat_template.jinja"] == b"{{ messages }}"
    config = json.loads(found["tokenizer_config.json"])
    assert config["chat_template"] == "{{ messages }}"
    assert config["unk_token"] == "<unk>"
    assert written(tmp_path, None, a) == {}
    assert written(tmp_path, "chatml", a)["chat_template.jinja"].decode() == TEMPLATES["chatml"]


def test_the_template_of_most_models(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two "}]
    models = [
        talker(tmp_path / "a", "one"),
        talker(tmp_path / "b", "two"),
        talker(tmp_path / "c", None, chat_template=several),
        talker(tmp_path / "d", None),
        talker(tmp_path / "e", None, chat_template="one"),
    ]
    assert written(tmp_path, "auto", *models[:4])["chat_template.jinja"] == b"two"
    assert written(tmp_path, "auto", *models)["chat_template.jinja"] == b"one"  # the first of two
    assert written(tmp_path, "auto", models[3]) == {}


def test_what_is_no_template() -> None:
    assert template_fault("auto") == template_fault("llama3") == template_fault("{{ x }}") == ""
    assert "expected one of auto, alpaca, chatml, exaone" in template_fault("chatlm")
