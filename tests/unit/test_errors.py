"""The tree of errors is the one its docstring draws."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

from rbee_worker import errors
from rbee_worker.config import EngineConfig
from rbee_worker.errors import ModelNotFound, ModelNotLoaded, OutOfMemory, RbeeError, Remedy

LINE = re.compile(
    r"^(?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+) *(?:(?P<exit>\d+) +(?P<status>\d{3}) +(?P<code>[A-Z_]+))?", re.MULTILINE
)


def drawn() -> dict[str, tuple[str | None, tuple[int, int, str] | None]]:
    """Class -> its parent and, where the docstring gives them, exit code, status and code."""
    tree = (errors.__doc__ or "").split("::\n", 1)[1].split("\n\nThe columns", 1)[0]
    path: list[str] = []
    out = {}
    for line in tree.strip("\n").splitlines():
        match = LINE.match(line)
        assert match is not None, line
        depth = (len(match["indent"]) - 4) // 4  # four columns of margin, four a level
        del path[depth:]
        columns = (int(match["exit"]), int(match["status"]), match["code"]) if match["exit"] else None
        out[match["name"]] = (path[-1] if path else None, columns)
        path.append(match["name"])
    return out


def classes() -> dict[str, type[RbeeError]]:
    return {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RbeeError)}


def test_every_class_is_drawn():
    assert drawn().keys() == classes().keys()


def test_parents_and_columns_agree():
    for name, (parent, columns) in drawn().items():
        kind = classes()[name]
        assert parent == (None if kind is RbeeError else kind.__base__.__name__), name
        if columns is not None:
            assert columns == (kind.exit_code, kind.http_status, kind.code), name


def test_only_abstract_classes_go_without_columns():
    assert {name for name, (_, columns) in drawn().items() if columns is None} == {"ModelError", "RequestRefused"}


def test_every_class_says_what_it_is():
    assert all(kind.__doc__ for kind in classes().values())


def test_hint_follows_the_message():
    error = ModelNotFound("x.gguf: no such file.", hint="Check the path.")
    assert (error.message, error.hint, str(error)) == (
        "x.gguf: no such file.",
        "Check the path.",
        "x.gguf: no such file. Check the path.",
    )
    assert str(ModelNotFound("x.gguf: no such file.")) == "x.gguf: no such file."
    assert str(ModelNotLoaded("Model not loaded", hint="Load one.")) == "Model not loaded. Load one."


def test_remedies_follow_the_hint_and_are_put_into_words_by_who_speaks():
    fits = Remedy({"device": "cpu", "quantize": "int8"}, 1234), Remedy({"max_context": 512}, 9)
    assert str(OutOfMemory("Too big.", remedies=fits)) == (
        "Too big. What would fit: device=cpu quantize=int8 (1,234 MiB); max_context=512 (9 MiB)."
    )
    choice = OutOfMemory("Too big.", hint="Or not.", remedies=[Remedy({"dtype": "auto"}), Remedy({"device": "cpu"})])
    assert choice.advice(lambda name, value: f"{name}: {value!r}") == "Or not. Use dtype: 'auto' or device: 'cpu'."
    assert OutOfMemory("Too big.").advice() == ""


def test_every_setting_is_one_of_the_engine():
    assert set(get_args(errors.Setting)) <= {field.name for field in fields(EngineConfig)}


def test_every_message_ends_in_a_full_stop():
    """As far as the source tells it; the exception is a text that clients know as it is."""
    root = Path(errors.__file__).parent
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RbeeError)}
    found = [
        (f"{path.relative_to(root)}:{node.lineno}", node.args[0])
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds
        if node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr)
    ]
    assert len(found) > 200
    assert [(where, ast.unparse(text)) for where, text in found if not ends(text)] == []


def ends(message):
    last = message.values[-1] if isinstance(message, ast.JoinedStr) else message
    if isinstance(last, ast.Constant):
        return last.value == "Model not loaded" or last.value.endswith((".", "?"))
    text = ast.unparse(last)
    return bool(re.search(r"\b(sentence\(.*\)|message|problem|reason|text|self\._hint\(\))\W*$", text))
