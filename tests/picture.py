"""Draws ``docs/images/load.svg``, the end of a load with its report, as ``rbee-worker draw`` draws it.

``python -m tests.picture`` draws the recorded load, ``docs/images/load.ndjson``, anew; with MODEL it records a load of
that model first. stdout gets the middle of the same load, as text.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console

from rbee_worker.cli.draw import read
from rbee_worker.config import EngineConfig
from rbee_worker.display import LoadProgress, report_table
from rbee_worker.events import LoadingToVram, Ready, Resolving, to_json
from rbee_worker.runtime.engine.engine import Engine

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "load.svg"
RECORDING = PICTURE.with_suffix(".ndjson")
WIDTH = 88
# Rich's frame takes its font from another host. Who looks at a page should have to ask no other host.
FRAME = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace("Fira Code, ", "")


def record(model: str) -> bytes:
    """What ``rbee-worker load MODEL --device cpu --json`` writes."""
    return "".join(f"{to_json(event)}\n" for event in Engine(EngineConfig(device="cpu")).load(model)).encode()


def draw(recording: bytes) -> tuple[str, str]:
    """A recorded load: its display in the middle as text, and at the end as SVG."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=WIDTH)  # nobody looks at it
    middle = Console(file=io.StringIO(), width=WIDTH)
    end = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=WIDTH, record=True)
    with LoadProgress(terminal, auto_refresh=False) as progress:
        for event in read(io.BytesIO(recording), "the recording"):
            progress(event)
            if isinstance(event, Resolving):
                end.print(f"$ rbee-worker load {event.model}", highlight=False)
            elif isinstance(event, LoadingToVram) and event.layers_loaded == event.layers_total // 2:
                middle.print(progress.render())
            elif isinstance(event, Ready):
                end.print(progress.render(), report_table(event.report))
    title = "rbee-worker load"
    return middle.file.getvalue(), end.export_svg(title=title, code_format=FRAME, unique_id="load")


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    if sys.argv[1:]:
        RECORDING.write_bytes(record(sys.argv[1]))
    text, svg = draw(RECORDING.read_bytes())
    print(text, end="")
    PICTURE.write_text(svg, "utf-8")
