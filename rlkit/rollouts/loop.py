"""Carry a batch of rollouts through an environment: sample a turn, hand it over, append the reply, go on.

The environment answers in a thread of its own, all turns that have finished at a time, while the engine goes
on sampling the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.environment import Environment, Reply, Turn
from rlkit.rollouts.replies import ReplyTokens, Responder, require_tools
from rlkit.rollouts.types import Engine, Request, Rollout, Sample, Sampling


@dataclass(frozen=True)
class RolloutLimits:
    """What a rollout may take.

    Attributes:
        tokens: in all after the prompt, the environment's with them; the end token that is set behind a stop
            string is not counted.
        turns: of the model.
        turn_tokens: of one turn; None: what is left.
        reply_tokens: of one reply, longer ones are cut; None: what is left.
        reply_seconds: for the environment to answer a batch of turns.
    """

    tokens: int
    turns: int = 1
    turn_tokens: int | None = None
    reply_tokens: int | None = None
    reply_seconds: float = 60.0


class Loop:
    """Turns tasks into rollouts.

    Args:
        environment: answers the turns; its `stop` strings end them.
        tokenizer: that of the model.
        limits: what a rollout may take.
        ends: token ids that end a turn.
        template: further arguments of the chat template.
    """

    def __init__(
        self,
        environment: Environment,
        tokenizer: Any,
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
            engine: samples the turns.
            sampling: how; it must name the environment's stop strings.
            tasks: a row for each rollout, given to the environment with its turns.
            prompts: their token ids.
            first: the place of the first rollout among those of all processes.
        """
        batch = _Batch(self, engine, sampling, tasks, prompts=prompts, first=first)
        batch.run()
        return batch.rollouts


class _Batch:
    """The rollouts of one call while they are carried."""

    def __init__(
        self,
        loop: Loop,
        engine: Engine,
        sampling: Sampling,
        tasks: Sequence[Mapping[str, Any]],
        *,
        prompts: Sequence[Sequence[int]],
        first: int,
    ):
        self.loop, self.limits = loop, loop.limits
        self.engine, self.sampling = engine, sampling
        self.tasks, self.first = tasks, first
        self.rollouts = [Rollout(list(ids)) for ids in prompts]
        self.sampling_rows: set[int] = set()
        self.finished: list[int] = []  # rows whose turn the environment has not seen
        self.asked: list[int] = []  # rows whose turn it is looking at
        self.responder = Responder(loop.environment.respond, loop.limits.reply_seconds)

    def run(self) -> None:
        """Carry every rollout to its end."""
        self._sample(range(len(self.rollouts)))
        while self.sampling_rows or self.finished or self.asked:
            if self.sampling_rows:
                for row, sample in self.engine.collect(wait=not (self.asked or self.finished)):
                    self.sampling_rows.discard(row)
                    self._take(row, sample)
            if self.asked and (self.responder.ready() or not self.sampling_rows):
                self._answer(self.responder.result())
            if self.finished and not self.asked:
                self.asked, self.finished = self.finished, []
                self.responder.start([self._turn(row) for row in self.asked])

    def _sample(self, rows: Sequence[int]) -> None:
        """Ask the engine for the next turn of some rollouts; a prompt that leaves no room is invalid."""
        requests = []
        for row in rows:
            rollout, limit = self.rollouts[row], self._room(self.rollouts[row])
            if limit < 1:
                self._no_room(rollout)
                continue
            if self.limits.turn_tokens is not None:
                limit = min(limit, self.limits.turn_tokens)
            ids = rollout.prompt_ids + rollout.ids
            requests.append(Request(row, self.first + row, ids, limit, sum(rollout.mask)))
        self.sampling_rows.update(request.row for request in requests)
        if requests:
            self.engine.submit(requests, self.sampling)

    def _room(self, rollout: Rollout) -> int:
        """Tokens that may still come."""
        room = self.limits.tokens - len(rollout.ids)
        if self.engine.context is not None:
            room = min(room, self.engine.context - len(rollout.prompt_ids) - len(rollout.ids))
        return room

    def _no_room(self, rollout: Rollout) -> None:
        rollout.truncated = True
        rollout.invalid = (
            f"the prompt has {len(rollout.prompt_ids)} tokens, the sampler takes {self.engine.context} "
            "in all: raise vllm_max_model_length or shorten the prompts"
        )
        self._append(rollout, [self.sampling.ends[0]])  # TRL takes no empty completion

    def _take(self, row: int, sample: Sample) -> None:
        """Append a sampled turn; it is the environment's next where it came to an end."""
        rollout = self.rollouts[row]
        if sample.log_probs is not None:
            known = rollout.log_probs or [0.0] * len(rollout.ids)
            rollout.log_probs = [*known, *sample.log_probs]
        rollout.ids += sample.ids
        rollout.mask += [1] * len(sample.ids)
        text = self.loop.tokenizer.decode(sample.ids, skip_special_tokens=True)
        rollout.turns.append({"role": "assistant", "content": text, "tokens": len(sample.ids)})
        rollout.truncated = sample.finish == "length"
        if sample.finish == "stop" and self.limits.turns == 1:
            self._end(rollout)
        if not rollout.truncated and self.limits.turns > 1:
            self.finished.append(row)

    def _turn(self, row: int) -> Turn:
        prompt = self.tasks[row]["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return Turn(self.tasks[row], [*messages, *self.rollouts[row].turns])

    def _answer(self, replies: Sequence[Reply]) -> None:
        """Append the replies of the environment and sample the turns after them."""
        rows, self.asked = self.asked, []
        self._sample([row for row, reply in zip(rows, replies, strict=True) if self._goes_on(row, reply)])

    def _goes_on(self, row: int, reply: Reply) -> bool:
        """Append a reply; return whether another turn comes after it."""
        rollout = self.rollouts[row]
        closed = rollout.ids[-1] in self.sampling.ends
        if reply.invalid is not None:
            rollout.invalid = reply.invalid
            return False
        if reply.done:
            rollout.turns[-1] |= reply.record
            if not closed:
                self._end(rollout)
            return False
        rollout.truncated = True  # unless there is a turn left, and room for the reply and for it
        if sum(turn["role"] == "assistant" for turn in rollout.turns) >= self.limits.turns:
            return False
        text, ids = self.loop.replies(
            reply.text or "", closed=closed, most=self.limits.reply_tokens, role=reply.role
        )
        if len(ids) >= self._room(rollout):
            return False
        rollout.truncated = False
        rollout.turns.append({**reply.record, "role": reply.role, "content": text, "tokens": len(ids)})
        self._append(rollout, ids)
        return True

    def _end(self, rollout: Rollout) -> None:
        """Mark the end after a stop string: to TRL what has no end token is truncated."""
        rollout.stopped = True
        self._append(rollout, [self.sampling.ends[0]])

    def _append(self, rollout: Rollout, ids: list[int]) -> None:
        """Append tokens that the model did not sample."""
        rollout.ids += ids
        rollout.mask += [0] * len(ids)
        if rollout.log_probs is not None:
            rollout.log_probs += [0.0] * len(ids)
