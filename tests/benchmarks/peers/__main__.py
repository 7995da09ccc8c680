"""One command: make the models, measure every engine that is there, and say how they compare.

    python -m tests.benchmarks.peers                              # the random 1.1B, and the default model
    python -m tests.benchmarks.peers random-1.1b --runs 5 --tokens 64
    python -m tests.benchmarks.peers SmolLM2-135M-Instruct --only rbee-worker llama.cpp

It measures rbee-worker, llama.cpp, transformers, mistral.rs and onnxruntime-genai on the same float16 weights, or the
very same GGUF file. The random model has TinyLlama's shape with a vocabulary of 49,152. llama.cpp's quantizer makes the
GGUF files. Each figure comes from a process of its own. The engines take turns (A B C, A B C, …), so that a machine
whose speed drifts does not favor one, and a ratio is taken within a round. The table has the median, the least and the
most of the rounds.

Engines that are no part of the project are looked for in an environment in ``--work``, and then in this one. What is
missing is left out, and the command that installs it is printed. Files are kept in ``--work``: 8 GB for the 1.1B.

It writes ``MODEL.md``, ``MODEL.json``, ``MODEL-batches.svg`` after each round, and at the end ``MODEL-quality.svg``
where the weights are trained: perplexity over a paragraph against the bytes of the weights in memory. Run it on an idle
machine: the 1.1B takes some twenty minutes a round.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rbee_worker.cli.bench.decode import BATCHES, FIGURES
from rbee_worker.cli.bench.machine import ReadRate, describe, torch_machine
from rbee_worker.cli.bench.result import Spread
from tests.benchmarks.peers import svg, ways
from tests.benchmarks.peers.models import DEFAULT, RANDOM, Model, prepare
from tests.benchmarks.peers.ways import WAYS, Way
from tests.benchmarks.quantization import PARAGRAPH

Rounds = dict[str, list[dict[str, float]]]
"""Name of a way -> its figures in each round."""
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[RANDOM, DEFAULT], help="or a folder with a Llama in float16")
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--tokens", type=int, default=64, help="to decode for a figure")
    parser.add_argument("--only", nargs="+", help="engines, or ways such as 'llama.cpp Q4_0'")
    parser.add_argument("--text", type=Path, help="what the perplexity is of; without it: a paragraph")
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="where models and results go")
    parser.add_argument(
        "--python", nargs="+", help="interpreters that have the other engines; without it: --work/env/bin/python"
    )
    options = parser.parse_args()
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    environment = work / "env"
    given = options.python or [str(environment / "bin/python")]
    if not Path(given[0]).exists():
        say(f"{given[0]} is not there: {sys.executable} -m venv {environment}")
    pythons = ways.find_pythons([python for python in (*given, sys.executable) if Path(python).exists()])
    for line in ways.missing(pythons, Path(given[0]).parent / "pip"):
        say(line)
    text = options.text.read_text("utf-8") if options.text else PARAGRAPH
    for name in options.models:
        model = prepare(name, work, pythons.get("llama.cpp"), pythons.get("onnxruntime-genai"))
        chosen = [way for way in WAYS if is_chosen(way, options.only) and way.engine in pythons and way.path(model)]
        measure(model, chosen, pythons, options, text)


def is_chosen(way: Way, only: Sequence[str] | None) -> bool:
    return not only or way.engine in only or way.name in only


def measure(
    model: Model, chosen: list[Way], pythons: Mapping[ways.Engine, str], options: argparse.Namespace, text: str
) -> None:
    """Measure a model in every way, and write what was found."""
    import torch

    rounds: Rounds = {way.name: [] for way in chosen}
    memory: list[float] = []
    found: dict[str, Any] = {
        "model": model.name,
        "machine": torch_machine(),
        "settings": {"runs": 0, "tokens": options.tokens},
        "failed": {},
        "quality": {},
    }
    for number in range(options.runs):
        rate = ReadRate(torch.device("cpu"))
        memory.append(rate.measure())
        del rate  # a peer may need the room
        for way in chosen:
            if way.name not in rounds:
                continue
            say(f"{model.name}, round {number + 1} of {options.runs}: {way.name}")
            try:
                rounds[way.name].append(ways.speed(way, model, pythons[way.engine], options.tokens))
            except RuntimeError as error:
                found["failed"][way.name] = str(error)
                del rounds[way.name]
                say(f"{way.name} failed: {error}")
        found["settings"]["runs"] = number + 1
        found["read_gb_s"] = Spread.of(memory).to_dict() | {"values": memory}
        found["ways"] = {name: figures(values) for name, values in rounds.items()}
        found["ratios"] = dict(ratios(chosen, rounds))
        write(options.work / model.name, found)  # a run that is ended early has told something
    if model.trained:
        found["quality"] = quality(model, [way for way in chosen if way.name in rounds], pythons, text)
    write(options.work / model.name, found)
    print("\n".join(markdown(found)), flush=True)


def write(base: Path, found: Mapping[str, Any]) -> None:
    """The files of a model."""
    base.with_name(f"{base.name}.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    base.with_name(f"{base.name}.md").write_text("\n".join(markdown(found)) + "\n", "utf-8")
    for name, plot in plots(found):
        base.with_name(f"{base.name}-{name}.svg").write_text(plot, "utf-8")


def figures(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Key -> the spread and the values of the rounds that have it."""
    keys = dict.fromkeys(key for values in rounds for key in values)
    told = {key: [values[key] for values in rounds if key in values] for key in keys}
    return {key: Spread.of(values).to_dict() | {"values": values} for key, values in told.items()}


def ratios(chosen: Sequence[Way], rounds: Rounds) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each way to llama.cpp with as wide weights, round by round."""
    for way in chosen:
        before = f"llama.cpp {way.against}"
        if not way.against or way.name not in rounds or before not in rounds:
            continue
        told = {}
        for key in FIGURES:
            pairs = zip(rounds[way.name], rounds[before], strict=False)
            if values := [now[key] / then[key] for now, then in pairs if key in now and key in then]:
                told[key] = Spread.of(values).to_dict() | {"values": values}
        yield f"{way.name} / {before}", told


def quality(
    model: Model, chosen: Sequence[Way], pythons: Mapping[ways.Engine, str], text: str
) -> dict[str, dict[str, float]]:
    """Perplexity of the same tokens in every way, and the bytes that its weights take."""
    ids = Tokenizer.from_file(str(model.folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    told = {}
    for way in chosen:
        say(f"{model.name}: perplexity of {way.name} over {len(ids)} tokens")
        try:
            if values := ways.perplexity(way, model, pythons[way.engine], ids):
                told[way.name] = values | {"tokens": len(ids)}
        except RuntimeError as error:
            say(f"{way.name} failed: {error}")
    return told


SHOWN = {key: figure for key, figure in FIGURES.items() if key.endswith("_tok_s")}


def markdown(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables."""
    settings, read = found["settings"], found["read_gb_s"]
    yield f"## {found['model']}\n"
    runs = settings["runs"]
    taken = f"{runs} round{'s' if runs != 1 else ''}, {settings['tokens']} tokens for a figure"
    yield f"{describe(found['machine'])}. {taken}: median (min-max), tokens a second."
    yield f"A plain pass reads {cell(read)} GB/s of memory.\n"
    yield from _table("engine", found["ways"])
    if found["ratios"]:
        yield "\nRatios, each within a round:\n"
        yield from _table("ratio", found["ratios"])
    if found["quality"]:
        tokens = next(iter(found["quality"].values()))["tokens"]
        yield f"\n| engine | perplexity over {tokens} tokens | weights in memory, MiB |\n|---|---|---|"
        for name, told in found["quality"].items():
            yield f"| {name} | {told['perplexity']:.3f} | {told['weights_bytes'] / MIB:,.0f} |"
    for name, why in found["failed"].items():
        yield f"\n{name} failed: {why}"


def _table(first: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    keys = [key for key in SHOWN if any(key in told for told in rows.values())]
    labels = [SHOWN[key].label.replace(", together", "") for key in keys]
    yield f"| {first} | {' | '.join(labels)} |\n|---|{'---|' * len(keys)}"
    for name, told in rows.items():
        yield f"| {name} | {' | '.join(cell(told.get(key)) for key in keys)} |"


def cell(told: Mapping[str, float] | None) -> str:
    """Median (least-most); a dash for nothing."""
    if told is None:
        return "-"
    return f"{told['median']:.3g} ({told['min']:.3g}-{told['max']:.3g})"


def plots(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name -> SVG."""
    series = {
        name: [(count, told[key]["median"]) for count in BATCHES if (key := f"together_{count}_tok_s") in told]
        for name, told in found["ways"].items()
    }
    series = {name: points for name, points in series.items() if points}
    if series:
        yield (
            "batches",
            svg.lines(f"{found['model']}: decoding together", "sequences at once", "tokens a second", series),
        )
    if found["quality"]:
        named = {name: (told["weights_bytes"] / MIB, told["perplexity"]) for name, told in found["quality"].items()}
        yield "quality", svg.points(f"{found['model']}: quality against size", "weights, MiB", "perplexity", named)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
