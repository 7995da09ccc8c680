"""What request bodies must look like, field by field."""

import pytest

from rbee_worker.config import PARAMS, GrammarSpec, SamplingParams
from rbee_worker.errors import InvalidRequest
from rbee_worker.server.http.envelope import parse_object
from rbee_worker.server.native.bodies import DetokenizeBody, InferenceBody, LoadingBody, TokenizeBody

SECRET = "SECRET-PROMPT-TEXT"  # noqa: S105 - what must not be echoed

BAD_VALUES = {
    "prompt": ["", 1, ["a"], {}, "\ud800"],
    "messages": [[], "text", {}, [1]],
    "job_id": ["", "x" * 129, "a\nb", "\x00", 5],
    "max_tokens": [0, -1, 1.0, 1.5, "1", True, [1]],
    "temperature": [-0.1, 2.1, "1", True, float("inf"), 10**400],
    "top_p": [-0.1, 1.1, "1", False],
    "top_k": [-1, 1.5, "1", True],
    "min_p": [-0.1, 1.1, "1", True],
    "repetition_penalty": [0, -1, 2.1, "1", True],
    "presence_penalty": [-2.1, 2.1, "0", True],
    "frequency_penalty": [-2.1, 2.1, "0", True],
    "seed": [2**64, -(2**63) - 1, 1.5, "7", True],
    "stop": [3, [""], "", ["x"] * 17, [1], {"a": "b"}, True],
    "ignore_eos": [1, 0, "true", []],
    "skip_special_tokens": [1, "false"],
    "logprobs": [-1, 21, 1.5, "1", True],
    "prompt_logprobs": [-1, 21, True],
    "logit_bias": [
        [],
        {"x": 1},
        {"-1": 1},
        {"1": 101},
        {"1": "2"},
        {"1": True},
        dict.fromkeys(map(str, range(1025)), 1),
    ],
    "json_schema": ["{}", [], True],
    "regex": ["", 3],
    "grammar": ["", {}],
    "prompt_progress": [1, "true"],
    "timeout": [0, -1, 86_401, "5", True],
}
GOOD_VALUES = {
    "prompt": ["x"],
    "job_id": ["x", "é" * 128],
    "max_tokens": [1, 10**9, None],
    "temperature": [0, 0.0, 2, None],
    "top_p": [0, 1],
    "top_k": [0, 50],
    "min_p": [0, 1.0],
    "repetition_penalty": [0.01, 2],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2.0, 2.0],
    "seed": [0, -(2**63), 2**64 - 1],
    "stop": ["x", [], ["x"] * 16],
    "ignore_eos": [True, False],
    "skip_special_tokens": [False],
    "logprobs": [0, 20],
    "prompt_logprobs": [0, 20],
}


def test_every_sampling_parameter_is_a_field_and_tried_here():
    assert PARAMS.keys() <= InferenceBody.model_fields.keys()
    assert PARAMS.keys() <= BAD_VALUES.keys()
    assert PARAMS.keys() - {"logit_bias", "grammar"} <= GOOD_VALUES.keys()  # those two have other forms in JSON


def fields_of(raised):
    return {error.field.split("[")[0] for error in raised.value.fields}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_VALUES.items() for v in values])
def test_each_field_out_of_range_or_of_the_wrong_type_is_named(name, value):
    body = {"prompt": "p", name: value} if name != "messages" else {name: value}
    with pytest.raises(InvalidRequest) as raised:
        InferenceBody.parse(body)
    assert fields_of(raised) == {name}
    assert all(error.constraint and error.message for error in raised.value.fields)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD_VALUES.items() for v in values])
def test_each_field_at_the_edge_of_its_range_is_taken(name, value):
    request = InferenceBody.parse({"prompt": "p", name: value}).to_request()
    if name not in {"prompt", "job_id", "stop"} and value is not None:
        assert getattr(request.sampling, name) == value


def test_what_the_text_must_match_and_how_long_it_may_take():
    schema = {"type": "object"}
    for fields, grammar in (
        ({"json_schema": schema}, GrammarSpec("json_schema", '{"type": "object"}')),
        ({"regex": "a+"}, GrammarSpec("regex", "a+")),
        ({"grammar": "start: /a/"}, GrammarSpec("lark", "start: /a/")),
    ):
        assert InferenceBody.parse({"prompt": "p"} | fields).to_request().sampling.grammar == grammar
    with pytest.raises(InvalidRequest) as raised:
        InferenceBody.parse({"prompt": "p", "regex": "a", "json_schema": schema}).to_request()
    assert [error.field for error in raised.value.fields] == ["regex"]
    others = {"logit_bias": {"5": -1}, "timeout": 2.5, "prompt_progress": True}
    request = InferenceBody.parse({"prompt": "p"} | others).to_request()
    assert (request.timeout_seconds, request.prompt_progress) == (2.5, True)
    assert request.sampling.logit_bias == ((5, -1.0),)


def test_every_bad_field_is_listed_at_once_and_no_value_is_echoed():
    body = {name: values[0] for name, values in BAD_VALUES.items()}
    body["stop"] = [SECRET, ""]
    body["messages"] = [{"role": "user", "content": [SECRET]}]
    body["prompt"] = [SECRET]
    with pytest.raises(InvalidRequest) as raised:
        InferenceBody.parse(body)
    assert fields_of(raised) == set(BAD_VALUES)
    assert SECRET not in f"{raised.value} {raised.value.fields} {raised.value.__cause__}"


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"content": "x"}], [{"role": "", "content": "x"}], ["x"]])
def test_a_bad_message_is_named_by_its_position(messages):
    with pytest.raises(InvalidRequest) as raised:
        InferenceBody.parse({"messages": [{"role": "user", "content": "ok"}, *messages]})
    assert raised.value.fields[0].field.startswith("messages[1]")


def test_prompt_or_messages_but_not_both():
    with pytest.raises(InvalidRequest) as neither:
        InferenceBody.parse({"prompt": None})
    assert neither.value.fields[0].field == "prompt"
    with pytest.raises(InvalidRequest) as both:
        InferenceBody.parse({"prompt": "p", "messages": [{"role": "user", "content": "x"}]})
    assert both.value.fields[0].field == "messages"


def test_defaults_come_from_the_sampling_parameters_and_unknown_keys_are_ignored():
    request = InferenceBody.parse({"prompt": "p", "novel": SECRET}).to_request()
    assert request.sampling == SamplingParams()
    assert (request.prompt, request.messages, request.raw) == ("p", None, True)
    chat = InferenceBody.parse({"messages": [{"role": "user", "content": "c", "name": "n"}], "stop": "s"}).to_request()
    assert chat.messages == ({"role": "user", "content": "c"},)
    assert (chat.raw, chat.sampling.stop) == (False, ("s",))


@pytest.mark.parametrize(
    ("body_class", "body"),
    [
        (LoadingBody, {"model": 3}),
        (LoadingBody, {"model": "m", "device": "tpu"}),
        (LoadingBody, {"model": "m", "dtype": "float8"}),
        (LoadingBody, {"model": "m", "quantize": "int3"}),
        (TokenizeBody, {}),
        (TokenizeBody, {"text": 1}),
        (TokenizeBody, {"text": "x", "add_special": 1}),
        (TokenizeBody, {"content": 1}),
        (DetokenizeBody, {"tokens": "x"}),
        (DetokenizeBody, {"tokens": [1, True]}),
        (DetokenizeBody, {"tokens": [-1]}),
        (DetokenizeBody, {"tokens": [2**32]}),
    ],
)
def test_other_bodies_are_as_strict(body_class, body):
    with pytest.raises(InvalidRequest) as raised:
        body_class.parse(body)
    assert len(raised.value.fields) == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not valid JSON"),
        (b'{"a":1,}', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a":"\xc3"}', "not UTF-8"),
        (b"[1]", "not an object"),
        (b'"text"', "not an object"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1,"a":2}', "repeats a key"),
        (b'{"a":' + b"[" * 100_000, "too deeply"),
        (b'{"a":' * 100_000, "too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "too long"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:12]),
)
def test_a_body_that_is_no_json_object(body, says):
    with pytest.raises(InvalidRequest, match=says):
        parse_object(body)


@pytest.mark.parametrize("name", ["text", "content", "prompt"])
def test_other_servers_names_of_a_text(name):
    body = TokenizeBody.parse({name: "x", "add_special_tokens": True})
    assert (body.text, body.add_special) == ("x", True)


def test_a_byte_order_mark_is_skipped():
    assert parse_object(b"\xef\xbb\xbf" + b'{"a":1}') == {"a": 1}
