"""Vocabularies: the tokenizer and config files that stand beside a merged model."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from personae.family.vocabularies import merged_auxiliary_files
from toy_vocabularies import merged, model, tokenizer


def test_the_union_tokenizer_reads_the_tokens_of_all(tmp_path):
    base = model(tmp_path / "base", 5, tokenizer("<x>"))
    a = model(tmp_path / "a", 7, tokenizer("<x>", "<p>", "<q>"))
    b = model(tmp_path / "b", 6, tokenizer("<q>"))
    found, (reference, _) = merged(base, "union", a=a, b=b)
    assert found is not None
    out = tmp_path / "out"
    _write(merged_auxiliary_files(reference, found, None), out)
    joint = AutoTokenizer.from_pretrained(out)
    assert joint("ab<p> a<q><x>").input_ids == [3, 5, 1, 6, 4]
    assert len(joint) == 7
    assert joint.decode([5, 6]) == "<p><q>"
    config = json.loads((out / "config.json").read_text())
    assert config == {"vocab_size": 7, "eos_token_id": 0}


def test_tokens_are_added_to_every_file_that_lists_them(tmp_path):
    base = model(tmp_path / "base", 4, tokenizer())
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"0": {"content": "<unk>", "special": True}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "added_tokens.json").write_text("{}")
    expert = model(tmp_path / "e", 5, tokenizer("<x>"))
    found, (reference, _) = merged(base, "union", e=expert)
    assert found is not None
    out = tmp_path / "out"
    _write(merged_auxiliary_files(reference, found, None), out)
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder["4"]["content"] == "<x>" and "id" not in decoder["4"]
    assert json.loads((out / "added_tokens.json").read_text()) == {"<x>": 4}
    assert AutoTokenizer.from_pretrained(out)("a<x>").input_ids == [1, 4]


def test_an_expert_s_tokenizer_replaces_the_base_s(tmp_path):
    base = model(tmp_path / "base", 5, tokenizer("<x>"))
    (base / "chat_template.jinja").write_text("the base's")
    (base / "preprocessor_config.json").write_text("{}")
    expert = model(tmp_path / "e", 6, tokenizer("<y>"))
    config = {"vocab_size": 6, "eos_token_id": 4, "text_config": {"vocab_size": 6}}
    (expert / "config.json").write_text(json.dumps({**config, "architectures": ["Other"]}))
    nested = {"vocab_size": 5, "eos_token_id": 0, "text_config": {"vocab_size": 5, "x": 1}}
    (base / "config.json").write_text(json.dumps(nested))
    found, (reference, _) = merged(base, "e", e=expert)
    assert found is not None
    out = tmp_path / "out"
    _write(merged_auxiliary_files(reference, found, None), out)
    assert not (out / "chat_template.jinja").exists()
    assert (out / "preprocessor_config.json").exists()
    assert (out / "tokenizer.json").read_bytes() == (expert / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text()) == {
        "vocab_size": 6,
        "eos_token_id": 4,
        "text_config": {"vocab_size": 6, "x": 1},
    }


def _write(files: dict[str, Path | bytes], out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content.read_bytes() if isinstance(content, Path) else content
        (out / name).write_bytes(data)
