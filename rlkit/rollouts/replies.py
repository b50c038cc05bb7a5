"""The environment's replies: `Responder` computes them in a thread, `ReplyTokens` tokenizes them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.environment import Reply, Turn
from rlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rendered through the chat template to find where it puts a message. No template contains this string, and
# none changes it.
PLACEHOLDER = "rlkit-reply"


def escape_stop_strings(text: str, stop: Sequence[str]) -> str:
    """Escape stop strings in a reply, and the tags that they close.

    Retrieved text must not end the assistant's turn or fake an answer. If `</answer>` is a stop string,
    `<answer>` and `</answer>` become `&lt;answer>` and `&lt;/answer>`, in any case and with spaces inside the
    tag. A stop string that is not a tag loses its last character.
    """
    for string in stop:
        tag = re.fullmatch(r"</?\s*(\w+)\s*>", string.strip())
        if tag:
            text = re.sub(rf"<(?=\s*+/?+\s*+{tag[1]}\b)", "&lt;", text, flags=re.IGNORECASE)
        elif string:
            text = _without_last_characters(text, string)
    return text


def _without_last_characters(text: str, string: str) -> str:
    """Remove the last character of each occurrence of a string, and of those that this creates."""
    if string not in text:
        return text
    characters: list[str] = []
    ending = list(string)
    for character in text:
        characters.append(character)
        if characters[-len(ending) :] == ending:
            characters.pop()
    return "".join(characters)


def require_tools(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]) -> None:
    """Raise UserError if the tokenizer's chat template ignores the tools in `template`."""
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": "?"}]
        without_tools = {key: value for key, value in template.items() if key != "tools"}
        rendered = tokenizer.apply_chat_template(message, tokenize=False, **template)
        if rendered != tokenizer.apply_chat_template(message, tokenize=False, **without_tools):
            return
    raise UserError(
        f"the chat template of {tokenizer.name_or_path or 'the model'} does not support tools: use a model "
        "whose template does, or an environment without tools (search-v2: protocol tags)"
    )


class ReplyTokens:
    """Tokenizes the environment's replies so that they can be appended to a rollout.

    After a stop string the assistant's turn is still open, and the reply is appended to it unchanged. After
    an EOS token the turn is closed, and the reply becomes the next message of the chat template. In both
    cases special tokens in the reply are tokenized as plain text, and stop strings are escaped.

    Args:
        tokenizer: Tokenizer of the model.
        stop: Stop strings of the environment.
        eos_token_ids: Ids of the tokens that end a turn.
        template: Extra arguments of the chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        eos_token_ids: Sequence[int],
        template: Mapping[str, Any],
    ):
        self.tokenizer = tokenizer
        self.stop = stop
        self.eos_token_ids = eos_token_ids
        self.template = template
        self._eos_token_id = eos_token_ids[0]
        self._frames: dict[str, tuple[list[int], list[int]]] = {}

    def __call__(
        self, text: str, *, closed: bool, max_tokens: int | None = None, role: str = "user"
    ) -> tuple[str, list[int]]:
        """Return the reply as the model sees it, and the token ids to append.

        Args:
            text: Text of the reply.
            closed: Whether the assistant's turn ended with an EOS token.
            max_tokens: Maximum number of tokens of the reply, not counting those of the chat template.
            role: Role of the reply's message.
        """
        text = escape_stop_strings(text, self.stop)
        # Splitting turns a special token in retrieved text, e.g. <|im_end|>, into ordinary tokens.
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if max_tokens is not None and len(ids) > max_tokens:
            ids = ids[:max_tokens]
            # The rollout's record must show what the model sees, not the full reply.
            text = self.tokenizer.decode(ids)  # type: ignore[assignment]
        if not closed:
            return text, ids
        before, after = self.frame(role)
        return text, [*before, *ids, *after]

    @property
    def eos_token_id(self) -> int:
        """Id of the EOS token with which the chat template closes an assistant turn."""
        self.frame("user")
        return self._eos_token_id

    def frame(self, role: str) -> tuple[list[int], list[int]]:
        """Return the token ids around a message of this role that follows a closed assistant turn."""
        if role not in self._frames:
            self._frames[role] = self._read_template(role) if self.tokenizer.chat_template else ([], [])
        return self._frames[role]

    def _read_template(self, role: str) -> tuple[list[int], list[int]]:
        """Return what the template puts between the assistant's EOS token and a message, and after it.

        Templates cannot render a reply on its own. So render a conversation with placeholders, and cut out
        the text around the last one.
        """
        answer = f"{PLACEHOLDER}-answer"
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer},
            {"role": role, "content": PLACEHOLDER},
        ]
        text: str = self.tokenizer.apply_chat_template(  # type: ignore[assignment]
            messages, add_generation_prompt=True, tokenize=False, **self.template
        )
        suffix = text[text.rindex(answer) + len(answer) :]
        middle, _, end = suffix.rpartition(PLACEHOLDER)
        before = self.tokenizer(middle, add_special_tokens=False)["input_ids"]
        after = self.tokenizer(end, add_special_tokens=False)["input_ids"]
        eos_position = next((i for i, token in enumerate(before) if token in self.eos_token_ids), -1)
        if eos_position >= 0:
            self._eos_token_id = before[eos_position]
        return before[eos_position + 1 :], after  # the model has sampled the EOS token already


class Responder:
    """Calls `Environment.respond` in a thread, with one batch of turns at a time and a timeout.

    If the environment raises, returns anything but one `Reply` per turn, or times out, all rollouts of the
    batch become invalid. A call that times out is abandoned, since Python cannot kill its thread.
    """

    def __init__(self, respond: Callable[[Sequence[Turn]], Sequence[Reply]], timeout: float):
        self.respond = respond
        self.timeout = timeout
        self._batch_size = 0
        self._deadline = 0.0
        self._thread: threading.Thread | None = None
        self._outcome: list[Sequence[Reply]] = []

    def start(self, turns: Sequence[Turn]) -> None:
        """Start computing the replies to a batch of turns. Call `result` for the previous batch first."""
        self._batch_size = len(turns)
        self._deadline = time.monotonic() + self.timeout
        outcome: list[Sequence[Reply]] = []  # a new list, since an abandoned call may still append to the old
        self._outcome = outcome
        # A daemon thread, so that an abandoned call does not block interpreter exit.
        self._thread = threading.Thread(target=self._call, args=(turns, outcome), daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Return whether `result` would return without waiting."""
        assert self._thread is not None
        return not self._thread.is_alive() or time.monotonic() > self._deadline

    def result(self) -> Sequence[Reply]:
        """Return the replies in the order of the turns; wait for them until the timeout."""
        assert self._thread is not None
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            return self._invalid(f"the environment did not reply within {self.timeout:g} s")
        return self._outcome[0]

    def _call(self, turns: Sequence[Turn], outcome: list[Sequence[Reply]]) -> None:
        try:
            replies = list(self.respond(turns))
            if len(replies) != len(turns) or not all(isinstance(reply, Reply) for reply in replies):
                raise TypeError(
                    f"respond must return {len(turns)} Reply objects, one per turn, not {replies!r:.60}"
                )
            outcome.append(replies)
        except BaseException as error:  # also SystemExit: `result` needs an outcome once the thread has ended
            outcome.append(self._invalid(f"the environment failed: {type(error).__name__}: {error}"))

    def _invalid(self, reason: str) -> list[Reply]:
        return [Reply(invalid=reason) for _ in range(self._batch_size)]
