"""Function calls in the text of an assistant turn, in the formats of the common model families.

Each family's chat template tells the model in which form to write a call. `read_tool_calls` reads all of
these forms, so the code that executes calls need not know the model. Calls in a thought are not calls
(`rlkit.rewards.thinking`). `_FORMATS` lists the forms, except bare JSON, which has no mark of its own.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlkit.rewards.thinking import outside_thoughts


@dataclass(frozen=True)
class ToolCall:
    """A call of a function, by name, with the arguments as JSON values."""

    name: str
    arguments: Mapping[str, Any]


class ToolCallError(ValueError):
    """A turn contains a call that cannot be parsed."""


def read_tool_calls(turn: str) -> list[ToolCall]:
    """Return the calls in a turn, in their order; [] if it has none.

    Raises:
        ToolCallError: A call is malformed, so it is not known what the model wanted to call.
    """
    text = outside_thoughts(turn).strip().removeprefix("<|python_tag|>").lstrip()
    marks = [mark for mark in _FORMATS if mark in text]
    try:
        if _BARE_JSON.match(text):
            return list(_bare_json(text))
        # The first mark decides: another one may be part of an argument.
        return list(_FORMATS[min(marks, key=text.find)](text)) if marks else []
    # `ast` reports deeply nested brackets by a MemoryError.
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ToolCallError(f"not a valid call: {text[:80]!r}") from error


# The closing tag of a block is optional, because the model may end its turn with the EOS token instead. With
# `|$`, the time is linear: the first block without a closing tag extends to the end. A name has no
# "<", because opening tags without ">" would take quadratic time.
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^<>\n]++)>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\n]++)>(.*?)(?:</parameter>|$)", re.DOTALL)
_BARE_JSON = re.compile(r"(?:\[\s*+)?\{")
_GLM_NAME = re.compile(r"\s*([^\s<]+)")
_GLM_ARGUMENT = re.compile(r"<arg_key>([^<]*+)</arg_key>\s*+<arg_value>(.*?)(?:</arg_value>|$)", re.DOTALL)
_LFM = re.compile(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|$)", re.DOTALL)
_GPT_OSS_NAME = re.compile(r"\bto=functions\.([^\s<]+)")
_GEMMA_KEY = re.compile(r"\b(\w++)\s*+:")


def _tag_calls(text: str) -> Iterator[ToolCall]:
    """Parse `<tool_call>` blocks, whose content is one of three forms.

    JSON (Hermes, Qwen2.5, Qwen3), `<function=name><parameter=key>value` (Qwen3.5 and later, Nemotron 3), or
    a name followed by `<arg_key>` and `<arg_value>` (GLM-4.5 and later).
    """
    for block in _TOOL_CALL.findall(text):
        if block.lstrip().startswith(("{", "[")):
            yield from _json_calls(_load(block))
        elif "<function=" in block:
            yield from _function_calls(block)
        else:
            name = _GLM_NAME.match(block)
            arguments = _GLM_ARGUMENT.findall(block)
            if name is None or _GLM_ARGUMENT.sub("", block).strip() != name[1]:
                raise ValueError(block)
            yield ToolCall(name[1], {key.strip(): _value(value) for key, value in arguments})


def _function_calls(text: str) -> Iterator[ToolCall]:
    """Parse `<function=name>` blocks with `<parameter=key>` elements, or with JSON as in Llama 3.1."""
    functions = _FUNCTION.findall(text)
    if not functions:
        raise ValueError(text)
    for name, block in functions:
        if block.lstrip().startswith("{"):
            yield ToolCall(name.strip(), _mapping(_load(block)))
        elif _PARAMETER.sub("", block).strip():
            raise ValueError(block)
        else:
            arguments = {key.strip(): _value(value) for key, value in _PARAMETER.findall(block)}
            yield ToolCall(name.strip(), arguments)


def _python_calls(text: str) -> Iterator[ToolCall]:
    """Parse a list of calls in Python's syntax, `[search(query_list=["a"])]` (LFM2)."""
    for block in _LFM.findall(text):
        expression = ast.parse(block.strip(), mode="eval").body
        calls = expression.elts if isinstance(expression, ast.List | ast.Tuple) else [expression]
        for call in calls:
            if not isinstance(call, ast.Call) or call.args or any(item.arg is None for item in call.keywords):
                raise ValueError(block)
            yield ToolCall(
                ast.unparse(call.func), {str(item.arg): _literal(item.value) for item in call.keywords}
            )


def _literal(node: ast.expr) -> Any:
    """Return the value of a Python or JSON literal."""
    constants = {"true": True, "false": False, "null": None}
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    return ast.literal_eval(node)


def _gpt_oss_calls(text: str) -> Iterator[ToolCall]:
    """Parse messages whose header addresses a function, `to=functions.search` (gpt-oss)."""
    for message in text.split("<|start|>"):
        header, _, body = message.partition("<|message|>")
        if name := _GPT_OSS_NAME.search(header):
            body = body.partition("<|call|>")[0].partition("<|end|>")[0]
            yield ToolCall(name[1], _mapping(_load(body)))


def _gemma_calls(text: str) -> Iterator[ToolCall]:
    """Parse `call:search{query_list:[<|"|>a<|"|>]}`, JSON with bare keys and its own quotes (Gemma 4)."""
    for block in text.split("<|tool_call>")[1:]:
        name, brace, arguments = block.partition("<tool_call|>")[0].partition("{")
        # Every second part is the content of a string, in which a colon does not follow a key.
        parts = f"{brace}{arguments}".split('<|"|>')
        parts[::2] = [_GEMMA_KEY.sub(r'"\1":', part) for part in parts[::2]]
        parts[1::2] = [json.dumps(part) for part in parts[1::2]]
        yield ToolCall(name.strip().removeprefix("call:"), _mapping(json.loads("".join(parts))))


def _mistral_calls(text: str) -> Iterator[ToolCall]:
    """Parse a JSON list of calls, or names that are each followed by `[ARGS]` and JSON (Mistral)."""
    for block in text.split("[TOOL_CALLS]")[1:]:
        name, separator, arguments = block.partition("[ARGS]")
        if separator:
            yield ToolCall(name.partition("[CALL_ID]")[0].strip(), _mapping(_load(arguments)))
        else:
            yield from _json_calls(_load(block))


def _bare_json(text: str) -> Iterator[ToolCall]:
    """Parse a turn that is nothing but JSON: one call, or several in a row or in a list (Llama 3)."""
    decoder = json.JSONDecoder(strict=False)
    while text:
        value, end = decoder.raw_decode(text)
        yield from _json_calls(value)
        text = text[end:].lstrip(" \t\r\n;,")


def _json_calls(value: object) -> Iterator[ToolCall]:
    """Return the calls of a JSON object, `{"name": …, "arguments": …}`, or of a list of them."""
    for item in value if isinstance(value, list) else [value]:
        call = _mapping(item)
        call = call["function"] if isinstance(call.get("function"), Mapping) else call
        name = call.get("name", call.get("function"))
        if not isinstance(name, str):
            raise ValueError(f"a call without a name: {call}")
        arguments = call.get("arguments", call.get("parameters", {}))
        yield ToolCall(name, _mapping(_load(arguments) if isinstance(arguments, str) else arguments))


def _load(text: str) -> Any:
    """Parse JSON, also with line breaks in strings, which models do not always escape."""
    return json.loads(text, strict=False)


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"not a JSON object: {value!r:.80}")
    return value


def _value(text: str) -> Any:
    """Return the value of an argument that is written without quotes: a list, an object or a string."""
    text = text.strip()
    return read_literal(text) if text.startswith(("[", "{")) else text


def read_literal(text: str) -> Any:
    """Return the value of a JSON or Python literal, or the string itself if it is neither."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return text


_FORMATS: Mapping[str, Callable[[str], Iterator[ToolCall]]] = {
    "<tool_call>": _tag_calls,
    "<function=": _function_calls,
    "<|tool_call_start|>": _python_calls,
    "<|message|>": _gpt_oss_calls,
    "<|tool_call>": _gemma_calls,
    "[TOOL_CALLS]": _mistral_calls,
}
