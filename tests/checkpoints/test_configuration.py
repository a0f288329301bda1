"""What a config.json must say of tensors of other shapes; loading with transformers is tested in
tests/family/test_small_files.py."""

from copy import deepcopy

import pytest
import torch

from personae._types import TensorSpec
from personae.checkpoints.configuration import fit_config

BERT = {
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 40,
    "type_vocab_size": 2,
    "max_position_embeddings": 12,
}
NAMES = {
    "embeddings.word_embeddings.weight": (40, 16),
    "embeddings.position_embeddings.weight": (12, 16),
    "embeddings.token_type_embeddings.weight": (2, 16),
    "encoder.layer.0.output.dense.weight": (16, 24),
}


def _specs(**shapes: tuple[int, ...]) -> dict[str, TensorSpec]:
    changed = NAMES | {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {name: TensorSpec(name, shape, torch.float32) for name, shape in changed.items()}


def test_what_fits_is_left_alone() -> None:
    assert fit_config(BERT, _specs(), _specs()) == (BERT, [])


@pytest.mark.parametrize(
    ("name", "rows", "key"),
    [
        ("word_embeddings", 48, "vocab_size"),
        ("word_embeddings", 30, "vocab_size"),
        ("position_embeddings", 20, "max_position_embeddings"),
        ("token_type_embeddings", 1, "type_vocab_size"),
    ],
)
def test_rows_are_what_the_tensor_has(name: str, rows: int, key: str) -> None:
    before = deepcopy(BERT)
    written = _specs(**{f"embeddings__{name}__weight": (rows, 16)})
    assert fit_config(BERT, _specs(), written) == (BERT | {key: rows}, [f"{key} {rows}"])
    assert before == BERT


def test_positions_with_an_offset() -> None:
    """OPT has two rows more than it says positions."""
    described = _specs(model__decoder__embed_positions__weight=(14, 16))
    written = _specs(model__decoder__embed_positions__weight=(22, 16))
    assert fit_config(BERT, described, written)[0]["max_position_embeddings"] == 20


def test_a_vocabulary_inside() -> None:
    described = _specs(model__language_model__embed_tokens__weight=(40, 16))
    written = _specs(model__language_model__embed_tokens__weight=(44, 16))
    said = {"text_config": {"vocab_size": 40, "model_type": "llama"}, "vision_config": {"n": 40}}
    inner = {"vocab_size": 44, "model_type": "llama"}
    assert fit_config(said, described, written)[0] == said | {"text_config": inner}
    unsaid = {"text_config": {"model_type": "llama"}}  # it is the class's default
    assert fit_config(unsaid, described, written)[0]["text_config"]["vocab_size"] == 44
    assert fit_config({}, described, written)[0] == {"vocab_size": 44}


@pytest.mark.parametrize(
    ("head", "model_class", "classes"),
    [
        ("classifier__weight", "SEQ_CLS", ["BertForSequenceClassification"]),
        ("classifier__weight", "TOKEN_CLS", ["BertForTokenClassification"]),
        ("classifier__weight", "BertForMultipleChoice", ["BertForMultipleChoice"]),
        ("classifier__weight", None, None),
        ("score__weight", None, ["BertForSequenceClassification"]),
        ("qa_outputs__weight", None, ["BertForQuestionAnswering"]),
        ("classification_head__out_proj__weight", None, ["BertForSequenceClassification"]),
    ],
)
def test_a_new_head(head: str, model_class: str | None, classes: list[str] | None) -> None:
    written = _specs(**{head: (3, 16), "classifier__dense__weight": (16, 16)})
    fitted, changes = fit_config(
        BERT | {"problem_type": "regression", "num_labels": 1}, _specs(), written, model_class
    )
    assert fitted["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert fitted["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert "problem_type" not in fitted and fitted["num_labels"] == 3
    assert fitted.get("architectures") == classes
    assert changes[0] == "3 labels"


def test_names_of_as_many_labels_stay() -> None:
    said = BERT | {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    fitted, changes = fit_config(said, _specs(score__weight=(3, 16)), _specs(score__weight=(2, 16)))
    assert (fitted, changes) == (said, [])


def test_a_dtype_as_it_is_written() -> None:
    said = BERT | {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}}
    described = {n: TensorSpec(n, s.shape, torch.bfloat16) for n, s in _specs().items()}
    fitted, changes = fit_config(said, described, _specs())
    inner = {"torch_dtype": "float32"}
    assert fitted == said | {"dtype": "float32", "text_config": inner} and changes == ["float32"]
