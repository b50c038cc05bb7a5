"""`search-v2`: questions that are answered by searching, in several turns.

A rollout, with what the environment writes in the middle::

    <search>Velmora Works founder</search>

    <information>Doc 1(Title: "Velmora Works") ...</information>

    <answer>Tarin Oskel</answer>

Without a data set the questions are about a generated world (`rlkit.retrieval.collections.world`): nobody can
know the answers, they follow from its passages alone. See arXiv 2503.09516 (Search-R1) and 2505.04588
(ZeroSearch).

In training a language model may play the search engine (`engine: simulated`), whose documents help or are
noise. Held-out questions are asked of a real one, which alone tells what was learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.environment import SPLITS, Environment, Reply, Turn
from rlkit.envs.search import protocol as tags
from rlkit.envs.search import tool_calls
from rlkit.envs.search.arguments import check_search
from rlkit.envs.search.curriculum import Curriculum
from rlkit.envs.search.simulated import open_simulated
from rlkit.errors import UserError, check_arguments, check_choice, nearest
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import EngineError, Query, Result, SearchEngine
from rlkit.retrieval.engines.open import open_engine
from rlkit.rewards import qa, search

if TYPE_CHECKING:
    import datasets

    from rlkit.envs.search.questions import DatasetQuestion

SIZES = {"train": 8000, "dev": 1000, "test": 1000}


class SearchEnvironment(Environment):
    """Questions that are answered by searching.

    Args:
        data: questions with answers: see `rlkit.envs.search.questions`; None: about a generated world.
        engine: "bm25" over the world's passages, indexed on first use and kept in the cache, the default; the
            folder of an index made by `rlkit index`; the URL of a server; or "simulated".
        engine_args: further arguments of a server or of a simulated engine (docs/search_engines.md).
        held_out_engine: for the splits dev and test; None: `engine`, and "bm25" where that is simulated.
        noise: probability that a simulated search is noise, or the arguments of a `Curriculum`.
        world_size: passages of the world, from 100.
        world_seed: another world.
        hops: how many facts a question about the world chains, from 1 to 4.
        unanswerable: share of questions about the world whose answer no passage gives.
        topk: documents a search returns.
        max_searches: further ones find nothing and end the rollout.
        document_words: a longer document is cut.
        prompt_style: "search_r1" (the published wording in our words) or "short".
        protocol: "tags", or "tools" for calls of a function in the form of the model's chat template.

    Raises:
        UserError: arguments that do not fit.
    """

    id = "search-v2"
    metric = "f1"

    def __init__(
        self,
        *,
        data: str | None = None,
        engine: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
        held_out_engine: str | None = None,
        noise: float | Mapping[str, Any] = 0.0,
        world_size: int = 10_000,
        world_seed: int = 0,
        hops: Sequence[int] = (1, 2),
        unanswerable: float = 0.0,
        topk: int = 3,
        max_searches: int = 4,
        document_words: int = 100,
        prompt_style: str = "search_r1",
        protocol: str = "tags",
    ):
        self.hops = tuple([hops] if isinstance(hops, int) else hops)
        self.engine_name = "bm25" if engine is None and data is None else engine
        self.simulated = self.engine_name == "simulated"
        self.engine_args = dict(engine_args or {})
        self.held_out_name = held_out_engine or (self.engine_name if not self.simulated else None)
        if self.held_out_name is None and data is None:
            self.held_out_name = "bm25"
        self.data = data
        self._questions: dict[str, list[DatasetQuestion]] = {}
        # What results are broken down by: facts in a chain, or the set that a question is from.
        self.breakdown = ("hops",) if data is None else ("kind",)
        self.world_size = world_size
        self.unanswerable = unanswerable
        self.topk = topk
        self.max_searches = max_searches
        self.max_turns = max_searches + 1  # the last one answers
        self.document_words = document_words
        self.prompt_style = prompt_style
        self.protocol = protocol
        check_search(self)
        self.calls = protocol == "tools"
        self.tools = (tool_calls.SEARCH,) if self.calls else ()
        self.stop = () if self.calls else tags.STOP
        self.world = World(world_seed, world_size)
        if noise and not self.simulated:
            raise UserError(f"noise is of simulated engines; {self.engine_name} is a real one")
        curriculum = noise if isinstance(noise, Mapping) else {"schedule": "constant", "start": noise}
        check_arguments(Curriculum, curriculum)
        self.curriculum = Curriculum(**curriculum)
        self.rewards = {
            **{name: getattr(qa, name) for name in ("f1", "exact_match", "cover_match")},
            **{name: getattr(search, name) for name in ("backed", "recall", "searches", "search_price")},
            **{name: getattr(search, name) for name in ("tag_format", "search_r1", "refusal")},
            **{name: getattr(search, name) for name in ("useful_hits", "noisy_hits")},
        }
        # Those of weight 0 are logged: ZeroSearch's reward is F1 alone.
        logged = ["exact_match", "backed", "recall", "searches"]
        logged += ["useful_hits", "noisy_hits"] if self.simulated else []
        self.reward_weights = {"f1": 1.0, **dict.fromkeys(logged, 0.0)}

    @cached_property
    def engine(self) -> SearchEngine:
        """What finds documents in training."""
        return self._open(self.engine_name)

    @cached_property
    def held_out(self) -> SearchEngine:
        """What finds documents for the splits dev and test."""
        return self.engine if self.held_out_name == self.engine_name else self._open(self.held_out_name)

    def _open(self, name: str | None) -> SearchEngine:
        own = self.engine_args if name == self.engine_name else {}
        if name == "simulated":
            check_arguments(open_simulated, own)
            return open_simulated(**own)
        known = name == "bm25" or "://" in str(name) or Path(str(name)).expanduser().is_dir()
        if not known:
            raise UserError(
                f"there is no engine {name!r}{nearest(str(name), ('bm25', 'simulated'))}: take bm25, "
                "simulated, the folder of an index, or a server's URL"
            )
        return open_engine(str(name), None if self.data else self.world, own)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Make the first `n` questions of a split, of the world by default 8,000, 1,000 and 1,000.

        Columns: `prompt`, `task_id`, `split`, `question`, `answers`, `supporting` (ids of the passages that
        the answer follows from, in their order), `queries` (for them), `hops`, `answerable`, `kind` (the
        relations). Of a data set `supporting` and `queries` are empty, `hops` is 0 and `kind` names the set.

        Raises:
            UserError: an unknown split, or an engine that cannot be opened.
        """
        import datasets

        check_choice("split", split, SPLITS)
        # Opened with the first tasks, so that its faults show before training.
        self.engine if split == "train" else self.held_out  # noqa: B018
        if self.data is None:
            rows = [self._row(split, seed, i) for i in range(SIZES[split] if n is None else n)]
        else:
            rows = self._data_rows(split, n, seed)
        return datasets.Dataset.from_list(rows)

    def _data_rows(self, split: str, n: int | None, seed: int) -> list[dict[str, Any]]:
        from rlkit.envs.search.questions import ordered, read_questions

        if self._questions.get(split) is None:
            self._questions[split] = read_questions(str(self.data), split)
        asked = ordered(self._questions[split], seed)[:n]
        return [
            {
                "prompt": self._prompt(one.question),
                "task_id": one.id,
                "split": split,
                "question": one.question,
                "answers": list(one.answers),
                "supporting": [],
                "queries": [],
                "hops": 0,
                "answerable": True,
                "kind": one.source,
            }
            for one in asked
        ]

    def _prompt(self, question: str) -> list[dict[str, str]]:
        refuse = self.unanswerable > 0
        text = tags.write_prompt(question, self.prompt_style, may_refuse=refuse, tools=self.calls)
        return [{"role": "user", "content": text}]

    def _row(self, split: str, seed: int, i: int) -> dict[str, Any]:
        asked = self.world.question(split, i, self.hops, self.unanswerable, seed)
        answers = list(asked.answers) if asked.answerable else list(qa.REFUSALS)
        qa.check_answers(answers)
        return {
            "prompt": self._prompt(asked.text),
            "task_id": asked.id,
            "split": split,
            "question": asked.text,
            "answers": answers,
            "supporting": list(asked.supporting),
            "queries": [step.query for step in asked.steps],
            "hops": asked.hops,
            "answerable": asked.answerable,
            "kind": asked.kind,
        }

    def advance(self, step: int, steps: int, score: float | None) -> Mapping[str, float]:
        """Let the noise of a simulated engine rise; log what it was."""
        if not self.simulated:
            return {}
        noise = self.curriculum.value
        self.curriculum.advance(step, steps, score)
        return {"noise": noise}

    def state_dict(self) -> dict[str, Any]:
        """The curriculum's."""
        return self.curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The curriculum's."""
        self.curriculum.load_state_dict(state)

    def answer(self, task: Mapping[str, Any]) -> str:
        """The right answer between tags."""
        return f"<answer>{task['answers'][0]}</answer>"

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """A search for each fact, then the answer; None where a search does not find the passage.

        Only of questions about the world; a real engine says what is found.

        Raises:
            UserError: the engine failed.
        """
        words = task["queries"]
        if not words:
            return None
        found = self._search(self.held_out, [Query(query) for query in words])
        for one, needed in zip(found, task["supporting"], strict=True):
            if one.error is not None:
                raise UserError(f"the search failed: {one.error}")
            if needed not in [document.id for document in one.documents]:
                return None
        write = tool_calls.write_call if self.calls else "<search>{}</search>".format
        return [*map(write, words), self.answer(task)]

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Search for all turns that ask for it, at once; an answer ends the rollout."""
        read = tool_calls.read_call if self.calls else tags.read_action
        actions = [read(turn.messages[-1]["content"]) for turn in turns]
        searching = [
            i for i, a in enumerate(actions) if a.kind == "search" and _said(turns[i]) <= self.max_searches
        ]
        found: dict[int, list[Result]] = {}
        for training in (True, False):
            asking = [i for i in searching if (turns[i].task["split"] == "train") is training]
            queries = [self._query(turns[i], text) for i in asking for text in actions[i].queries]
            if queries:
                engine = self.engine if training else self.held_out
                if self.simulated and engine is self.engine:
                    engine.noise = self.curriculum.value if training else 0.0  # type: ignore[attr-defined]
                results = iter(self._search(engine, queries))
                found |= {i: list(islice(results, len(actions[i].queries))) for i in asking}
        return [self._reply(action, found.get(i)) for i, action in enumerate(actions)]

    def _query(self, turn: Turn, text: str) -> Query:
        task = turn.task
        # All rollouts of a task find the same, so that they are compared on their queries alone.
        key = (task["task_id"], _said(turn))
        return Query(text, task["question"], tuple(task["answers"]), key)

    def _search(self, engine: SearchEngine, queries: Sequence[Query]) -> Sequence[Result]:
        try:
            return engine.search(queries, self.topk)
        except EngineError as error:
            return [Result(error=str(error)) for _ in queries]

    def _reply(self, action: tags.Action, results: Sequence[Result] | None) -> Reply:
        if action.kind == "invalid":
            return Reply(tool_calls.INVALID if self.calls else tags.INVALID)
        if results is None:  # an answer, or a search too many
            return Reply(done=True)
        if failed := [result.error for result in results if result.error is not None]:
            return Reply(invalid=f"the search failed: {failed[0]}")
        found = [document.id for result in results for document in result.documents]
        record: dict[str, Any] = {"query": "\n".join(action.queries), "documents": found}
        if results[0].label:  # drawn once for a turn
            record["label"] = results[0].label
        if self.calls:
            text = tool_calls.write_tool_results(results, self.document_words)
            return Reply(text, record=record, role="tool")
        return Reply(tags.write_results(results[0].documents, self.document_words), record=record)


def _said(turn: Turn) -> int:
    """How many turns the model has had."""
    return sum(message["role"] == "assistant" for message in turn.messages)
