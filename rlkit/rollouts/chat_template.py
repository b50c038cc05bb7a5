"""Replies as the messages of a chat template, and the form in which the template has a model call functions.

A template can only render entire conversations. So a short conversation is rendered with placeholders, and
the text around the last one is cut out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment
from rlkit.errors import UserError, first_line
from rlkit.rollouts.tokenize import decode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# No template contains these strings, and none changes them.
QUESTION = "rlkit-question"
ANSWER = "rlkit-answer"
REPLY = "rlkit-reply"
SAMPLE_REPLY = '"Deer" eat:\n- grass\n- leaves\n\n{10 kg} a day, they say.' * 20  # with quotes and lines
CALL_ID = "rlkit0000"  # some templates require nine letters or digits


class TemplateError(ValueError):
    """The chat template cannot render a message."""


@dataclass(frozen=True)
class Frame:
    """What a chat template puts around a reply.

    Attributes:
        head: Rendered conversation up to the content of the reply.
        tail: Rendered text after the content, which ends with the generation prompt.
        before: Token ids between the EOS token of the assistant's turn and the content.
        after: Token ids of `tail`.
        eos_token_id: Id of the EOS token with which the template ends the assistant's turn, if it has one.
    """

    head: str
    tail: str
    before: list[int]
    after: list[int]
    eos_token_id: int | None

    def surrounds(self, rendered: str) -> bool:
        """Return whether a rendered conversation begins with `head` and ends with `tail`."""
        return rendered.startswith(self.head) and rendered.endswith(self.tail)


class ChatTemplate:
    """Renders replies with the chat template of a tokenizer.

    Args:
        tokenizer: Tokenizer of the model, with a chat template.
        eos_token_ids: Ids of the tokens that end a turn.
        arguments: Extra arguments of the chat template; `tools` are the functions that the model can call.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        arguments: Mapping[str, Any],
    ):
        self.tokenizer, self.eos_token_ids, self.arguments = tokenizer, eos_token_ids, arguments
        self._frames: dict[str, Frame] = {}

    def frame(self, role: str) -> Frame:
        """Return what the template puts around a reply of this role after a closed assistant turn.

        Raises:
            TemplateError: The template rejects or omits a message of this role.
        """
        if role not in self._frames:
            self._frames[role] = self._read_frame(role)
        return self._frames[role]

    def content(self, role: str, text: str) -> str:
        """Return the content of a reply as the template renders it: stripped, or as JSON, or unchanged.

        Raises:
            TemplateError: The template cannot render this content.
        """
        frame = self.frame(role)
        rendered = self.render(self._conversation(role, text), add_generation_prompt=True)
        if not frame.surrounds(rendered):
            # Llama 3.2 and gpt-oss write the date, and a run may last past midnight.
            frame = self._frames[role] = self._read_frame(role)
        if not frame.surrounds(rendered):
            raise TemplateError(f"the chat template renders {text[:60]!r} differently from other replies")
        return rendered[len(frame.head) : len(rendered) - len(frame.tail)]

    def write_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Return the assistant turn in which the template calls functions, with the EOS token after a call.

        Args:
            calls: Name and arguments of each call.

        Raises:
            TemplateError: The template omits calls or rejects the conversation.
        """
        question = {"role": "user", "content": QUESTION}
        text = self.render([question, _call_message(calls)])
        prompt = self.render([question], add_generation_prompt=True)
        # The turn is what follows the generation prompt. The prompt may end differently, for example with a
        # line break after <think> that a finished turn lacks; then it is what follows their common beginning.
        start = len(prompt)
        while not text.startswith(prompt[:start]):
            start -= 1
        if start < len(prompt):
            start = max(text.rfind(">", 0, start), text.rfind("\n", 0, start)) + 1
        turn = text[start:]
        if not all(name in turn for name, _ in calls):
            raise TemplateError("the chat template omits function calls")
        ids = self._tokenize(turn)
        # The rest is a line break, or the beginning of the next message.
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), len(ids))
        turn = str(self.tokenizer.decode(ids[:end]))
        # Another token may end a call than an answer: <|call|> of gpt-oss, <|observation|> of GLM.
        eos_token_id = self.frame("tool").eos_token_id
        return turn if eos_token_id is None else turn + str(self.tokenizer.decode([eos_token_id]))

    def _conversation(self, role: str, content: str) -> list[dict[str, Any]]:
        """Return a conversation that ends with a reply, which follows a call if its role is "tool"."""
        question = {"role": "user", "content": QUESTION}
        tools = self.arguments.get("tools")
        if role != "tool" or not tools:
            return [question, {"role": "assistant", "content": ANSWER}, {"role": role, "content": content}]
        # Templates may require the call that a tool message belongs to.
        function = tools[0]["function"]
        call = _call_message([(function["name"], example_arguments(function))])
        reply = {"role": role, "name": function["name"], "tool_call_id": CALL_ID, "content": content}
        return [question, call, reply]

    def _read_frame(self, role: str) -> Frame:
        conversation = self._conversation(role, REPLY)
        rendered = self.render(conversation, add_generation_prompt=True)
        head, found, tail = rendered.rpartition(REPLY)
        if not found or ANSWER not in head:
            raise TemplateError(f"the chat template omits messages of the role {role}, or those before them")
        middle = head[head.rindex(ANSWER) + len(ANSWER) :]
        before = self._tokenize(middle)
        after = self._tokenize(tail)
        eos_position = next((i for i, token in enumerate(before) if token in self.eos_token_ids), None)
        if eos_position is not None:
            # The model has sampled the EOS token already.
            return Frame(head, tail, before[eos_position + 1 :], after, before[eos_position])
        # How the assistant's turn ends if it is the last one of a conversation.
        last = self.render(conversation[:2])
        end = last[last.rindex(ANSWER) + len(ANSWER) :] if ANSWER in last else ""
        if middle.startswith(end):
            return Frame(head, tail, self._tokenize(middle[len(end) :]), after, None)
        # gpt-oss ends its last turn with <|return|>, and earlier ones with <|end|> instead.
        end_ids = self._tokenize(end)
        replaced = 1 if end_ids and end_ids[0] in self.eos_token_ids else 0
        return Frame(head, tail, before[replaced:], after, end_ids[0] if replaced else None)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return a conversation as text.

        Raises:
            TemplateError: The template rejects the conversation.
        """
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                list(messages),  # type: ignore[arg-type]
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.arguments,
            )
        except Exception as error:  # a template is a program: jinja raises whatever its code raises
            raise TemplateError(f"the chat template fails: {first_line(error)}") from error


def _call_message(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    tool_calls = [
        {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        for name, arguments in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def example_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that match the JSON schema of a function; strings are `ANSWER`."""
    properties = function.get("parameters", {}).get("properties", {})
    return {name: _example(schema) for name, schema in properties.items()}


def _example(schema: Mapping[str, Any]) -> Any:
    """Return a value that matches a JSON schema of a scalar, an array or an object."""
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "string")
    if kind == "array":
        return [_example(schema.get("items", {}))]
    if kind == "object":
        return example_arguments({"parameters": schema})
    return {"integer": 1, "number": 0.5, "boolean": True, "null": None}.get(kind, ANSWER)


def check_template(
    environment: Environment, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None
) -> None:
    """Check before training that the template can render replies, and that its calls are understood.

    Args:
        environment: Environment that replies.
        tokenizer: Tokenizer of the model.
        template: Chat template of the tokenizer, or None if it has none.

    Raises:
        UserError: The template ignores the environment's tools, writes calls that the environment does not
            read, or fails on a reply. Otherwise the first search would stop the run, or every call would be
            invalid without a reason.
    """
    name = f"the chat template of {tokenizer.name_or_path or 'the model'}"
    remedy = "use another model, or an environment without tools (search-v3: protocol tags)"
    if template is None:
        if environment.tools:
            raise UserError(f"{tokenizer.name_or_path or 'the model'} has no chat template: {remedy}")
        return
    if environment.max_turns == 1:
        return
    try:
        template.content("user", SAMPLE_REPLY)
        if environment.tools:
            _check_tools(environment, template, name, remedy)
    except TemplateError as error:
        remedy = remedy if environment.tools else "use another model"
        raise UserError(
            f"{name} does not support the messages of {environment.id} ({error}): {remedy}"
        ) from error


def _check_tools(environment: Environment, template: ChatTemplate, name: str, remedy: str) -> None:
    if not _shows_tools(template):
        raise UserError(f"{name} does not support tools: {remedy}")
    for tool in environment.tools:
        function = tool["function"]
        expected = (function["name"], example_arguments(function))
        ids = template.tokenizer(template.write_calls([expected]), add_special_tokens=False)["input_ids"]
        turn = decode_turn(template.tokenizer, ids, template.eos_token_ids)
        calls = environment.read_tool_calls(turn)
        if calls is not None and list(calls) != [expected]:
            raise UserError(
                f"{environment.id} cannot read the calls of {name}, {turn.strip()[:200]!r}: {remedy}"
            )
    template.content("tool", SAMPLE_REPLY)


def _shows_tools(template: ChatTemplate) -> bool:
    """Return whether the template tells the model about the functions that it can call."""
    question = [{"role": "user", "content": QUESTION}]
    without_tools = {key: value for key, value in template.arguments.items() if key != "tools"}
    bare = ChatTemplate(template.tokenizer, template.eos_token_ids, without_tools)
    return template.render(question) != bare.render(question)
