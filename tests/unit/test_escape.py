"""Text from outside in a message: short, on its line, without control characters."""

from rbee_worker.escape import one_line, quoted


def test_quoted_is_short_and_printable() -> None:
    assert quoted("a\x1b[31m") == r"'a\x1b[31m'"
    assert len(quoted("x" * 1000)) == 120
    for value in ("x" * 118, "x" * 119, [1] * 40, [1] * 41, [""] * 300, (b"y" * 130,)):
        assert quoted(value) == (repr(value) if len(repr(value)) <= 120 else repr(value)[:117] + "...")


def test_text_from_outside_stays_on_one_line_and_cannot_draw() -> None:
    assert one_line("two\r\nlines\x1b[31m \u202eé") == "two lines\\x1b[31m \\u202eé"
    assert len(one_line("x" * 1000)) == 301
