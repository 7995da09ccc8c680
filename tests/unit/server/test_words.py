"""What clients are told of an error: settings as a request has them, else as the worker's options."""

import json

from rbee_worker.errors import ModelNotFound, ModelNotLoaded, OutOfMemory, Remedy
from rbee_worker.server.http.envelope import envelope, inference_failed
from rbee_worker.server.native.bodies import LoadingBody
from rbee_worker.server.native.frames import SharedFrames, Watcher
from rbee_worker.server.words import _IN_REQUESTS, in_words

TOO_BIG = OutOfMemory("m: too big.", remedies=[Remedy({"quantize": "int8", "max_context": 512}, 7)])
SAID = 'm: too big. What would fit: "quantize": "int8" --max-context 512 (7 MiB).'


def test_remedies_are_fields_of_requests_or_options_of_the_worker():
    assert in_words(TOO_BIG) == SAID
    assert envelope(TOO_BIG)["error"]["message"] == SAID
    for frame in (Watcher(None, SharedFrames()).failed(TOO_BIG), inference_failed(TOO_BIG)):
        assert json.loads(frame.removeprefix(b"data: "))["message"] == SAID
    body = {"device": "cpu", "dtype": "auto", "quantize": "int8"}
    assert body.keys() == _IN_REQUESTS
    assert LoadingBody.parse(body)


def test_a_model_that_is_not_loaded_names_the_route():
    assert in_words(ModelNotLoaded("Model not loaded")) == (
        "Model not loaded. Load one with POST /v1/loading, or start the worker with --model."
    )
    assert in_words(ModelNotFound("x: no such file.", hint="Check it.")) == "x: no such file. Check it."
    assert in_words(ModelNotFound("x: no such file.")) == "x: no such file."
