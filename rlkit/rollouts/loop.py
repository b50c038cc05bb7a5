"""The rollout loop: sample a turn, pass it to the environment, append its reply, sample the next turn.

The environment runs in a separate thread while the engine keeps sampling the other rollouts. Each call of the
environment receives all turns that have finished since the previous call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit.encoding import encodable
from rlkit.environment import Environment, Reply, Turn
from rlkit.errors import first_line
from rlkit.rollouts.chat_template import check_template
from rlkit.rollouts.replies import ReplyTokens, Responder
from rlkit.rollouts.tokenize import decode_turn, opens_thought
from rlkit.rollouts.types import Engine, Request, Rollout, Sample, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutLimits:
    """Limits of a rollout.

    Attributes:
        max_tokens: Maximum number of tokens after the prompt, environment tokens included. The EOS token that
            is appended after a stop string does not count.
        max_turns: Maximum number of assistant turns.
        max_turn_tokens: Maximum number of tokens of one assistant turn. None: only `max_tokens` applies.
        max_reply_tokens: Maximum number of tokens of one reply; longer replies are truncated. None: only
            `max_tokens` applies.
        reply_timeout: Seconds that the environment has to reply to a batch of turns.
    """

    max_tokens: int
    max_turns: int = 1
    max_turn_tokens: int | None = None
    max_reply_tokens: int | None = None
    reply_timeout: float = 60.0


class Loop:
    """Rolls out tasks: alternates between the engine's turns and the environment's replies.

    Args:
        environment: Environment that replies to the turns; its `stop` strings end a turn.
        tokenizer: Tokenizer of the model.
        limits: Limits of each rollout.
        eos_token_ids: Ids of the tokens that end a turn.
        template: Extra arguments of the chat template.
    """

    def __init__(
        self,
        environment: Environment,
        tokenizer: PreTrainedTokenizerBase,
        limits: RolloutLimits,
        eos_token_ids: Sequence[int],
        template: Mapping[str, Any] | None = None,
    ):
        self.environment = environment
        self.tokenizer = tokenizer
        self.limits = limits
        self.template = dict(template or {})
        if environment.tools:
            self.template["tools"] = [dict(tool) for tool in environment.tools]
        self.replies = ReplyTokens(tokenizer, environment.stop, eos_token_ids, self.template)
        # A stop string may itself be an EOS token. Then it is part of the turn's text and does not close it.
        vocabulary = tokenizer.get_vocab()
        stop_ids = [vocabulary.get(string) for string in environment.stop]
        self.closing_ids = [token for token in eos_token_ids if token not in stop_ids]
        # Checked here: otherwise, the first reply would fail in the middle of training.
        check_template(environment, tokenizer, self.replies.template)

    def __call__(
        self,
        engine: Engine,
        sampling: Sampling,
        tasks: Sequence[Mapping[str, Any]],
        prompts: Sequence[Sequence[int]],
        first_index: int = 0,
    ) -> list[Rollout]:
        """Roll out tasks, one rollout per row.

        Args:
            engine: Engine that samples the turns.
            sampling: Sampling settings; `stop` must contain the environment's stop strings.
            tasks: Task of each rollout, passed to the environment with its turns.
            prompts: Token ids of each prompt.
            first_index: Index of the first rollout in the batch of all processes.
        """
        rollouts = [Rollout(list(ids)) for ids in prompts]
        responder = Responder(self.environment, self.limits.reply_timeout)
        sampling_rows: set[int] = set()  # the engine is sampling their next turn
        finished_rows: list[int] = []  # their turn is finished but not yet passed to the environment
        answering_rows: list[int] = []  # the environment is replying to their turn

        def sample_turns(rows: Iterable[int]) -> None:
            requests = []
            for row in rows:
                room = self._room(rollouts[row], engine)
                if room < 1:
                    self._end_without_room(rollouts[row], engine, sampling)
                    continue
                requests.append(self._request(rollouts[row], row, first_index + row, room))
            sampling_rows.update(request.local_index for request in requests)
            if requests:
                engine.submit(requests, sampling)

        sample_turns(range(len(rollouts)))
        while sampling_rows or finished_rows or answering_rows:
            if sampling_rows:
                # Only poll the engine while the environment is busy, so that replies are appended as soon as
                # they are ready.
                for row, sample in engine.collect(wait=not (answering_rows or finished_rows)):
                    sampling_rows.discard(row)
                    if self._append_turn(rollouts[row], sample, sampling):
                        finished_rows.append(row)
            # Once the engine has nothing to sample, block on the replies.
            if answering_rows and (responder.ready() or not sampling_rows):
                replies, rows, answering_rows = responder.result(), answering_rows, []
                sample_turns(
                    row
                    for row, reply in zip(rows, replies, strict=True)
                    if self._try_append_reply(rollouts[row], reply, engine, sampling)
                )
            # Call the environment once at a time, with all turns that have finished in the meantime: search
            # engines and judges are faster on batches.
            if finished_rows and not answering_rows:
                answering_rows, finished_rows = finished_rows, []
                responder.start([self._turn(tasks[row], rollouts[row]) for row in answering_rows])
        return rollouts

    def _room(self, rollout: Rollout, engine: Engine) -> int:
        """Return the number of tokens that can still be appended."""
        room = self.limits.max_tokens - len(rollout.ids)
        if engine.context is not None:
            room = min(room, engine.context - len(rollout.prompt_ids) - len(rollout.ids))
        return room

    def _request(self, rollout: Rollout, local_index: int, global_index: int, room: int) -> Request:
        if self.limits.max_turn_tokens is not None:
            room = min(room, self.limits.max_turn_tokens)
        ids = rollout.prompt_ids + rollout.ids
        # `start` lets the engine continue the rollout's random numbers after those of its earlier turns.
        return Request(local_index, global_index, ids, room, start=sum(rollout.mask))

    def _end_without_room(self, rollout: Rollout, engine: Engine, sampling: Sampling) -> None:
        """End a rollout whose prompt fills the engine's context. It is invalid, not a wrong answer."""
        rollout.truncated = True
        rollout.invalid = (
            f"the prompt has {len(rollout.prompt_ids)} tokens, but the engine's context is {engine.context}: "
            "raise vllm_max_model_length or shorten the prompts"
        )
        _append_environment_tokens(rollout, [sampling.eos_token_ids[0]])  # TRL rejects empty completions

    def _append_turn(self, rollout: Rollout, sample: Sample, sampling: Sampling) -> bool:
        """Append a sampled turn; return whether the environment must reply to it."""
        if sample.log_probs is not None:
            # Environment tokens from before the first turn with log-probabilities need padding.
            earlier = rollout.log_probs or [0.0] * len(rollout.ids)
            rollout.log_probs = [*earlier, *sample.log_probs]
        # The tag of a thought that the chat template has opened.
        is_thought = opens_thought(self.tokenizer, rollout.prompt_ids + rollout.ids)
        prefix = {"prefix": "<think>"} if is_thought else {}
        # Keep the sampled ids. Decoding and tokenizing them again occasionally gives different ids, and the
        # loss would then train on tokens that the model never sampled.
        rollout.ids += sample.ids
        rollout.mask += [1] * len(sample.ids)
        text = decode_turn(self.tokenizer, sample.ids, self.closing_ids)
        rollout.turns.append({"role": "assistant", "content": text, "tokens": len(sample.ids)} | prefix)
        rollout.truncated = sample.finish_reason == "length"
        if self.limits.max_turns == 1:  # the environment need not define `respond`
            if sample.finish_reason == "stop":
                _end_after_stop_string(rollout, sampling)
            return False
        return not rollout.truncated

    def _turn(self, task: Mapping[str, Any], rollout: Rollout) -> Turn:
        prompt = task["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return Turn(task, [*messages, *rollout.turns])

    def _try_append_reply(self, rollout: Rollout, reply: Reply, engine: Engine, sampling: Sampling) -> bool:
        """Append a reply like `_append_reply`; a reply that cannot be appended makes its rollout invalid."""
        try:
            return self._append_reply(rollout, reply, engine, sampling)
        except Exception as error:  # replies contain foreign text, and templates are foreign programs
            logger.warning("a reply of %s could not be appended", self.environment.id, exc_info=True)
            rollout.invalid = f"the reply could not be appended: {type(error).__name__}: {first_line(error)}"
            return False

    def _append_reply(self, rollout: Rollout, reply: Reply, engine: Engine, sampling: Sampling) -> bool:
        """Append the environment's reply; return whether to sample another turn."""
        closed = bool(set(rollout.ids[-1:]) & set(self.closing_ids))
        if reply.invalid is not None:
            rollout.invalid = reply.invalid
            return False
        if reply.done:
            rollout.turns[-1] |= encodable(reply.record)  # there is no reply message that could carry it
            if not closed:
                _end_after_stop_string(rollout, sampling)
            return False
        # From here on the rollout is truncated, unless the limits leave room for the reply and another turn.
        rollout.truncated = True
        if sum(turn["role"] == "assistant" for turn in rollout.turns) >= self.limits.max_turns:
            return False
        text, ids = self.replies(
            reply.text or "", closed=closed, max_tokens=self.limits.max_reply_tokens, role=reply.role
        )
        if len(ids) >= self._room(rollout, engine):  # the next turn needs at least one token
            return False
        rollout.truncated = False
        message = {"role": reply.role, "content": text, "tokens": len(ids)}
        rollout.turns.append({**encodable(reply.record), **message})
        _append_environment_tokens(rollout, ids)
        return True


def _end_after_stop_string(rollout: Rollout, sampling: Sampling) -> None:
    """Append an EOS token after a stop string: TRL treats a completion without one as truncated."""
    rollout.stopped = True
    _append_environment_tokens(rollout, [sampling.eos_token_ids[0]])


def _append_environment_tokens(rollout: Rollout, ids: list[int]) -> None:
    """Append tokens that the model did not sample; the mask keeps them out of the loss."""
    rollout.ids += ids
    rollout.mask += [0] * len(ids)
    if rollout.log_probs is not None:
        rollout.log_probs += [0.0] * len(ids)
