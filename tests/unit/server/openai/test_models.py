"""The model by its names, at every moment of its life."""

from types import SimpleNamespace

import pytest

from rbee_worker.errors import ModelNotFound, RbeeError
from rbee_worker.events import Ready, Resolving
from rbee_worker.server.openai.models import Models

SERVED = SimpleNamespace(name="m", context_length=9)


def worker(asked=None, model=None, **state):
    broadcast = SimpleNamespace(model=asked) if asked is not None else None
    loads = {"running": False, "error": None, "latest": None} | state
    return SimpleNamespace(engine=SimpleNamespace(model=model), loads=SimpleNamespace(broadcast=broadcast, **loads))


def test_none_was_asked_for():
    models = Models(worker())
    assert models.listed() == []
    models.check("whatever")  # submitting says why there is none
    with pytest.raises(ModelNotFound):
        models.find("whatever")


@pytest.mark.parametrize(("state", "status"), [({"running": True}, "loading"), ({"error": RbeeError("x")}, "failed")])
@pytest.mark.parametrize(
    ("asked", "name"), [("org/name@main", "org/name"), ("/nowhere/at/all.gguf", "/nowhere/at/all.gguf")]
)
def test_a_model_that_loads_or_did_not(state, status, asked, name):
    (model,) = Models(worker(asked, **state)).listed()
    assert (model["id"], model["status"], model["max_model_len"]) == (name, status, None)
    assert [entry["id"] for entry in Models(worker(asked, **state), ["a", "b", "a"]).listed()] == ["a", "b"]


def test_a_load_that_was_cancelled_is_no_model():
    assert Models(worker("org/name")).listed() == []


def test_names_that_requests_may_say():
    ready = Ready(seq=1, elapsed_seconds=1.0, report=None)
    models = Models(worker("models/m", SERVED, latest=ready), ["alias"])
    for name in ("m", "alias", "models/m", "", None):
        models.check(name)
    assert models.name == "alias"
    assert models.find("m")["max_model_len"] == 9
    for name in ("M", "models", "gpt-4o"):
        with pytest.raises(ModelNotFound, match="This worker serves alias"):
            models.check(name)


def test_what_another_load_is_called_is_no_name_of_the_model_that_serves():
    loading = Resolving(seq=0, elapsed_seconds=0.0, model="models/other")
    models = Models(worker("models/other", SERVED, latest=loading, running=True))
    with pytest.raises(ModelNotFound):
        models.check("models/other")
    assert [model["id"] for model in models.listed()] == ["m"]
