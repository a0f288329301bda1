"""Answers batch by batch, where memory is short, and by a head made of class names."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from personae.errors import BudgetError, CheckpointError
from personae.evaluate import Task
from personae.evaluate.intervals import bootstrap_interval
from personae.evaluate.predictions import predict
from personae.evaluate.zero_shot import ZeroShotModel, zero_shot_head
from personae.run.work import Work

VALUES = torch.arange(-5.0, 6.0)
EXAMPLES = {"values": VALUES, "labels": (VALUES > 0).long()}
TASK = Task("toy", "none", "accuracy", ("low", "high"), EXAMPLES, EXAMPLES)


class Narrow(nn.Module):
    """Answers 1 where the value is positive, and can take so many examples at once."""

    def __init__(self, most: int, text: str):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.most, self.text = most, text
        self.seen: list[int] = []

    def forward(self, values: torch.Tensor):
        if len(values) > self.most:
            raise RuntimeError(self.text)
        self.seen.append(len(values))
        logits = self.slope * values
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(logits), logits], dim=1))


SHORT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


def test_batches_are_halved_where_memory_is_short_and_that_is_said():
    told: list[str] = []
    model = Narrow(2, SHORT)
    found = predict(model, TASK, EXAMPLES, batch_size=8, work=Work(note=told.append))
    assert found.tolist() == EXAMPLES["labels"].tolist()
    assert model.seen == [2, 2, 2, 2, 2, 1]
    assert told == [f"toy: out of memory, batches of {n} from here on" for n in (4, 2)]


def test_one_example_that_does_not_fit_is_refused():
    with pytest.raises(BudgetError, match="'toy': one example does not fit into the memory of cpu"):
        predict(Narrow(0, SHORT), TASK, EXAMPLES)


def test_other_errors_are_as_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"):
        predict(Narrow(0, "shapes differ"), TASK, EXAMPLES)


def test_numbers_are_predicted_by_one_output():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.5))

        def forward(self, values: torch.Tensor):
            return SimpleNamespace(logits=(self.slope * values)[:, None])

    task = Task("toy", "none", "pearson", (), EXAMPLES, EXAMPLES)
    assert predict(Half(), task, EXAMPLES, batch_size=4).tolist() == (VALUES / 2).tolist()


def test_an_interval_is_the_normal_one_where_there_are_many_examples():
    """Of 70 and 90 % right of 2000: standard error of the mean √(.7·.3 + .9·.1)/√2000/2."""
    labels = np.zeros(2000, np.int64)
    answers = {"a": labels + (np.arange(2000) < 600), "b": labels + (np.arange(2000) < 200)}
    both = {"a": labels, "b": labels}
    kinds = dict.fromkeys(both, "accuracy")
    low, high = bootstrap_interval(answers, both, kinds)
    error = np.sqrt(0.7 * 0.3 + 0.9 * 0.1) / np.sqrt(2000) / 2
    assert low == pytest.approx(0.8 - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(0.8 + 1.96 * error, abs=0.15 * error)
    # Means of examples are only a quicker way: any metric sees the same draws.
    kinds = dict.fromkeys(both, "f1_macro")
    flat = bootstrap_interval(both, both, kinds, resamples=20)
    assert flat == (1.0, 1.0)
    assert bootstrap_interval(both, both, kinds, resamples=20) == flat


def clip():
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 3, "bos_token_id": 2}
    both = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    both["num_attention_heads"] = 2
    config = transformers.CLIPConfig(
        text_config=both | text,
        vision_config=both | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.CLIPModel(config).eval()


def words(sentences, **_):
    """Tokens by letters: begins with 2, ends with 3, padded with 3."""
    rows = [[2, *(4 + ord(letter) % 30 for letter in s[-6:]), 3] for s in sentences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [3] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_zero_shot_is_what_clip_itself_answers():
    """With one template, the logits are those of the whole model on images and sentences."""
    model, names = clip(), ["cat", "giraffe", "tree"]
    head = zero_shot_head(model, words, names, ["a {}"])
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        sentences = words([f"a {name}" for name in names])
        wanted = model(**sentences, pixel_values=images).logits_per_image
        for tower in (model, model.vision_model):
            found = ZeroShotModel(tower, head)(pixel_values=images).logits
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_templates_are_averaged_as_clip_s_authors_do():
    model = clip()
    head = zero_shot_head(model, words, ["cat", "tree"], ["a {}", "no {}"])
    with torch.inference_mode():
        each = [model.get_text_features(**words([t])).pooler_output for t in ("a cat", "no cat")]
    mean = torch.stack([one[0] / one[0].norm() for one in each]).mean(dim=0)
    torch.testing.assert_close(head.embeddings[0], mean / mean.norm(), atol=1e-5, rtol=1e-5)


def test_a_tower_of_images_alone_has_no_text():
    with pytest.raises(CheckpointError, match="no text tower"):
        zero_shot_head(clip().vision_model, words, ["a", "b"])
