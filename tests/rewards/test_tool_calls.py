"""Function calls in the formats of the model families, and turns that only look like calls."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.tool_calls import ToolCall, ToolCallError, read_tool_calls

SEARCH = ToolCall("search", {"query_list": ["red deer", "elk"]})
PING = ToolCall("ping", {})
JSON = '{"name": "search", "arguments": {"query_list": ["red deer", "elk"]}}'
LLAMA = '{"name": "search", "parameters": {"query_list": ["red deer", "elk"]}}'
XML = '<function=search>\n<parameter=query_list>\n["red deer", "elk"]\n</parameter>\n</function>'
GLM = "search\n<arg_key>query_list</arg_key>\n<arg_value>['red deer', 'elk']</arg_value>\n".replace("'", '"')


@pytest.mark.parametrize(
    ("turn", "calls"),
    [
        # Hermes, Qwen2.5, Qwen3
        (f"<tool_call>\n{JSON}\n</tool_call>", [SEARCH]),
        (f"I look it up.\n<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>", [SEARCH, SEARCH]),
        (f"<tool_call>{LLAMA}", [SEARCH]),  # ended by the EOS token
        (f'<tool_call>{{"type": "function", "function": {JSON}}}</tool_call>', [SEARCH]),
        ('<tool_call>{"name": "ping"}</tool_call>', [PING]),
        # Qwen3.5, Nemotron 3
        (f"<tool_call>\n{XML}\n</tool_call>", [SEARCH]),
        (f"{XML}\n</tool_call>", [SEARCH]),  # Qwen3-Coder forgets the opening tag
        (
            "<tool_call><function=f><parameter=a>\n[1] x\n</parameter><parameter=b>2</parameter></function>",
            [ToolCall("f", {"a": "[1] x", "b": "2"})],
        ),
        # GLM-4.5, and GLM-4.7 without line breaks
        (f"<think></think>\n<tool_call>{GLM}</tool_call>", [SEARCH]),
        (f"<tool_call>{GLM.replace(chr(10), '')}</tool_call>", [SEARCH]),
        ("<tool_call>ping</tool_call>", [PING]),
        # Llama 3
        (LLAMA, [SEARCH]),
        (f"<|python_tag|>{LLAMA}", [SEARCH]),
        (f"{LLAMA}; {LLAMA}", [SEARCH, SEARCH]),
        (f"[{LLAMA},\n{LLAMA}]", [SEARCH, SEARCH]),
        (f"[\n  {LLAMA}\n]", [SEARCH]),
        ('<function=search>{"query_list": ["red deer", "elk"]}</function>', [SEARCH]),
        # LFM2
        ("<|tool_call_start|>[search(query_list=['red deer', \"elk\"])]<|tool_call_end|>", [SEARCH]),
        (
            '<|tool_call_start|>[search(query_list=["red deer", "elk"]), ping()]<|tool_call_end|>',
            [SEARCH, PING],
        ),
        ("<|tool_call_start|>f(a=true, b={'c': 1})", [ToolCall("f", {"a": True, "b": {"c": 1}})]),
        # gpt-oss
        (
            "<|channel|>analysis<|message|>to=functions.ping <|message|>{}<|end|><|start|>assistant"
            "<|channel|>commentary to=functions.search <|constrain|>json<|message|>"
            '{"query_list": ["red deer", "elk"]}<|call|>',
            [SEARCH],
        ),
        (
            ' to=functions.search<|channel|>commentary json<|message|>{"query_list": ["red deer", "elk"]}',
            [SEARCH],
        ),
        ("<|channel|>final<|message|><answer>Paris</answer>", []),
        # Gemma 4
        (
            '<|tool_call>call:search{query_list:[<|"|>red deer<|"|>,<|"|>elk<|"|>]}<tool_call|>',
            [SEARCH],
        ),
        ('<|tool_call>call:f{a:<|"|>x: "y" {<|"|>,b:2}', [ToolCall("f", {"a": 'x: "y" {', "b": 2})]),
        # Mistral
        (f"[TOOL_CALLS] [{JSON}]", [SEARCH]),
        ('[TOOL_CALLS]search[CALL_ID]a1[ARGS]{"query_list": ["red deer", "elk"]}', [SEARCH]),
        # what models write instead: Python's quotes, line breaks in strings, the name under "function"
        ("<function=search><parameter=query_list>['red deer', 'elk']</parameter></function>", [SEARCH]),
        ('{"name": "f", "parameters": {"a": "x\ny"}}', [ToolCall("f", {"a": "x\ny"})]),
        ('{"type": "function", "function": "ping", "parameters": {}}', [PING]),
        # no calls
        ("<answer>Paris</answer>", []),
        ("", []),
        # in a thought: verl-project/verl#4757
        (f"<think>the form is <tool_call>{JSON}</tool_call></think><answer>Paris</answer>", []),
        (f"<think>I could <tool_call> it</think><tool_call>{JSON}</tool_call>", [SEARCH]),
        (f"I could <tool_call> it</think><tool_call>{JSON}</tool_call>", [SEARCH]),  # opened by the prompt
        (f"<tool_call>{JSON}</tool_call><think>or <tool_call>", [SEARCH]),
        (f"<tool_call>{JSON}</tool_call><think>b</think><tool_call>{JSON}</tool_call>", [SEARCH, SEARCH]),
        (f"<|channel>thought\nmaybe <|tool_call>call:f{{}}<tool_call|><channel|>{JSON}", [SEARCH]),  # Gemma 4
        (f"[THINK]<tool_call>{JSON}[/THINK]<answer>Paris</answer>", []),
        # a mark within an argument
        ('{"name": "f", "parameters": {"a": "<tool_call>"}}', [ToolCall("f", {"a": "<tool_call>"})]),
    ],
)
def test_read_tool_calls(turn, calls):
    assert read_tool_calls(turn) == calls


@pytest.mark.parametrize(
    "turn",
    [
        "<tool_call>{</tool_call>",
        "<tool_call></tool_call>",
        f"<tool_call>{JSON}</tool_call><tool_call>[1]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>search for red deer</tool_call>",
        "<function=search>red deer</function>",
        "<|tool_call_start|>[search('red deer')]<|tool_call_end|>",
        "<|tool_call_start|>[search(query_list=open('x'))]<|tool_call_end|>",
        "<|tool_call_start|>[search(**{})]<|tool_call_end|>",
        "<|channel|>commentary to=functions.search<|message|>red deer",
        "<|tool_call>call:search",
        "[TOOL_CALLS] search",
        f"{LLAMA} and more",
        "{" * 5000,
        "<tool_call>" + "<function=" * 300_000,  # takes hours in quadratic time
        "<function=f>" + "<parameter=" * 300_000,
        f"<|tool_call_start|>{'(' * 5000}",
    ],
)
def test_malformed_calls_raise(turn):
    with pytest.raises(ToolCallError):
        read_tool_calls(turn)


MARKS = (
    "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=p>", "</parameter>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|channel|>", "analysis", "<|message|>", "to=functions.f", "<|call|>", "<|start|>", "<|end|>",
    "<|tool_call>", "call:f{", '<|"|>', "<tool_call|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "{",
    "}", "[", "]", '"a"', ":", "f", '{"name": "f"}', "(", ")", ",", "=", "\n", " ", "\ud800",
)  # fmt: skip


@given(st.lists(st.sampled_from(MARKS), max_size=30).map("".join))
def test_any_turn_has_calls_or_raises_one_error(turn):
    try:
        calls = read_tool_calls(turn)
    except ToolCallError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(call.name, str) and isinstance(call.arguments, dict) for call in calls)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_json_calls_are_read_back_unchanged(queries):
    call = {"name": "search", "arguments": {"query_list": queries}}
    text = json.dumps(call)
    if not any(mark in text for mark in ("think>", "tool_call>", "<|channel|>")):
        assert read_tool_calls(f"<tool_call>\n{text}\n</tool_call>") == [
            ToolCall("search", call["arguments"])
        ]
