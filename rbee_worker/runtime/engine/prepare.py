"""From a request to a sequence: tokenize it and check it against the model, without touching a weight."""

import secrets
import uuid
from collections.abc import Collection

from rbee_worker.config import EngineConfig, GenerationRequest, Message
from rbee_worker.errors import ContextTooLong, FieldError, InvalidRequest, ModelNotLoaded
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.loading.load import LoadedModel


def prepare(model: LoadedModel | None, request: GenerationRequest, config: EngineConfig) -> Sequence:
    """Check a request and tokenize it. Touches no weights, so that any thread may do it.

    Raises:
        InvalidRequest, ContextTooLong, ModelNotLoaded: as :meth:`Engine.submit`.
        InferenceError: a file that weights are mapped from was changed.
    """
    if model is None:
        raise ModelNotLoaded("Model not loaded", hint="Load one first.", retry_after=1)
    model.check_files()
    longest = model.context_length - 1
    prompt = _prompt_ids(model, request)
    if len(prompt) > longest:
        problem = f"The prompt has {len(prompt)} tokens; the context holds {model.context_length} with the answer."
        raise ContextTooLong(problem, fields=[FieldError(_prompt_field(request), f"at most {longest} tokens", problem)])
    params = request.sampling
    _check_bias(params.logit_bias, model.config.vocab_size)
    return Sequence(
        request.job_id or str(uuid.uuid4()),
        prompt,
        request,
        params.seed if params.seed is not None else secrets.randbits(32),
        model.tokenizer,
        context_length=model.context_length,
        grammar=model.grammars.compile(params.grammar) if params.grammar is not None else None,
        speculate=config.speculate,
    )


def _check_bias(logit_bias: Collection[tuple[int, float]], vocab_size: int) -> None:
    unknown = next((token for token, _ in logit_bias if not 0 <= token < vocab_size), None)
    if unknown is not None:
        problem = f"logit_bias names token {unknown}; the model knows 0 to {vocab_size - 1}."
        raise InvalidRequest(problem, fields=[FieldError("logit_bias", f"token ids below {vocab_size}", problem)])


def _prompt_ids(model: LoadedModel, request: GenerationRequest) -> list[int]:
    tokenizer, messages = model.tokenizer, request.messages
    if sum(given is not None for given in (request.prompt, request.prompt_ids, messages)) != 1:
        raise InvalidRequest("Give either a prompt or messages.")
    if request.prompt == "":
        problem = "The prompt is empty."
        raise InvalidRequest(problem, fields=[FieldError("prompt", "at least 1 character", problem)])
    if request.prompt is not None and not request.raw and tokenizer.has_chat_template:
        messages = (Message(role="user", content=request.prompt),)
    if messages is not None:
        ids = tokenizer.encode_chat(messages, _prompt_field(request), **request.template_variables).ids
    elif request.prompt_ids is not None:
        ids = list(request.prompt_ids)
    else:
        text = request.prompt or ""
        tokenizer.require_room(text, "prompt")
        ids = tokenizer.encode(text)
    if not ids:
        problem = "The prompt has no tokens."
        raise InvalidRequest(problem, fields=[FieldError(_prompt_field(request), "at least 1 token", problem)])
    unknown = next((token for token in (min(ids), max(ids)) if not 0 <= token < model.config.vocab_size), None)
    if unknown is not None:
        problem = f"The prompt has token {unknown}; the model knows {model.config.vocab_size}."
        constraint = f"tokens below {model.config.vocab_size}"
        raise InvalidRequest(problem, fields=[FieldError(_prompt_field(request), constraint, problem)])
    return ids


def _prompt_field(request: GenerationRequest) -> str:
    return "prompt" if request.messages is None else "messages"
