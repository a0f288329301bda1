"""The hub reader against a hub on this machine that counts the bytes it sends."""

import json
from collections.abc import Iterator

import pytest
import torch
from fake_hub import COMMIT, FakeHub, serve
from huggingface_hub import constants
from safetensors.torch import save_file

from personae.checkpoints import open_checkpoint
from personae.errors import CheckpointError
from toys import INDEX, write_sharded

MIB = 1 << 20
LARGE = MIB // 4  # elements of an fp32 tensor of one MiB


@pytest.fixture
def hub(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """A hub with a sharded model, a single-file model, a pickled one and an adapter."""
    root = tmp_path_factory.mktemp("hub")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(512, LARGE // 512, generator=generator) for _ in range(2))
    sharded = write_sharded(
        root / "sharded", {"one.safetensors": {"a": first}, "two.safetensors": {"b": second}}
    )
    (sharded / "config.json").write_text("{}")
    (sharded / "README.md").write_text("none of ours")
    for name in ("single", "pickled", "adapter"):
        (root / name).mkdir()
    save_file({"layer.weight": first}, root / "single" / "model.safetensors")
    torch.save({"a": torch.ones(3)}, root / "pickled" / "pytorch_model.bin")
    factors = {"lora_A": torch.ones(1, LARGE // 512), "lora_B": torch.ones(512, 1)}
    save_file(
        {f"base_model.model.layer.{side}.weight": t for side, t in factors.items()},
        root / "adapter" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with serve({f"org/{path.name}": path for path in root.iterdir()}) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield fake


def test_opening_fetches_headers_only(hub: FakeHub) -> None:
    opened = open_checkpoint("org/sharded@v1")
    assert opened.source == "org/sharded@v1" and opened.revision == COMMIT
    assert {n: s.shape for n, s in opened.specs.items()} == {"a": (512, 512), "b": (512, 512)}
    assert list(opened.auxiliary_files) == ["config.json"]
    # Of each 1 MiB shard the first 100 kB or so were sent; then index and config.json.
    shards = ("one.safetensors", "two.safetensors")
    assert {name for name, _ in hub.served} == {*shards, INDEX, "config.json"}
    assert all(0 < hub.sent(shard) < 150_000 for shard in shards)


def test_reading_downloads_the_one_shard_it_needs(hub: FakeHub) -> None:
    opened = open_checkpoint("org/sharded")
    headers = hub.sent("two.safetensors")
    stored = open_checkpoint(hub.repos["org/sharded"])
    assert torch.equal(opened.read("a"), stored.read("a"))
    assert torch.equal(opened.read_rows("a", 3, 9), stored.read("a")[3:9])
    assert hub.sent("one.safetensors") > MIB
    assert hub.sent("two.safetensors") == headers
    once = hub.sent("one.safetensors")
    opened.read("a")
    assert hub.sent("one.safetensors") == once
    assert opened.auxiliary_files["config.json"].read_text() == "{}"


def test_everything_after_opening_asks_for_the_commit(hub: FakeHub) -> None:
    opened = open_checkpoint("org/single@v1")
    opened.read("layer.weight")
    resolved = [request for request in hub.requests if "/resolve/" in request]
    assert resolved and all(f"/resolve/{COMMIT}/" in request for request in resolved)


def test_offline_what_is_cached_serves(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_checkpoint("org/single")
    expected = online.read("layer.weight")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    offline = open_checkpoint("org/single")
    assert torch.equal(offline.read("layer.weight"), expected)
    assert offline.revision == COMMIT and offline.source == "org/single"
    assert len(hub.requests) == asked
    with pytest.raises(CheckpointError, match=r"org/sharded is not in the hub cache.*OFFLINE"):
        open_checkpoint("org/sharded")


def test_unreachable_hub_falls_back_to_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_checkpoint("org/single").read("layer.weight")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert torch.equal(open_checkpoint("org/single").read("layer.weight"), expected)
    with pytest.raises(CheckpointError, match="not in the hub cache"):
        open_checkpoint("org/sharded")


def test_cached_headers_are_not_fetched_again(hub: FakeHub) -> None:
    open_checkpoint("org/single").read("layer.weight")
    sent = hub.sent("model.safetensors")
    open_checkpoint("org/single")
    assert hub.sent("model.safetensors") == sent


def test_pickles_and_adapters(hub: FakeHub) -> None:
    assert torch.equal(open_checkpoint("org/pickled").read("a"), torch.ones(3))
    base = open_checkpoint("org/single")
    adapter = open_checkpoint("org/adapter", base=base)
    assert hub.sent("model.safetensors") < 150_000  # fitting the two took headers alone
    # alpha 2 / rank 1 times a product of ones
    assert torch.equal(adapter.read("layer.weight"), base.read("layer.weight") + 2)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("org/gated", "is gated. Accept its conditions on its hub page, then log in"),
        ("org/absent", "the hub has no such model, or it is private"),
        ("org/private", "the hub has no such model, or it is private"),
        ("org/single@v9", "no such revision. Name a branch, tag or commit after '@'"),
        ("org/-.-", "org/-.-"),
    ],
)
def test_refusals_say_what_to_do(hub: FakeHub, source: str, text: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(source)
    assert text in str(refused.value)


def test_a_shard_the_index_names_but_the_hub_lacks(hub: FakeHub) -> None:
    (hub.repos["org/sharded"] / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names two\.safetensors, which is not there"):
        open_checkpoint("org/sharded")


def test_a_hub_file_that_is_no_safetensors_file(hub: FakeHub) -> None:
    (hub.repos["org/single"] / "model.safetensors").write_bytes(b"\x05" + b"\0" * 7 + b"junk!")
    with pytest.raises(CheckpointError, match=r"^org/single: .*model\.safetensors"):
        open_checkpoint("org/single")


@pytest.mark.parametrize("field", ['"shape": [1e999]', '"shape": 5', '"shape": [-1]'])
def test_a_hub_header_that_is_not_valid(hub: FakeHub, field: str) -> None:
    text = f'{{"x": {{"dtype": "U8", {field}, "data_offsets": [0, 1]}}}}'.encode()
    raw = len(text).to_bytes(8, "little") + text + b"1"
    (hub.repos["org/single"] / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"org/single/model\.safetensors .*is not valid"):
        open_checkpoint("org/single")
