"""An adapter with a classifier on a base with a masked-LM head: rebuilt, it is a classifier."""

from pathlib import Path
from typing import Any

import pytest
import torch

from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.recipe import PackSettings
from personae.run.work import Work

_WHOLE = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
_SMALL: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "max_position_embeddings": 16, "embedding_size": 16},
    **{"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
}


@pytest.mark.parametrize(
    ("model_type", "base", "target"),
    [
        ("bert", "AutoModelForMaskedLM", "query"),
        ("distilbert", "AutoModelForMaskedLM", "q_lin"),
        ("electra", "AutoModelForMaskedLM", "query"),
        ("albert", "AutoModelForMaskedLM", "query"),
    ],
)
def test_the_base_s_head_is_left_out(model_type: str, base: str, target: str, tmp_path: Path):
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    config = transformers.AutoConfig.for_model(model_type, **_SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, base).from_config(config).save_pretrained(tmp_path / "base")
        loader = transformers.AutoModelForSequenceClassification
        model = loader.from_pretrained(tmp_path / "base", num_labels=3)
        lora = LoraConfig(
            r=2, target_modules=[target], task_type="SEQ_CLS", init_lora_weights=False
        )
        tuned = get_peft_model(model, lora)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    untuned = loader.from_pretrained(tmp_path / "base", num_labels=3)
    expected: Any = PeftModel.from_pretrained(untuned, tmp_path / "adapter").merge_and_unload()  # type: ignore[operator]
    notes = list[str]()
    work = Work(workers=1, note=notes.append)
    pack(tmp_path / "base", {"x": tmp_path / "adapter"}, tmp_path / "p", settings=_WHOLE, work=work)
    told = next(note for note in notes if "will be missing" in note)
    assert any(head in told for head in ("cls.", "vocab_", "lm_head", "generator", "predictions"))
    out = unpack(tmp_path / "p", "x", tmp_path / "out", work=work)
    config: Any = transformers.AutoConfig.from_pretrained(out)
    class_name = config.architectures[0]
    found, info = getattr(transformers, class_name).from_pretrained(out, output_loading_info=True)
    if info["missing_keys"]:  # what the adapter never saved: a new pooler or pre-classifier
        assert all("pool" in name or "pre_class" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in found.state_dict().items():
        if name not in info["missing_keys"]:
            torch.testing.assert_close(tensor, expected.state_dict()[name], atol=1e-5, rtol=1e-4)
