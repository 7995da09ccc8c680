"""Short chat templates with the markers of each family, and how an answer is put together again."""

from collections.abc import Iterable

from rbee_worker.chat.output import ChatFormat, ContentDelta, Delta, ReasoningDelta, ToolCallDelta

_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

PLAIN = _TURNS + "<|im_start|>assistant\n"
HERMES = (
    "{% if tools %}Answer with <tool_call>\n{'name': <function-name>, 'arguments': <args-json-object>}\n</tool_call>"
    "{% endif %}" + PLAIN
)
QWEN3 = HERMES + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN3_THINKING = HERMES + "<think>\n"
QWEN3_CODER = "{% if tools %}<tool_call>\n<function=name>\n<parameter=x>\n{% endif %}" + PLAIN
GLM = "{% if tools %}<tool_call>{name}<arg_key>k</arg_key>{% endif %}" + PLAIN
SMOLLM3 = HERMES + "{% if enable_thinking %}{% else %}<think>\n\n</think>\n{% endif %}"
DEEPSEEK_R1 = "{{ content.split('</think>')[-1] }}<|Assistant|><think>\n"
GRANITE_3 = (
    "{% if tools %}Produce <|tool_call|> followed by a JSON list of tools.{% endif %}"
    "{% if thinking %}Think between <think></think>, answer between <response></response>.{% endif %}" + PLAIN
)
GRANITE_32 = "Write your thoughts after 'Here is my thought process:' and the rest after 'Here is my response:'" + PLAIN
LLAMA_31 = "{% if builtin_tools %}<|python_tag|>{% endif %}" + PLAIN
LLAMA_32 = (
    '{% if tools %}Respond in the format {"name": function name, "parameters": dictionary of argument name and its'
    " value}.{% endif %}" + PLAIN
)
LLAMA_4 = "{% if tools %}<|python_start|>[f(x=1)]<|python_end|>{% endif %}" + PLAIN
MISTRAL = "[AVAILABLE_TOOLS] {{ tools }}[/AVAILABLE_TOOLS][INST] {{ content }}[/INST][TOOL_CALLS] ["
MISTRAL_NAMED = MISTRAL + "[TOOL_CALLS]name[ARGS]{}"
MAGISTRAL = "[THINK]thoughts[/THINK]" + MISTRAL_NAMED
SEED = "<seed:think></seed:think>" + PLAIN


def parse(
    template: str | None, pieces: Iterable[str], *, prompt: str = "", tools: bool = True, names: Iterable[str] = ()
) -> list[Delta]:
    """All the deltas of an answer."""
    parser = ChatFormat.detect(template).parser(prompt, tools=tools, tool_names=list(names))
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    deltas += parser.finish()
    assert parser.tool_calls == len({d.index for d in deltas if isinstance(d, ToolCallDelta)})
    return deltas


def assembled(deltas: Iterable[Delta]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and the calls as name and arguments; checks the order of a call's deltas."""
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    ids: list[str] = []
    for delta in deltas:
        match delta:
            case ReasoningDelta(text):
                assert text
                reasoning += text
            case ContentDelta(text):
                assert text
                content += text
            case ToolCallDelta(index, str(call_id), str(name), ""):
                assert index == len(calls)
                ids.append(call_id)
                calls.append((name, ""))
            case ToolCallDelta(index, None, None, arguments):
                assert arguments
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + arguments)
            case _:
                raise AssertionError(delta)
    assert len(set(ids)) == len(ids)
    return reasoning, content, calls
