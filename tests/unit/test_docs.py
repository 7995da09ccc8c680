"""The pages agree with the code: files, links, fields, defaults, ranges and routes."""

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args

import pytest

from rbee_worker import __version__, events
from rbee_worker.config import (
    MAX_JOB_ID_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOP_SEQUENCES,
    PARAMS,
    RANGES,
    ServerConfig,
)
from rbee_worker.events import InferenceEvent, LoadingEvent, LoadReport
from rbee_worker.runtime.inspection import Inspection
from rbee_worker.runtime.loading import reader
from rbee_worker.runtime.machine.storage import LOCAL_READERS
from rbee_worker.server.http.operation import routes
from rbee_worker.server.native.bodies import InferenceBody, LoadingBody
from rbee_worker.server.native.routes import AllowedModels, EndedLoad, Native
from rbee_worker.server.openai import OpenAI
from rbee_worker.server.openai.bodies import OpenAIBody
from rbee_worker.server.openai.chat.body import ChatBody
from rbee_worker.server.openai.completions.body import CompletionBody
from rbee_worker.server.openai.refusals import OF_RESPONSES
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openapi import Described
from tests import fields, files

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
BASES = (LoadingEvent, InferenceEvent)
EVENTS = [kind for kind in vars(events).values() if isinstance(kind, type) and kind.__base__ in BASES]
COMMON = {field.name for field in dataclasses.fields(LoadingEvent)}


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section(page: str, heading: str) -> str:
    """What stands between a heading and the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", without_code(page), re.MULTILINE | re.DOTALL)
    assert found, f"there is no heading {heading!r}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """Rows of the tables whose first cell is a name in backticks: name -> the other cells."""
    lines = re.findall(r"^\| `([^`]+)` \| (.*) *\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


def test_the_page_of_files_is_made_from_the_docstrings():
    assert read("docs/files.md") == files.page(), "run make docs"


def test_the_readme_names_every_folder():
    named = {name.rstrip("/") for name in rows(section(read("README.md"), "Folders"))}
    assert all((ROOT / name).is_dir() for name in named)
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert named >= {"rbee_worker", "docs", "completions", *tests}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text("utf-8")))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        if anchor:
            assert anchor in map(slug, headings(target.read_text("utf-8"))), link


def test_the_table_of_inference_fields_is_the_schema():
    table = rows(section(read("docs/http-api.md"), "`POST /v1/inference`"))
    cells = {name: cells for name, cells in table.items() if name in InferenceBody.model_fields}
    assert cells.keys() == InferenceBody.model_fields.keys()
    assert cells["stop"][2] == f"up to {MAX_STOP_SEQUENCES}, each 1 to {MAX_STOP_LENGTH} characters"
    assert f"1 to {MAX_JOB_ID_LENGTH} " in cells["job_id"][2]


def test_the_rows_of_sampling_parameters_are_made_from_them():
    page = read("docs/http-api.md")
    written = [row for name in PARAMS if (row := fields.row(name)) is not None]
    assert len(written) > len(RANGES)
    assert set(written) <= set(page.splitlines())
    assert fields.insert_rows(page) == page, "run make docs"
    page = read("docs/openai.md")
    assert fields.insert_names(page) == page, "run make docs"


def test_a_row_that_lacks_or_is_out_of_date_is_written_where_it_belongs():
    page = read("docs/http-api.md")
    for name in ("max_tokens", "min_p", "skip_special_tokens", "prompt_logprobs"):
        row = fields.row(name)
        assert fields.insert_rows(page.replace(row, f"| `{name}` | text | 7 | |")) == page
        if name != "max_tokens":
            assert fields.insert_rows(page.replace(f"{row}\n", "")) == page


def test_the_table_of_loading_fields_is_the_schema():
    table = rows(section(read("docs/http-api.md"), "`POST /v1/loading`"))
    assert table.keys() == LoadingBody.model_fields.keys()


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_every_field_of_an_event_is_described(event: type[LoadingEvent] | type[InferenceEvent]):
    kind, name = ("stage", event.stage) if issubclass(event, LoadingEvent) else ("event", event.event)
    described = rows(section(read("docs/events.md"), f"{kind} `{name}`"))
    common = COMMON if issubclass(event, LoadingEvent) else set()
    assert described.keys() == {field.name for field in dataclasses.fields(event)} - common


def test_stop_reasons_are_described():
    assert rows(section(read("docs/events.md"), "Stop reasons")).keys() == set(get_args(events.StopReason))


def test_the_common_fields_and_the_report_are_described():
    page = read("docs/events.md")
    assert rows(section(page, "Fields of every loading event")).keys() == COMMON
    report = {field.name for field in dataclasses.fields(LoadReport)}
    assert rows(section(page, "The load report")).keys() == report


def test_the_table_of_ended_loads_is_the_shape():
    assert (
        rows(section(read("docs/http-api.md"), "`GET /v1/loading/history`")).keys() == EndedLoad.__annotations__.keys()
    )


OPENAI_TABLES = {
    "Fields of both": OpenAIBody.model_fields.keys(),
    "Fields of chat completions": ChatBody.model_fields.keys() - OpenAIBody.model_fields.keys(),
    "Fields of completions": CompletionBody.model_fields.keys() - OpenAIBody.model_fields.keys(),
    "Fields of responses": {str(field.validation_alias or name) for name, field in ResponsesBody.model_fields.items()}
    - OF_RESPONSES.keys(),
}


@pytest.mark.parametrize("heading", OPENAI_TABLES)
def test_the_tables_of_openais_fields_are_the_schemas(heading: str):
    first_cells = re.findall(r"^\| (`.*?) \|", section(read("docs/openai.md"), heading), re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)} == OPENAI_TABLES[heading]


def test_every_route_of_openai_has_its_section():
    served = routes(OpenAI(None, ServerConfig(), None))
    registered = {f"`{method} {route.path_format}`" for route in served for method in route.methods - {"HEAD"}}
    assert {heading for heading in headings(read("docs/openai.md")) if re.match(r"`[A-Z]+ /", heading)} == registered


def test_every_route_has_its_section():
    native = routes(Native(None, ServerConfig(), AllowedModels(None), None))
    served = Described(native, keyed=False).routes
    registered = {f"`{method} {route.path_format}`" for route in served for method in route.methods - {"HEAD"}}
    described = {heading for heading in headings(read("docs/http-api.md")) if re.match(r"`[A-Z]+ /", heading)}
    assert described == registered


def test_the_example_of_a_load_report_has_its_fields() -> None:
    example = re.search(r'^\{"model":.*\}$', section_with_code(read("docs/events.md"), "The load report"), re.MULTILINE)
    assert example
    assert list(json.loads(example[0])) == [field.name for field in dataclasses.fields(LoadReport)]


def test_the_example_of_inspect_has_its_rows() -> None:
    page = section_with_code(read("docs/quickstart.md"), "Look before loading")
    shown = re.findall(r"^[┃│] ([a-z ]+?) +[┃│] [^┃│]+[┃│]$", page, re.MULTILINE)
    words = {"name": "model", "file_bytes": "file size", "dequantized_bytes": "dequantized size"}
    elsewhere = {"memory", "mapped_bytes"}  # a table of its own, and what only --mmap shows
    named = [field.name for field in dataclasses.fields(Inspection) if field.name not in elsewhere]
    assert shown == [words.get(name, name.replace("_", " ")) for name in named]


def section_with_code(page: str, heading: str) -> str:
    return re.split(r"^#+ ", page.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_parts_in_flight_are_those_of_the_reader() -> None:
    words = {3: "three", 4: "four"}
    page = read("docs/architecture.md")
    assert f"At most {words[LOCAL_READERS + reader._AHEAD]} parts are in flight" in page
    assert f"and {words[1 + reader._AHEAD]} parts are.)" in page


def test_the_middlewares_of_a_request_exist() -> None:
    named = re.search(r"^1\. uvicorn reads it\.(.*?)\n2\.", read("docs/architecture.md"), re.MULTILINE | re.DOTALL)
    assert named
    app = read("rbee_worker/server/app.py")
    assert all(f"Middleware({name}" in app for name in re.findall(r"`(\w+)`", named[1]))


def test_examples_show_the_version() -> None:
    shown = {
        found
        for page in PAGES
        for found in re.findall(r'(?:"version":"|^rbee-worker )([\d.]+)', page.read_text("utf-8"), re.MULTILINE)
    }
    assert shown == {__version__}


def test_every_stop_of_the_two_lives_is_where_the_page_says() -> None:
    """A reader follows `file`: `name` without search."""
    page = read("docs/architecture.md")
    stops = re.findall(r"`((?:\w+/)*\w+\.py)`:\s+`([\w.]+)`", page)
    assert len(stops) > 25
    for file, name in stops:
        text = read(f"rbee_worker/{file}")
        for part in name.split("."):
            assert re.search(rf"^\s*(?:async )?(?:def|class) {part}\b", text, re.MULTILINE), (file, name)


def test_the_files_to_read_first_exist() -> None:
    table = rows(section(read("docs/architecture.md"), "Reading order"))
    assert len(table) == 10
    assert all((ROOT / "rbee_worker/runtime" / name).is_file() for name in table)
