"""Draws ``docs/images/load.svg``, the end of a load with its report: ``python -m tests.picture [MODEL]``.

The load is a real one and the display is the command's own. stdout gets the middle of the same load, as text.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console

from rbee_worker.config import EngineConfig
from rbee_worker.display import LoadProgress, report_table
from rbee_worker.events import LoadingToVram, Ready
from rbee_worker.runtime.engine.engine import Engine

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "load.svg"
MODEL = "models/SmolLM2-135M-Instruct"
WIDTH = 88
# Rich's frame takes its font from another host. Who looks at a page should have to ask no other host.
FRAME = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace("Fira Code, ", "")


def draw(model: str) -> tuple[str, str]:
    """Load ``model``: its display in the middle as text, and at the end as SVG."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=WIDTH)  # nobody looks at it
    middle = Console(file=io.StringIO(), width=WIDTH)
    end = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=WIDTH, record=True)
    end.print(f"$ rbee-worker load {model}", highlight=False)
    with LoadProgress(terminal, auto_refresh=False) as progress:
        for event in Engine(EngineConfig(device="cpu")).load(model):
            progress(event)
            if isinstance(event, LoadingToVram) and event.layers_loaded == event.layers_total // 2:
                middle.print(progress.render())
            elif isinstance(event, Ready):
                end.print(progress.render(), report_table(event.report))
    title = "rbee-worker load"
    return middle.file.getvalue(), end.export_svg(title=title, code_format=FRAME, unique_id="load")


if __name__ == "__main__":
    text, svg = draw(*(sys.argv[1:] or [MODEL]))
    print(text, end="")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg, "utf-8")
