"""Bad input: exit 2, a message that names it, and every file as it was before."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from families import listing, saved, small_base, tuned
from personae.cli import app
from personae.packs.manifest import checksum
from toys import write_sharded

BASE = small_base()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    saved(BASE, folder / "base")
    saved(tuned(BASE, 1), folder / "news")
    saved(tuned(BASE, 2), folder / "law")
    shards = list(tuned(BASE, 3).items())
    write_sharded(
        folder / "sharded",
        {"model-1.safetensors": dict(shards[:3]), "model-2.safetensors": dict(shards[3:])},
    )
    arguments = ["pack", "--base", folder / "base", "--expert", f"news={folder / 'news'}"]
    done = CliRunner().invoke(app, [str(a) for a in (*arguments, "--out", folder / "pack")])
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, to be spoilt; commands run in it."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def refused(line: str, *messages: str) -> Result:
    """Run a command that must be refused without changing a file here."""
    before = listing(Path.cwd())
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    for message in messages:
        assert message in " ".join(result.stderr.split()), result.stderr
    assert listing(Path.cwd()) == before
    return result


def _pack(*experts: str, more: str = "") -> str:
    named = " ".join(f"--expert {expert}" for expert in experts)
    return f"pack --base base {named} --out out {more}"


def test_a_missing_shard(work):
    (work / "sharded/model-2.safetensors").unlink()
    refused(_pack("x=sharded"), "error: Expert 'x': ", "model-2.safetensors")


def test_a_truncated_shard(work):
    file = work / "sharded/model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    refused(_pack("x=sharded"), "Expert 'x': ", "model-2.safetensors")


def test_an_index_that_names_an_absent_file(work):
    index = work / "sharded/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["scale"] = "model-9.safetensors"
    index.write_text(json.dumps(content))
    refused(_pack("x=sharded"), "Expert 'x': ", "model-9.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(work, value):
    state = tuned(BASE, 1)
    state["layer.weight"][2, 3] = value
    saved(state, work / "bad")
    message = "Expert 'x': tensor 'layer.weight' holds 1 value(s) that are NaN or infinite"
    refused(_pack("x=bad"), message)


def test_shapes_that_disagree(work):
    state = tuned(BASE, 1)
    for name in ("embed.weight", "layer.weight", "conv.weight"):
        state[name] = torch.zeros(40, 8)
    saved(state, work / "bad")
    refused(_pack("x=bad", "y=news"), "Expert 'x': the shapes of", "differ from the base's")


def test_an_expert_that_is_the_base(work):
    shutil.copytree(work / "base", work / "copy")
    refused(_pack("x=base"), "Expert 'x' is the base itself (base)")
    refused(_pack("x=copy"), "Expert 'x' equals the base: all 5 shared tensors are the same")


def test_two_experts_of_one_name(work):
    refused(_pack("x=news", "x=law"), "--expert: two are named 'x'")
    refused(_pack("x=news", "X=law"), "Two experts are named 'X' (case is ignored)")


@pytest.mark.parametrize("name", ["../x", ".x", "a/b"])
def test_an_unsafe_task_name(work, name):
    refused(_pack(f"{name}=news"), f"'{name}' is not a safe file name for a task")


def test_an_expert_without_a_name(work):
    refused(_pack("news"), "--expert news: write NAME=PATH")


def test_a_method_of_mergekit_alone(work):
    refused(
        "methods ramplus_tl",
        "'ramplus_tl' is a method of mergekit that personae does not have. Near to it is ties.",
        "Known:",
    )


def test_several_faults_at_once(work):
    refused(
        _pack("x=gone", "y=base", ".z=law"),
        "3 faults:",
        "Expert 'x': ",
        "Expert 'y' is the base itself",
        "'.z' is not a safe",
    )


def test_a_wrong_base_at_unpack(work):
    refused("unpack pack --task news --out out --base law", "law is not the reference this pack")


def test_an_unknown_task(work):
    refused("unpack pack --task new --out out", "no task 'new'. Did you mean 'news'?")


@pytest.mark.parametrize("position", [3, 9, 100, -1])
def test_a_flipped_byte_of_a_task_file(work, position):
    file = work / "pack/tasks/news.safetensors"
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)
    refused("unpack pack --task news --out out", "news.safetensors is damaged")
    refused("verify pack", "news.safetensors is damaged")


def test_a_newer_pack(work):
    path = work / "pack/pack.json"
    content = json.loads(path.read_text()) | {"format_version": 3}
    content["checksum"] = checksum({k: v for k, v in content.items() if k != "checksum"})
    path.write_text(json.dumps(content))
    for command in ("inspect pack", "verify pack", "unpack pack --task news --out out"):
        refused(command, "is of pack format 3", "Update personae")


def test_an_output_that_is_not_empty(work):
    refused(_pack("x=news").replace("--out out", "--out law"), "exists and is not empty")
    refused("unpack pack --task news --out law", "exists and is not empty")


@pytest.mark.parametrize("budget", ["0.001%", "10B"])
def test_an_impossible_budget(work, budget):
    refused(_pack("x=news", more=f"--budget {budget}"), "Task 'x': ", "cannot be met: the smallest")


@pytest.mark.parametrize("budget", ["0%", "some", "-1%"])
def test_a_budget_that_is_no_size(work, budget):
    refused(_pack("x=news", more=f"--budget={budget}"), f"'{budget}' is no size")


@pytest.mark.parametrize(("fraction", "limit"), [("0", "greater than 0"), ("1.5", "less than or")])
def test_a_rank_fraction_out_of_range(work, fraction, limit):
    refused(_pack("x=news", more=f"--rank-fraction {fraction}"), "dts: rank_fraction = ", limit)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--rank-fractoin 0.1", "No such option"),  # the rest depends on the version of click
        ("--method dtz", "Unknown method 'dtz'. Did you mean 'dts'?"),
        ("--method ties", "'ties' is a merge method, not a codec"),
        ("--reference ties", "a merged reference needs vector: difference"),
        ("--budget 30% --set rank_fraction=0.1", "give budget or rank_fraction, not both"),
        ("--set spilt=rank", "dts has no parameter 'spilt'. Did you mean 'split'?"),
        ("--set split", "--set split: write KEY=VALUE"),
        ("--set split=[", "--set: write a number, true, false or a word"),
        ("--vector sideways", "vector = 'sideways'"),
        ("--vector difference --reference tise", "Unknown method 'tise'. Did you mean 'ties'?"),
        ("--budget 30% --counting bytes", "counting = 'bytes'"),
        ("--device gpu", "Unknown device 'gpu'. Give auto, cpu, cuda or cuda:N."),
        ("--workers 0", "--workers"),
        ("--memory much", "--memory: 'much' is no size"),
        ("--memory 1KB", "The largest tensor needs 18,432 bytes of memory, the bound is 1,000"),
    ],
)
def test_options_that_cannot_be(work, more, message):
    refused(_pack("x=news", more=more), message)


@pytest.mark.parametrize("command", ["plan --memory much", "plan --memory 1KB"])
def test_plan_with_a_memory_bound_that_cannot_be(work, command):
    refused(f"{command} --base base --expert x=news", "memory")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pack --base base --expert x=news", "Say where the pack goes: --out DIR"),
        ("pack --expert x=news --out out", "Give the model that the experts were fine-tuned from"),
        ("pack --base base --out out", "There is no expert"),
        ("pack gone.yaml --out out", "gone.yaml cannot be read"),
        ("plan", "Say what to plan"),
        ("unpack gone --task x --out out", "gone is no pack"),
        ("unpack pack --task news --out out --device gpu", "Unknown device 'gpu'"),
        ("unpack pack --task news --out out --device cuda:99", "There is no device 'cuda:99' here"),
        (
            "verify pack --against news=news --device cuda:x",
            "Unknown device 'cuda:x'. Give auto, cpu, cuda or cuda:N",
        ),
        (
            "verify pack --against news=news --device cuda:99",
            "There is no device 'cuda:99' here. Give auto or cpu.",
        ),
        ("pack --base base --expert x=news --out o --device cuda:99", "There is no device"),
        ("unpack pack --task news --out out --shard-size x", "--shard-size: 'x' is no size"),
        ("inspect gone", "gone: no such file or directory"),
        ("inspect .", "holds 1 packs; inspect one of them: pack"),
        ("plan --shapes s.json --base base", "plan without checkpoints: leave out --base"),
        ("plan --base base --expert x=news -r 0.3 --budget 9%", "give --budget or --rank-fraction"),
        ("plan --base base --expert x=news --model-class AutoModel", "goes with --architecture"),
        ("pack --out pack --remove news --expert x=news", "--remove works with --out only"),
        ("pack --out pack --add --expert x=news --method svd", "--add takes codec, ranks"),
        ("methods dtss", "Unknown method 'dtss'. Did you mean 'dts'?"),
        ("pack --out pack --remove law", "has no task 'law'"),
        ("pack --out pack --add --base base --expert news=law", "already has a task 'news'"),
        ("verify pack --against law=law", "has no task 'law'"),
        ("verify pack --against law", "--against law: write NAME=PATH"),
        ("packs", "No such command 'packs'"),
        ("unpack pack --out out", "Missing option '--task'"),
    ],
)
def test_commands_that_lack_something(work, line, message):
    refused(line, message)


def test_a_disk_that_is_full(work, monkeypatch):
    usage = shutil.disk_usage(work)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(_pack("x=news"), "Cannot write", "the disk has 10 free")
    refused("unpack pack --task news --out out", "Cannot write", "the disk has 10 free")


class _Bomb:
    """Pickles to code that would leave a file."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("whole", [False, True])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(work, whole):
    (work / "bad").mkdir()
    path = work / "bad/pytorch_model.bin"
    if whole:
        path.write_bytes(pickle.dumps(_Bomb()))
    else:
        torch.save({"layer.weight": torch.ones(2), "bomb": _Bomb()}, path)
    refused(_pack("x=bad"), "Expert 'x': ", "pytorch_model.bin")
    assert not (work / "exploded").exists()
    pickle.loads(pickle.dumps(_Bomb()))  # the payload does what it says
    assert (work / "exploded").exists()


def test_a_file_that_is_no_checkpoint(work):
    (work / "notes.txt").write_text("hello")
    refused(_pack("x=notes.txt"), "Expert 'x': notes.txt is not a known kind of checkpoint")


def test_a_recipe_with_faults(work):
    (work / "r.yaml").write_text("pack_methd: dts\nmodels: [{model: news}]\nbudget: lots\n")
    refused("pack r.yaml --out out", "Unknown key 'pack_methd'", "budget = 'lots'")


def test_a_stale_pack_is_not_read_as_another(work):
    state = load_file(work / "pack/tasks/news.safetensors")
    save_file(state, work / "pack/tasks/news.safetensors")  # sound, but without our metadata
    refused("verify pack", "news.safetensors is damaged: its SHA-256")


MERGE = """\
merge_method: ties
base_model: base
models: [{model: news}, {model: law}]
conventions: papers
"""


def test_a_recipe_of_the_other_kind(work):
    (work / "merge.yaml").write_text(MERGE)
    (work / "pack.yaml").write_text("pack_method: dts\nbase_model: base\nmodels: [{model: law}]\n")
    refused(
        "pack merge.yaml --out out",
        "merge.yaml is wrong: line 1: This is a merge",
        "Run personae merge",
    )
    refused("merge pack.yaml out", "line 1: This is a pack recipe. Run personae pack")


@pytest.mark.parametrize("more", ["--base other", "--budget 1%", "--expert x=law", "--skip a"])
def test_plan_of_a_merge_takes_no_options_of_packs(work, more):
    (work / "merge.yaml").write_text(MERGE)
    refused(f"plan merge.yaml {more}", f"Leave out {more.split()[0]}: only packs have such options")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_clone_without_its_large_files(work, file):
    (work / "law/model.safetensors").unlink()
    (work / "law" / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(_pack("x=law"), f"law/{file} is a git-lfs pointer", "git lfs pull")


def test_a_mistyped_pattern_beside_the_shapes_it_was_meant_for(work):
    state = tuned(BASE, 5) | {"layer.bias": torch.zeros(9)}
    saved(state, work / "odd")
    text = MERGE.replace("model: law", "model: odd") + "skip: ['layr.*']\n"
    (work / "merge.yaml").write_text(text)
    refused("merge merge.yaml out", "'layer.bias' is (9,)", "skip: layr.* matches no tensor")


def test_a_budget_is_told_as_it_was_given(work):
    refused(_pack("x=law", more="--budget 0.0001%"), "The budget of 0.0001 % cannot be met")


def test_a_merge_of_no_tensor(work):
    (work / "merge.yaml").write_text(MERGE + "only: ['*nope*']\n")
    refused("merge merge.yaml out", "There is no tensor to merge", "'only' (*nope*)")


def test_a_recipe_that_is_no_yaml(work):
    (work / "bad.yaml").write_text("merge_method: [ties\nmodels: []\n")
    for command in ("merge bad.yaml out", "pack bad.yaml --out out"):
        said = refused(command, "bad.yaml is no valid YAML", "line 1, column 15")
        assert "unicode string" not in said.stderr


def test_capitals_are_no_other_method(work):
    (work / "merge.yaml").write_text(MERGE.replace("ties", "TIES"))
    refused("merge merge.yaml out", "Unknown method 'TIES'. Did you mean 'ties'?")


@pytest.mark.parametrize("at", ["expert", "expert/model.safetensors"])
@pytest.mark.parametrize("command", [_pack("x=expert"), "merge merge.yaml out", "inspect expert"])
def test_what_may_not_be_read(work, monkeypatch, at, command):
    """The system's refusal is pretended: root may read everything."""
    shutil.copytree(work / "law", work / "expert")
    (work / "merge.yaml").write_text(MERGE.replace("model: law", "model: expert"))

    def refusing(plain):
        def call(self: Path, *rest, **more):
            if str(self) == at:
                raise PermissionError(errno.EACCES, "Permission denied", at)
            return plain(self, *rest, **more)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", refusing(Path.iterdir))
        patched.setattr(Path, "open", refusing(Path.open))
        patched.setattr(os, "open", refusing(os.open))
        result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2, result.exception
    assert result.stderr.endswith(
        f"error: Cannot use '{at}': Permission denied. Check that it exists and that you may read "
        "it.\n"
    )
    assert not (work / "out").exists()
