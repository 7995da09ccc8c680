"""Fields of OpenAI and other servers that would change the answer, but that this worker does not support.

If such a field were ignored, the answer would not be what the client asked for. So it is refused by name, unless its
value changes nothing. Fields that are neither here nor in a schema are ignored.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from rbee_worker.errors import FieldError

EVERYWHERE: Final[Mapping[str, tuple[Any, ...]]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora": ([],),
    "min_tokens": (0,),
    "mirostat": (0,),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "samplers": ([],),
    "stop_token_ids": ([],),
    "top_n_sigma": (-1, 0),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
"""Name -> the values that change nothing. Null changes nothing either. The tables below have the same form."""

OF_COMPLETIONS: Final[Mapping[str, tuple[Any, ...]]] = {
    "add_special_tokens": (True,),
    "prompt_embeds": (),
    "suffix": ("",),
}

OF_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "modalities": (["text"], []),
    "parse_tool_calls": (True,),
    "reasoning_format": ("auto", "deepseek"),
    "verbosity": ("medium",),
    "web_search_options": (),
}

OF_RESPONSES: Final[Mapping[str, tuple[Any, ...]]] = {
    "background": (False,),
    "chat_template": (),
    "context_management": ([],),
    "conversation": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "image": (),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": (),
    "modalities": (["text"], []),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "prompt_progress": (False,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_progress": (False,),
    "structured_outputs": ({},),
    "truncation": ("disabled",),
}

_INSTEAD: Final[Mapping[str, str]] = {
    "background": "Responses are made while the client waits, or streams.",
    "conversation": "This worker keeps none: send the earlier items in input.",
    "logprobs": "Send include and top_logprobs instead.",
    "max_completion_tokens": "Send max_output_tokens instead.",
    "max_tokens": "Send max_output_tokens instead.",
    "messages": "Send input instead.",
    "previous_response_id": "This worker keeps no responses: send the earlier items in input.",
    "prompt": "This worker keeps no prompts: send input, and instructions.",
    "reasoning_effort": "Send reasoning.effort instead.",
    "response_format": "Send text.format instead.",
    "truncation": "An input that does not fit the context is refused.",
    "functions": "Send tools instead.",
    "function_call": "Send tool_choice instead.",
    "chat_template": "The model's own template is used.",
    "modalities": "This worker reads and writes text only.",
}


def refused(body: Mapping[str, Any], *tables: Mapping[str, tuple[Any, ...]]) -> Iterable[FieldError]:
    """An error for each field of ``body`` that one of ``tables`` refuses."""
    for table in tables:
        for name, neutral in table.items():
            value = body.get(name)
            if value is not None and value not in neutral:
                sentences = [f"{name} is not supported.", *([_INSTEAD[name]] if name in _INSTEAD else ())]
                yield FieldError(name, "not supported", " ".join(sentences))
    best_of = body.get("best_of")
    if best_of is not None and best_of != (body.get("n") or 1):
        yield FieldError("best_of", "equal to n", "best_of must be equal to n: answers are not ranked.")
