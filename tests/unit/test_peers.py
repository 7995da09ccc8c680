"""The benchmark against other engines: files of the same weights, ratios, tables and plots."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from rbee_worker.cli.bench.decode import FIGURES
from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.events import PromptLogprobs
from tests.benchmarks.peers import __main__ as peers
from tests.benchmarks.peers import models, svg, ways
from tests.benchmarks.peers.ways import WAYS
from tests.engines import loaded
from tests.tiny import write_tiny_model
from tests.unit.cli.harness import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def write_folder(path: Path, **changes: Any) -> Path:
    """A tiny model whose tokenizer joins two bytes: a GGUF file holds a list of such pairs, which may not be empty."""
    write_tiny_model(path, **changes)
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"] |= {"vocab": tokenizer["model"]["vocab"] | {"he": 256}, "merges": [["h", "e"]]}
    file.write_text(json.dumps(tokenizer))
    return path


def likelihoods(path: Path) -> list[float]:
    engine = loaded(path)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    events = list(engine.generate(GenerationRequest(prompt_ids=tuple(range(40, 90)), sampling=sampling)))
    told = next(event for event in events if isinstance(event, PromptLogprobs))
    return [token.logprob for token in told.logprobs if token.logprob is not None]


@pytest.mark.parametrize("tied", [False, True])
def test_the_gguf_of_a_folder_has_the_same_weights(tmp_path: Path, *, tied: bool) -> None:
    folder = write_folder(tmp_path / "tiny", tie_word_embeddings=tied, eos_token_id=3)
    models.write_gguf(folder, tmp_path / "tiny.gguf")
    ours = likelihoods(folder)
    assert len(ours) == 49
    # One is float32, the other float16.
    assert likelihoods(tmp_path / "tiny.gguf") == pytest.approx(ours, abs=0.02)


def test_what_is_no_plain_llama_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="only plain Llamas"):
        models.write_gguf(folder, tmp_path / "tiny.gguf")


def test_a_peer_that_is_not_there_is_left_out_by_its_name(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    pythons = ways.find_pythons([str(bare)])
    assert pythons == {"rbee-worker": sys.executable}
    told = "\n".join(ways.missing(pythons, tmp_path / "pip"))
    assert f"llama.cpp is left out: {tmp_path}/pip install llama-cpp-python==0.3.36" in told
    assert [line.split()[0] for line in told.splitlines()] == list(ways.MODULES)
    assert ways.find_pythons([str(bare), sys.executable])["transformers"] == sys.executable


def test_a_ratio_is_taken_within_a_round() -> None:
    ours, theirs = (next(way for way in WAYS if way.name == name) for name in ("rbee-worker int8", "llama.cpp Q8_0"))
    key = "decode_128_tok_s"
    # The machine was half as fast in the second round, for both.
    rounds = {ours.name: [{key: 30.0}, {key: 15.0}], theirs.name: [{key: 20.0}, {key: 10.0}]}
    (told,) = peers.ratios([ours, theirs], rounds)
    assert told == (
        "rbee-worker int8 / llama.cpp Q8_0",
        {key: {"median": 1.5, "min": 1.5, "max": 1.5, "values": [1.5] * 2}},
    )
    assert list(peers.ratios([ours], {ours.name: rounds[ours.name]})) == []


def test_every_way_is_compared_with_one_that_exists() -> None:
    names = [way.name for way in WAYS]
    assert len(set(names)) == len(names)
    for way in WAYS:
        assert (f"llama.cpp {way.against}" in names) == bool(way.against)


FOUND = {
    "model": "tiny",
    "machine": {"cpu": "Z80", "cores": 1, "system": "CP/M", "python": "3.11"},
    "settings": {"runs": 2, "tokens": 8},
    "read_gb_s": {"median": 20.0, "min": 19.0, "max": 21.0},
    "ways": {
        "rbee-worker int8": peers.figures([{"together_1_tok_s": 10.0, "together_8_tok_s": 40.0}] * 2),
        "a<b": peers.figures([{"together_1_tok_s": 7.0}, {"together_1_tok_s": 9.0, "load_s": 1.0}]),
    },
    "ratios": {},
    "quality": {
        "rbee-worker int8": {"perplexity": 11.0, "weights_bytes": 2**20, "tokens": 9},
        "a<b": {"perplexity": 10.5, "weights_bytes": 2**21, "tokens": 9},
    },
    "failed": {"llama.cpp Q4_0": "no room"},
}


def test_the_table_has_every_way_and_what_failed() -> None:
    page = "\n".join(peers.markdown(FOUND))
    assert "| rbee-worker int8 | 10 (10-10) | 40 (40-40) |" in page
    assert "| a<b | 8 (7-9) | - |" in page
    assert "| a<b | 10.500 | 2 |" in page
    assert "llama.cpp Q4_0 failed: no room" in page
    assert "reads 20 (19-21) GB/s" in page


def test_the_plots_are_svg_that_names_every_way() -> None:
    plots = dict(peers.plots(FOUND))
    assert plots.keys() == {"batches", "quality"}
    for plot in plots.values():
        texts = [element.text or "" for element in ET.fromstring(plot).iter(f"{SVG}text")]  # noqa: S314 - ours
        assert any("a<b" in text for text in texts)
    lines = ET.fromstring(plots["batches"]).findall(f"{SVG}polyline")  # noqa: S314
    assert [len((line.get("points") or "").split()) for line in lines] == [2, 1]
    (first, second), _ = ([tuple(map(float, p.split(","))) for p in line.get("points", "").split()] for line in lines)
    assert first[0] < second[0]
    assert first[1] > second[1]  # more is higher


@pytest.mark.parametrize(("value", "top"), [(1, 1), (1.1, 1.5), (22, 25), (26, 30), (99, 100), (0.31, 0.4)])
def test_an_axis_ends_at_a_round_number(value: float, top: float) -> None:
    assert svg.nice(value) == pytest.approx(top)


@pytest.mark.slow
def test_the_whole_on_a_tiny_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", eos_token_id=3)
    options = ("--work", str(tmp_path / "work"), "--runs", "1", "--tokens", "2", "--text", str(tmp_path / "text"))
    (tmp_path / "text").write_text("some text of a few words")
    chosen = ("--only", "rbee-worker F16.gguf", "transformers float32")
    command = [sys.executable, "-m", "tests.benchmarks.peers", str(folder), *options, *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "work" / "tiny.json").read_text())
    assert found["ways"].keys() == found["quality"].keys() == set(chosen[1:])
    assert found["failed"] == {}
    for told in found["ways"].values():
        assert all(told[key]["median"] > 0 for key in FIGURES if key.startswith("together"))
    qualities = [told["perplexity"] for told in found["quality"].values()]
    assert qualities == pytest.approx([qualities[-1]] * 2, rel=0.1)
    assert (tmp_path / "work" / "tiny-batches.svg").is_file()
    assert (tmp_path / "work" / "tiny.md").read_text().strip() == done.stdout.strip()
