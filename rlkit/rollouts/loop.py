"""The rollout loop: sample a turn, hand it to the environment, append its reply, sample the next turn.

The environment answers in a thread of its own, all turns that have finished at a time, while the engine goes
on sampling the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit.environment import Environment, Reply, Turn
from rlkit.rollouts.replies import ReplyTokens, Responder, require_tools
from rlkit.rollouts.types import Engine, Request, Rollout, Sample, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RolloutLimits:
    """Limits of a rollout.

    Attributes:
        tokens: Maximum number of tokens after the prompt, those of the environment included. The EOS token
            that is set behind a stop string is not counted.
        turns: Maximum number of assistant turns.
        turn_tokens: Maximum number of tokens of one turn; None: what is left of `tokens`.
        reply_tokens: Maximum number of tokens of one reply, longer ones are cut; None: what is left.
        reply_seconds: Seconds that the environment has to answer a batch of turns.
    """

    tokens: int
    turns: int = 1
    turn_tokens: int | None = None
    reply_tokens: int | None = None
    reply_seconds: float = 60.0


class Loop:
    """Turns tasks into rollouts.

    Args:
        environment: Answers the turns; its `stop` strings end them.
        tokenizer: The model's.
        limits: Limits of a rollout.
        ends: Token ids that end a turn.
        template: Further arguments of the chat template.
    """

    def __init__(
        self,
        environment: Environment,
        tokenizer: PreTrainedTokenizerBase,
        limits: RolloutLimits,
        ends: Sequence[int],
        template: Mapping[str, Any] | None = None,
    ):
        self.environment = environment
        self.tokenizer = tokenizer
        self.limits = limits
        self.template = dict(template or {})
        if environment.tools:
            self.template["tools"] = [dict(tool) for tool in environment.tools]
            require_tools(tokenizer, self.template)
        self.replies = ReplyTokens(tokenizer, environment.stop, ends, self.template)

    def __call__(
        self,
        engine: Engine,
        sampling: Sampling,
        tasks: Sequence[Mapping[str, Any]],
        prompts: Sequence[Sequence[int]],
        first: int = 0,
    ) -> list[Rollout]:
        """Roll out tasks.

        Args:
            engine: Samples the turns.
            sampling: Its settings; they must name the environment's stop strings.
            tasks: A row for each rollout, given to the environment with its turns.
            prompts: The token ids of each prompt.
            first: Place of the first rollout among those of all processes.
        """
        rollouts = [Rollout(list(ids)) for ids in prompts]
        responder = Responder(self.environment.respond, self.limits.reply_seconds)
        sampling_rows: set[int] = set()  # the engine is sampling their next turn
        finished_rows: list[int] = []  # their turn is finished, the environment has not seen it
        answering_rows: list[int] = []  # the environment is answering their turn

        def sample_turns(rows: Iterable[int]) -> None:
            requests = []
            for row in rows:
                room = self._room(rollouts[row], engine)
                if room < 1:
                    self._end_without_room(rollouts[row], engine, sampling)
                    continue
                requests.append(self._request(rollouts[row], row, first + row, room))
            sampling_rows.update(request.row for request in requests)
            if requests:
                engine.submit(requests, sampling)

        sample_turns(range(len(rollouts)))
        while sampling_rows or finished_rows or answering_rows:
            if sampling_rows:
                # While the environment has something to do the engine is only polled, so that replies are
                # taken as soon as they are there.
                for row, sample in engine.collect(wait=not (answering_rows or finished_rows)):
                    sampling_rows.discard(row)
                    if self._append_turn(rollouts[row], sample, sampling):
                        finished_rows.append(row)
            # With nothing left to sample, wait for the replies.
            if answering_rows and (responder.ready() or not sampling_rows):
                replies, rows, answering_rows = responder.result(), answering_rows, []
                sample_turns(
                    row
                    for row, reply in zip(rows, replies, strict=True)
                    if self._append_reply(rollouts[row], reply, engine, sampling)
                )
            # One call of the environment at a time, with all turns that have finished meanwhile: search
            # engines and judges are faster with whole batches.
            if finished_rows and not answering_rows:
                answering_rows, finished_rows = finished_rows, []
                responder.start([self._turn(tasks[row], rollouts[row]) for row in answering_rows])
        return rollouts

    def _room(self, rollout: Rollout, engine: Engine) -> int:
        """Number of tokens that may still be appended."""
        room = self.limits.tokens - len(rollout.ids)
        if engine.context is not None:
            room = min(room, engine.context - len(rollout.prompt_ids) - len(rollout.ids))
        return room

    def _request(self, rollout: Rollout, row: int, place: int, room: int) -> Request:
        if self.limits.turn_tokens is not None:
            room = min(room, self.limits.turn_tokens)
        return Request(row, place, rollout.prompt_ids + rollout.ids, room, start=sum(rollout.mask))

    def _end_without_room(self, rollout: Rollout, engine: Engine, sampling: Sampling) -> None:
        """End a rollout whose prompt fills the sampler's context: it is invalid, not a wrong answer."""
        rollout.truncated = True
        rollout.invalid = (
            f"the prompt has {len(rollout.prompt_ids)} tokens, the sampler takes {engine.context} "
            "in all: raise vllm_max_model_length or shorten the prompts"
        )
        _append_foreign(rollout, [sampling.ends[0]])  # TRL's loss takes no empty completion

    def _append_turn(self, rollout: Rollout, sample: Sample, sampling: Sampling) -> bool:
        """Append a sampled turn; return whether the environment answers it."""
        if sample.log_probs is not None:
            # Tokens of the environment, appended before the first turn with log-probabilities, have none.
            earlier = rollout.log_probs or [0.0] * len(rollout.ids)
            rollout.log_probs = [*earlier, *sample.log_probs]
        # The ids are kept as they were sampled. Decoding and tokenizing again gives other ids now and then,
        # and the loss would learn from tokens that the model never chose.
        rollout.ids += sample.ids
        rollout.mask += [1] * len(sample.ids)
        text = self.tokenizer.decode(sample.ids, skip_special_tokens=True)
        rollout.turns.append({"role": "assistant", "content": text, "tokens": len(sample.ids)})
        rollout.truncated = sample.finish == "length"
        if self.limits.turns == 1:
            if sample.finish == "stop":
                _mark_end(rollout, sampling)
            return False
        return not rollout.truncated

    def _turn(self, task: Mapping[str, Any], rollout: Rollout) -> Turn:
        prompt = task["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return Turn(task, [*messages, *rollout.turns])

    def _append_reply(self, rollout: Rollout, reply: Reply, engine: Engine, sampling: Sampling) -> bool:
        """Append the environment's reply; return whether another turn is sampled after it."""
        closed = rollout.ids[-1] in sampling.ends
        if reply.invalid is not None:
            rollout.invalid = reply.invalid
            return False
        if reply.done:
            rollout.turns[-1] |= reply.record
            if not closed:
                _mark_end(rollout, sampling)
            return False
        rollout.truncated = True  # unless there is a turn left, and room for the reply and for that turn
        if sum(turn["role"] == "assistant" for turn in rollout.turns) >= self.limits.turns:
            return False
        text, ids = self.replies(
            reply.text or "", closed=closed, most=self.limits.reply_tokens, role=reply.role
        )
        if len(ids) >= self._room(rollout, engine):
            return False
        rollout.truncated = False
        rollout.turns.append({**reply.record, "role": reply.role, "content": text, "tokens": len(ids)})
        _append_foreign(rollout, ids)
        return True


def _mark_end(rollout: Rollout, sampling: Sampling) -> None:
    """Set an EOS token behind a stop string: to TRL a completion without one is truncated."""
    rollout.stopped = True
    _append_foreign(rollout, [sampling.ends[0]])


def _append_foreign(rollout: Rollout, ids: list[int]) -> None:
    """Append tokens that the model did not sample: the mask keeps them out of the loss."""
    rollout.ids += ids
    rollout.mask += [0] * len(ids)
    if rollout.log_probs is not None:
        rollout.log_probs += [0.0] * len(ids)
