"""README and docs are true: examples run, on toys in the place of hub models; tables are new."""

import re
import runpy
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from personae.cli import app
from personae.methods import CODECS, LEARNED_METHODS, MERGE_METHODS
from personae.recipe._merge_file import MergeFile
from personae.recipe._pack_reading import _File as PackFile
from toy_encoders import toy_sentence_encoder

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path: path.read_text("utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
}
RUN = [
    ROOT / "README.md",
    *(DOCS / f"{n}.md" for n in ("recipes", "packing", "command-line", "python", "serving")),
]
"""Pages whose examples are run, each page on what those before it have made."""
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
NOT_OURS = {"make", "pip"}
ENCODER = ["--encoder", "toys/encoder"]
"""Put to commands that read texts: the default one is a package that tests do without."""
STAND_INS = {"openai-community/gpt2": "toys/base", "tanganke/gpt2_": "toys/", "@main": ""}
"""What a hub id in the examples becomes."""
TOY_BUDGETS = {"1%": "30%", "2%": "40%", "budget-2-percent": "budget-40-percent"}
"""The header of a task file, some 700 bytes, is a good part of a toy."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a GPT-2 family as on the hub.

    As there, the base has neither prefix nor head, but causal masks stored as weights.
    """
    from transformers import GPT2Config, GPT2ForSequenceClassification

    root = tmp_path_factory.mktemp("documents")
    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    config.pad_token_id = 0  # which batches of several rows need
    for seed, name in enumerate(("base", "cola", "sst2", "mnli")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = GPT2ForSequenceClassification(config)
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(root / "toys" / name)
    toy_sentence_encoder(root / "toys" / "encoder")
    weights = root / "toys" / "base" / "model.safetensors"
    backbone = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(weights).items()
        if name != "score.weight"
    }
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 12, 12).tril() for layer in range(2)}
    save_file(backbone | masks, weights, metadata={"format": "pt"})
    return root


def on_toys(text: str) -> str:
    for known, stand_in in STAND_INS.items():
        text = text.replace(known, stand_in)
    for asked, possible in TOY_BUDGETS.items():
        text = re.sub(rf"(?<!\w){re.escape(asked)}", possible, text)
    return text


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shipped(recipe: str) -> str:
    """A recipe of the repository with toys in the place of its models."""
    path = Path(recipe.replace("/", "-"))
    path.write_text(on_toys((ROOT / recipe).read_text("utf-8")))
    return str(path)


def test_every_example_runs_in_its_order(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    ran: set[str] = set()
    for language, block in (found for page in RUN for found in FENCED.findall(PAGES[page])):
        if language == "python":
            exec(compile(on_toys(block), "an example", "exec"), {})
            ran.add("python")
        if language == "yaml":
            Path(block.splitlines()[0].removeprefix("# ")).write_text(on_toys(block))
        for words in commands(on_toys(block)) if language == "sh" else []:
            if words[0] in NOT_OURS:
                continue
            assert words[0] == "personae"
            words = [shipped(word) if word.startswith("recipes/") else word for word in words]
            words += ENCODER if "--like" in words else []
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
            ran.add(words[1])
    assert ran == {
        *("python", "merge", "pack", "verify", "unpack", "plan", "check", "inspect"),
        *("compose", "export"),
    }
    merged = load_file(workplace / "merged" / "gpt2" / "model.safetensors")
    assert merged.keys() == load_file(workplace / "toys" / "base" / "model.safetensors").keys()
    config = (workplace / "models" / "cola" / "config.json").read_text("utf-8")
    assert "GPT2ForSequenceClassification" in config
    rebuilt = load_file(workplace / "models" / "cola" / "model.safetensors")
    assert rebuilt.keys() == load_file(workplace / "toys" / "cola" / "model.safetensors").keys()


def test_commands_and_options_they_name_exist() -> None:
    tree = typer.main.get_command(app)
    known = tree.commands  # pyright: ignore[reportAttributeAccessIssue]
    options = {text for one in known.values() for p in one.params for text in p.opts} | {"--help"}
    commands_: set[str] = set()
    for page, text in PAGES.items():
        if page.name in ("results.md", "performance.md", "CONTRIBUTING.md"):
            continue  # these name options of scripts
        inline = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
        named = {
            word.rstrip("…") for code in inline for word in re.findall(r"--[a-z][a-z-]*", code)
        }
        assert named - options == set(), page.name
        commands_ |= {code.split()[1] for code in inline if code.startswith("personae ")}
    assert commands_ == known.keys()


def test_generated_parts_are_what_the_program_says() -> None:
    if version("typer").startswith("0.19."):
        pytest.skip("this version of typer keeps no help of arguments to be read")
    written = SCRIPT["files"]()
    stale = [path.name for path, text in written.items() if text != path.read_text("utf-8")]
    assert stale == [], "run make docs"


def test_every_method_has_a_section_with_its_parameters() -> None:
    sections = re.split(r"^### `(\w+)`$", PAGES[DOCS / "methods.md"], flags=re.MULTILINE)[1:]
    told = {
        name: set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
        for name, text in zip(sections[::2], sections[1::2], strict=True)
    }
    known = {**MERGE_METHODS, **CODECS, **LEARNED_METHODS}
    assert told == {name: {*method.fields()} for name, method in known.items()}


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("## Merge recipes", {*MergeFile.model_fields, "slices", "modules"}),
        ("## Pack recipes", {*PackFile.model_fields}),
    ],
)
def test_every_key_of_a_recipe_is_told(heading: str, keys: set[str]) -> None:
    section = PAGES[DOCS / "recipes.md"].split(heading)[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    named = {word for row in rows for word in re.findall(r"`(\w+)`", row)}
    assert named - {"source"} == keys


def anchors(text: str) -> set[str]:
    """What links to a page's sections end with, by GitHub's rule."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", PAGES[page])
    for target, section in links:
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not section or section in anchors(PAGES[path]), f"{target}#{section}"


def test_every_page_is_linked_from_the_readme() -> None:
    links = re.findall(r"\]\((docs/[^)#]+)", PAGES[ROOT / "README.md"])
    assert {*links} == {f"docs/{page.name}" for page in DOCS.glob("*.md")}


def test_folders_of_the_house_exist() -> None:
    section = PAGES[ROOT / "CONTRIBUTING.md"].split("## The house")[1].split("\n## ")[0]
    folders = re.findall(r"`(?!src/)(\w[\w/]*)/`", section)
    assert "methods/merge" in folders
    assert [name for name in folders if not (ROOT / "src" / "personae" / name).is_dir()] == []
