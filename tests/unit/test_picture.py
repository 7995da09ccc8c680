"""The README's picture can be drawn anew, and is what the display shows today."""

import re

import pytest

from tests.picture import PICTURE, RECORDING, draw, record
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return draw(record(str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))))


def words(svg: str) -> str:
    return re.sub(r"<[^>]+>", " ", svg).replace("&#160;", " ")


def rows(svg: str) -> set[str]:
    """What the report in a picture names, but for what depends on the machine."""
    labels = {words(found).strip() for found in re.findall(r'x="24\.4"[^>]*>([^<]+)<', svg)}
    return {label for label in labels if label != "from" and not label.startswith("memory on ")}


def test_a_load_is_drawn(drawn: tuple[str, str]) -> None:
    text, svg = drawn
    assert re.search(r"^bytes .* MiB.*\ncpu .* 1/\d layers, memory .*\n. loading$", text)
    assert "ready: tiny in " in words(svg)


def test_the_kept_picture_has_the_rows_of_today(drawn: tuple[str, str]) -> None:
    kept = rows(PICTURE.read_text("utf-8"))
    assert len(kept) > 5
    assert rows(drawn[1]) == kept, "run python -m tests.picture models/SmolLM2-135M-Instruct"


def test_the_kept_picture_is_what_draw_makes_of_the_kept_recording() -> None:
    assert words(draw(RECORDING.read_bytes())[1]) == words(PICTURE.read_text("utf-8")), "run python -m tests.picture"


def test_the_kept_picture_needs_no_other_host() -> None:
    assert not re.search(r"url\((?!#)|href|@import", PICTURE.read_text("utf-8"))
