"""Commands that work: what they print, what they write, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from families import listing, saved, small_base, tuned
from personae import __version__
from personae.cli import app, console
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.recipe import PackSettings
from toys import load

BASE = small_base()
HEAD = {"head.weight": torch.ones(3, 16)}
ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two experts, and commands that run beside them."""
    saved(BASE, tmp_path / "base")
    saved(tuned(BASE, 1) | HEAD, tmp_path / "news")
    saved(tuned(BASE, 2), tmp_path / "law")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(line: str) -> str:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def facts(line: str) -> Any:
    return json.loads(done(line + " --json"))


PACK = "pack --base base --expert news=news --expert law=law --out p"


def test_merge_tells_whose_changes_do_not_show(work):
    """Both experts count their ids on; heads are private, skipped tensors asked for."""
    for name in ("news", "law"):
        moved = load(work / name) | {"position_ids": torch.arange(6).reshape(1, 6) + 1}
        save_file(moved, work / name / "model.safetensors")
    (work / "r.yaml").write_text(
        "merge_method: average\nbase_model: base\nskip: [scale]\n"
        "models: [{model: news}, {model: law}]\n"
    )
    told = facts("merge r.yaml out")
    why = "integers or statistics, which average does not merge"
    assert told["unchanged"] == {"position_ids": why}
    assert told["files"] == ["README.md", "config.json", "model.safetensors"]


def test_models_of_one_name_and_of_any_script_are_merged(work):
    """Weights 1 and 3 of two that are called alike, 4 of a third: eighths of each task vector."""
    states = [tuned(BASE, seed) for seed in (3, 4, 5)]
    names = ("a/checkpoint-500", "b/checkpoint-500", "наука и 法")
    for name, state in zip(names, states, strict=True):
        saved(state, work / name)
    models = ", ".join(
        f"{{model: {name}, parameters: {{weight: {weight}}}}}"
        for name, weight in zip(names, (1, 3, 4), strict=True)
    )
    (work / "r.yaml").write_text(f"merge_method: average\nbase_model: base\nmodels: [{models}]\n")
    facts("plan r.yaml")
    done("merge r.yaml out")
    weights = torch.stack([state["layer.weight"].double() for state in states])
    wanted = (weights * torch.tensor([1, 3, 4]).reshape(3, 1, 1)).sum(0) / 8
    assert torch.allclose(load(work / "out")["layer.weight"].double(), wanted, atol=1e-6)
    card = (work / "out/README.md").read_text("utf-8")
    assert all(f"| {name} |" in card for name in names)


def test_packing_is_the_function_of_that_name(work):
    done(f"{PACK} --rank-fraction 0.5 --skip scale --private layer.bias --workers 2")
    settings = PackSettings(
        parameters={"rank_fraction": 0.5}, skip=("scale",), private=("layer.bias",)
    )
    pack("base", {"news": "news", "law": "law"}, "q", settings=settings)
    assert listing(work / "p") == listing(work / "q")


def test_unpacking_is_the_function_of_that_name(work):
    done(PACK)
    assert "news rebuilt in" in done("unpack p --task news --out a")
    unpack("p", "news", "b")
    assert listing(work / "a") == listing(work / "b")
    assert facts("unpack p -t law -o c") == {"task": "law", "path": str(work / "c"), "left": {}}


def test_a_recipe_and_what_options_change_of_it(work):
    (work / "r.yaml").write_text(
        "base_model: base\nmodels: [{model: news}, {model: law}]\n"
        "parameters: {rank_fraction: 0.5, split: median}\nskip: [scale]\n"
    )
    made = facts("pack r.yaml --out p --rank-fraction 0.25")
    assert made["parameters"] == {"rank_fraction": 0.25, "split": "median"}
    assert list(made["tasks"]) == ["news", "law"]
    assert "scale" not in made["tasks"]["law"]["tensors"]
    assert list(facts("pack r.yaml --out q --expert only=law")["tasks"]) == ["only"]


def test_what_inspect_tells_of_a_pack(work):
    printed = facts(f"{PACK} --rank-fraction 0.5")
    described = facts("inspect p")
    assert printed.pop("unchanged") == {"news": {}, "law": {}}
    assert described == printed | {"path": "p"}
    assert described["kind"] == "pack"
    manifest = json.loads((work / "p/pack.json").read_text())
    for name, task in described["tasks"].items():
        record = manifest["tasks"][name]
        size = (work / f"p/tasks/{name}.safetensors").stat().st_size
        private = 4 * 3 * 16 if name == "news" else 0
        assert (task["bytes"], task["private_bytes"]) == (size, private)
        # 320 + 192 + 16 + 96 + 1 parameters are shared
        amr = task["amr_percent"]
        assert amr["on_disk_fp32"] == pytest.approx(100 * (size - private) / (4 * 625))
        assert amr["on_disk_native"] == amr["on_disk_fp32"]
        # embed (20, 16) at rank 8, layer (16, 12) at rank 6; then 16 + 96 entries, and a scalar
        paper = 8 * (3 * 36 + 32) + 6 * (3 * 28 + 32) + 3 * 112 + 32
        assert amr["amr_paper"] == pytest.approx(100 * paper / (32 * 625))
        assert 0 < task["relative_error"] < 1
        assert set(task["tensors"]) == set(BASE) - {"position_ids"}
        ranks = {key: tensor["rank"] for key, tensor in task["tensors"].items()}
        assert (ranks["embed.weight"], ranks["layer.weight"], ranks["layer.bias"]) == (8, 6, None)
        # 2 bits an element, each factor padded; σ; eight scales
        assert task["tensors"]["embed.weight"]["bytes"] == 8 * 36 // 4 + 4 * 8 + 4 * 8
        assert task["tensors"]["scale"]["relative_error"] == 0
        assert record["bytes"] == size
    text = done("inspect p --tensors")
    assert "embed.weight" in text and "20x16" in text and "scalar" in text


def test_what_inspect_tells_of_a_checkpoint(work):
    described = facts("inspect news")
    assert (described["kind"], described["source"]) == ("checkpoint", "news")
    assert described["parameters"] == 625 + 48
    assert described["bytes"] == 4 * (625 + 48) + 8 * 6
    assert described["tensors"]["layer.weight"] == {
        "shape": [16, 12],
        "dtype": "float32",
        "bytes": 768,
    }
    assert "673 parameters" in done("inspect news")


def test_what_inspect_tells_of_an_adapter(work):
    """It has no base here, so its own tensors are shown."""
    state = {f"base_model.model.layer.lora_{side}.weight": torch.ones(2, 16) for side in "AB"}
    saved(state, work / "adapter")
    (work / "adapter/model.safetensors").rename(work / "adapter/adapter_model.safetensors")
    (work / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    for path in ("adapter", "adapter/adapter_model.safetensors"):
        told = facts(f"inspect {path}")
        assert (told["parameters"], told["bytes"]) == (64, 256)
        assert list(told["tensors"]) == sorted(state)


def test_verify(work):
    done(PACK)
    found = facts("verify p --against news=news --base base")
    assert found["news"]["same_original"] is True
    assert found["news"]["measured_error"] == pytest.approx(found["news"]["recorded_error"])
    assert found["law"] == found["law"] | {"measured_error": None, "same_original": None}
    assert "every checksum holds" in done("verify p")


def test_the_device_that_is_here_anyway(work):
    done(f"{PACK} --device cpu")
    done(PACK.replace("--out p", "--out auto") + " --device auto")
    assert "news rebuilt" in done("unpack p -t news -o a --device auto")
    assert "news rebuilt" in done("unpack p -t news -o b --device cpu")
    verified = facts("verify auto --against news=news --base base --device auto")
    assert verified["news"]["same_original"] is True
    if not torch.cuda.is_available():
        assert listing(work / "auto") == listing(work / "p")
        assert listing(work / "a") == listing(work / "b")


def test_adding_and_removing_tasks(work):
    done("pack --base base --expert news=news --out p")
    done(PACK.replace("--out p", "--out both"))
    done("pack --out p --add --expert law=law --base base")
    assert listing(work / "p") == listing(work / "both")
    done("pack --out p --remove law")
    assert list(facts("inspect p")["tasks"]) == ["news"]


def test_a_sweep_makes_a_pack_for_each(work):
    found = facts(f"{PACK} -r 0.1 -r 0.5 --budget 60%")
    assert [pack["path"] for pack in found] == [
        str(work / "p" / name)
        for name in ("rank-fraction-0.1", "rank-fraction-0.5", "budget-60-percent")
    ]
    assert [pack["parameters"] for pack in found[:2]] == [{"rank_fraction": r} for r in (0.1, 0.5)]
    assert found[2]["tasks"]["law"]["amr_percent"]["on_disk_native"] <= 60


def test_plan_of_a_family(work):
    planned = facts("plan --base base --expert news=news -r 0.5 --workers 1")
    done("pack --base base --expert news=news -r 0.5 --out p")
    made = facts("inspect p")["tasks"]["news"]
    assert planned["tasks"]["news"]["coded"]["bytes"] == made["coded_bytes"]
    assert planned["tasks"]["news"]["private_bytes"] == made["private_bytes"]
    assert planned["peak_memory"] > 32 * (320 + 16 * 16)
    assert made["bytes"] <= planned["bytes_out"]
    assert "reads 5.3 KB" in " ".join(done("plan --base base --expert news=news").split())


def test_plan_of_shapes(work):
    path = DATA / "openclip_vit_b32_image_encoder.json"
    planned = facts(f"plan --shapes {path}")
    assert round(planned["amr_percent"]["amr_paper"], 3) == 3.680
    assert round(planned["amr_percent"]["amr_paper_lean"], 3) == 2.457
    text = done(f"plan --shapes {path}")
    assert "3.680" in text and "2.457" in text and "113,448,705 parameters" in text


def test_plan_of_an_architecture(work):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(work / "gpt2")
    planned = facts("plan --architecture gpt2/config.json")
    assert round(planned["amr_percent"]["amr_paper"], 3) == 3.489
    assert planned["parameters"] == 124_439_808


def test_methods():
    listed = {entry["name"]: entry for entry in facts("methods")}
    assert {"dts", "svd", "ties", "average"} <= set(listed)
    assert (listed["dts"]["kind"], listed["ties"]["kind"]) == ("codec", "merge")
    assert (listed["regmean"]["kind"], listed["dts"]["sees"]) == ("learned", None)
    assert listed["adamerging"]["sees"] == "unlabelled test inputs (transductive)"
    dts = facts("methods dts")
    parameters = {p["name"]: p for p in dts["parameters"]}
    assert parameters["rank_fraction"]["default"] == 0.3
    assert parameters["rank_fraction"]["type"] == "number > 0 <= 1"
    assert parameters["split"]["type"] == "rank | median"
    assert "rank_fraction" in done("methods dts")


def test_progress_is_plain_lines_away_from_a_terminal(work):
    result = CliRunner().invoke(app, PACK.split())
    assert result.stderr.splitlines() == [
        "news: kept whole as private (192 bytes): head.weight",
        "reading the family: 9 done",  # tensors: the base's, and those of experts alone
        "packing news: 5 done",
        "packing law: 5 done",
    ]


def test_version():
    assert done("--version") == f"personae {__version__}\n"


def test_every_command_has_help():
    assert "pack" in done("--help")
    for command in ("pack", "unpack", "plan", "check", "diff", "inspect", "verify", "methods"):
        assert "Usage" in done(f"{command} --help")


# True processes.


def _start(
    *arguments: str, prelude: str = "", stdout: Any = subprocess.PIPE
) -> "subprocess.Popen[str]":
    """Run the command in a process of its own, after some lines of Python."""
    # Tests may have been started by what ignores hang-ups.
    heeded = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = f"import sys; {heeded}; {prelude}\nfrom personae.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments]
        if prelude
        else [sys.executable, "-m", "personae", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_module_is_the_command(work):
    process = _start("inspect", "base", "--json")
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)["parameters"]) == (0, 625)
    process = _start("inspect", "gone")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: gone: no such file or directory.")
    assert "Traceback" not in err


SLOW = """
import time
from personae.methods.codecs.dts import DTS
encode = DTS.encode
def slow(self, *rest):
    time.sleep(0.3)
    return encode(self, *rest)
DTS.encode = slow
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_is_told_and_the_same_command_goes_on(work, stop):
    process = _start(*PACK.split(), "--workers", "1", prelude=SLOW)
    deadline = time.monotonic() + 60
    first = work / ".p.partial/tasks/news.safetensors"
    manifest = work / ".p.partial/pack.json"
    # A task is done once pack.json lists it; its file is there a moment earlier.
    while time.monotonic() < deadline:
        if manifest.exists() and "news" in json.loads(manifest.read_text())["tasks"]:
            break
        time.sleep(0.02)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + stop, err
    assert "Stopping; Ctrl-C again" in err and "Interrupted" in err
    assert "Run the same command again to continue." in err
    assert "Traceback" not in err
    assert not (work / "p").exists()
    kept = first.read_bytes()
    result = CliRunner().invoke(app, PACK.split())
    assert result.exit_code == 0
    assert "packing news" not in result.stderr  # it was done
    assert (work / "p/tasks/news.safetensors").read_bytes() == kept
    pack("base", {"news": "news", "law": "law"}, "whole")
    assert listing(work / "p") == listing(work / "whole")


def test_what_ends_a_command_leaves_no_folder_for_the_meantime(work):
    """Hollow models between the documents of a recipe lie in the system's folder for such."""
    recipe = "merge_method: average\nbase_model: base\nmodels: [{model: news}, {model: law}]\n"
    named = f"name: between\n{recipe}---\n{recipe.replace('law', 'between')}"
    (work / "two.yaml").write_text(named)
    (work / "meantime").mkdir()
    slow = """
import tempfile, time
from personae.commands import merge_documents
tempfile.tempdir = "meantime"
def slow(*_):
    open("made", "w").close()
    time.sleep(60)
merge_documents.plan_parts = slow
"""
    process = _start("plan", "two.yaml", prelude=slow)
    deadline = time.monotonic() + 60
    while not (work / "made").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert any((work / "meantime").iterdir())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert not any((work / "meantime").iterdir())


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"


def test_a_file_that_cannot_be_written_to_its_end_is_refused(work):
    """A limit on the size of files, as a full disk would be, met by the real writers."""
    saved(tuned(BASE, 5) | {"head": torch.ones(1000)}, work / "large")
    line = "pack --base base --expert x=large --out out"
    process = _start(*line.split(), prelude=LIMIT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "error: Cannot write" in err and "File too large" in err
    assert "Traceback" not in err
    assert not (work / "out").exists()
    done(line)


def test_output_that_nobody_takes(work):
    """A reader that leaves ends the program as SIGPIPE would; a full disk is an error."""
    for line in ("methods", "methods --json"):
        process = _start(*line.split())
        assert process.stdout and process.stderr
        process.stdout.close()
        err = process.stderr.read()
        assert (process.wait(timeout=60), err) == (141, "")
    if Path("/dev/full").exists():
        for line in ("methods", "methods --json"):
            with Path("/dev/full").open("w") as full:
                process = _start(*line.split(), stdout=full)
                _, err = process.communicate(timeout=60)
            assert process.returncode == 2
            assert err.startswith("error: ") and "No space left on device" in err
            assert "Traceback" not in err


BUSY = """
import threading, time, typer
import personae.cli as cli
def app():
    threading.Thread(target=time.sleep, args=(300,)).start()
    print("told before", end="")
    raise {raised}
cli.app = app
"""


@pytest.mark.parametrize("raised", ["SystemExit(130)", "KeyboardInterrupt"])
def test_an_interrupt_waits_for_no_worker(work, raised):
    """A second Ctrl-C ends the program too, in the middle of handling the first."""
    process = _start("methods", prelude=BUSY.format(raised=raised))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "told before", "")


def test_notes_are_not_folded_away_from_a_terminal(capsys):
    console.note("kept whole: " + "name " * 60)
    assert capsys.readouterr().err.count("\n") == 1


def test_plan_of_several_recipes(work):
    between = "{name: between, merge_method: METHOD, base_model: base, models: [{model: news}]}"
    last = "{merge_method: average, base_model: base, models: [{model: between}]}"
    Path("several.yaml").write_text(f"{last}\n---\n{between.replace('METHOD', 'average')}")
    planned = facts("plan several.yaml")
    assert planned["between"]["computed"]
    assert planned["between"]["bytes_out"] == 0
    assert planned["the output"]["bytes_out"] > 0
    text = " ".join(done("plan several.yaml").split())
    assert "is merged as it is read, and not written" in text
    Path("several.yaml").write_text(f"{last}\n---\n{between.replace('METHOD', 'tsv_m')}")
    text = " ".join(done("plan several.yaml").split())
    assert "beside the output, removed when nothing more is merged from it" in text
    assert "is merged as it is read" not in text
