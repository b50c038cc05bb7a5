"""`search-v3`: multi-turn question answering with a search engine.

In a rollout, the model writes a search, the environment returns documents, and the model answers::

    <search>Velmora Works founder</search>

    <information>Doc 1(Title: "Velmora Works") ...</information>

    <answer>Tarin Oskel</answer>

Without a dataset, the questions are about a generated world (`rlkit.retrieval.collections.world`). No model
can know the answers, because they follow only from the passages of the world. See arXiv 2503.09516
(Search-R1) and 2505.04588 (ZeroSearch).

In training, a language model may simulate the search engine (`engine: simulated`) and write documents that
are useful or noise. By default, evaluations use a real engine, because only that shows what the policy has
learned.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.environment import SPLITS, Environment, Reply, Turn, hashed_choice
from rlkit.envs.search import protocol as tags
from rlkit.envs.search import tool_calls
from rlkit.envs.search.arguments import check_search, engine_arguments
from rlkit.envs.search.curriculum import Curriculum
from rlkit.envs.search.simulated import open_simulated
from rlkit.errors import UserError, check_arguments, check_choice, nearest
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import EngineError, Query, Result, SearchEngine
from rlkit.retrieval.engines.open import open_engine
from rlkit.rewards import qa, search
from rlkit.rewards.tool_calls import read_tool_calls

if TYPE_CHECKING:
    import datasets

    from rlkit.envs.search.questions import DatasetQuestion

logger = logging.getLogger(__name__)

SIZES = {"train": 8000, "dev": 1000, "test": 1000}


class SearchEnvironment(Environment):
    """Multi-turn question answering with a search engine.

    Args:
        data: Dataset of questions with answers, see `rlkit.envs.search.questions`. None generates questions
            about a world.
        engine: Search engine: "bm25" (the default without `data`) over the passages of the world, which are
            indexed on first use and cached; an index folder from `rlkit index`; the URL of a server; or
            "simulated".
        engine_args: Additional arguments of a server or of a simulated engine (docs/search_engines.md). Each
            engine takes those that it has.
        held_out_engine: Search engine of the dev and test splits. None means `engine`, or "bm25" if that is
            simulated.
        noise: Probability that a simulated search returns noise, or the arguments of a `Curriculum`. Other
            engines ignore it.
        world_size: Number of passages of the world, at least 100.
        world_seed: Random seed of the world.
        hops: Numbers of hops (chained facts) of questions about the world, from 1 to 4.
        unanswerable: Fraction of questions about the world that no passage answers.
        topk: Number of documents that a search returns.
        max_searches: Maximum number of assistant turns that search; one more ends the rollout without
            documents. A tool call may have several queries, see `rlkit.rewards.search.search_price`.
        document_words: Maximum number of words of a document; longer documents are truncated.
        document_format: "search_r1", `Doc 1(Title: "T") text`, or "zerosearch", `Doc 1: T text`. None means
            "zerosearch" if `engine` is simulated. The documents of both engines have the same format.
        prompt_style: "search_r1" (the published prompt, reworded) or "short".
        solution_style: Style of the scripts: "steps", "verbose" (with a thought in each turn; only with the
            protocol "tags") or "mixed" ("steps" for a quarter of the tasks, else "verbose").
        protocol: "tags", or "tools" for function calls in the format of the model's chat template.

    Raises:
        UserError: An argument is invalid or contradicts another one.
    """

    id = "search-v3"
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
        document_format: str | None = None,
        prompt_style: str = "search_r1",
        solution_style: str = "steps",
        protocol: str = "tags",
    ):
        self.hops = tuple([hops] if isinstance(hops, int) else hops)
        self.engine_name = "bm25" if engine is None and data is None else engine
        self.is_simulated = self.engine_name == "simulated"
        if engine_args is not None and not isinstance(engine_args, Mapping):
            raise UserError(f"engine_args must be a mapping of names to values, not {engine_args!r}")
        if isinstance(noise, bool) or not isinstance(noise, int | float | Mapping):
            raise UserError(
                f"noise must be a number or a mapping with schedule, start and end, not {noise!r}"
            )
        self.engine_args = dict(engine_args or {})
        self.held_out_name = held_out_engine or (self.engine_name if not self.is_simulated else None)
        if self.held_out_name is None and data is None:
            self.held_out_name = "bm25"
        self.data = data
        self.requires_scripts = data is None  # without one, the engine retrieves no passage of the world
        # Cached per split, because reading a dataset is slow.
        self._questions: dict[str, list[DatasetQuestion]] = {}
        # Evaluations are broken down by number of hops, or by the dataset that a question is from.
        self.breakdown = ("hops",) if data is None else ("kind",)
        self.world_size = world_size
        self.unanswerable = unanswerable
        self.topk = topk
        self.max_searches = max_searches
        self.max_turns = max_searches + 1  # the last turn is for the answer
        self.document_words = document_words
        self.document_format = document_format or ("zerosearch" if self.is_simulated else "search_r1")
        self.prompt_style = prompt_style
        self.solution_style = solution_style
        self.protocol = protocol
        check_search(self)
        self.uses_tool_calls = protocol == "tools"
        self.tools = (tool_calls.SEARCH_TOOL,) if self.uses_tool_calls else ()
        self.stop = () if self.uses_tool_calls else tags.STOP_STRINGS
        self.world = World(world_seed, world_size)
        if noise and not self.is_simulated:
            logger.warning("noise is ignored, because engine is %r, not 'simulated'", self.engine_name)
        curriculum = noise if isinstance(noise, Mapping) else {"schedule": "constant", "start": noise}
        check_arguments(Curriculum, curriculum)
        self.curriculum = Curriculum(**curriculum)
        self.rewards = {
            **{name: getattr(qa, name) for name in ("f1", "exact_match", "cover_match")},
            **{name: getattr(search, name) for name in ("backed", "recall", "searches", "search_price")},
            **{name: getattr(search, name) for name in ("tag_format", "search_r1", "refusal")},
            **{name: getattr(search, name) for name in ("useful_hits", "noisy_hits")},
        }
        # Rewards of weight 0 are only logged: ZeroSearch's reward is F1 alone.
        logged = ["exact_match", "backed", "recall", "searches"]
        logged += ["useful_hits", "noisy_hits"] if self.is_simulated else []
        self.reward_weights = {"f1": 1.0, **dict.fromkeys(logged, 0.0)}

    @cached_property
    def engine(self) -> SearchEngine:
        """Search engine of the train split, opened on first use."""
        return self._open(self.engine_name)

    @cached_property
    def held_out(self) -> SearchEngine:
        """Search engine of the dev and test splits, opened on first use."""
        if self.held_out_name == self.engine_name:
            return self.engine
        return self._open(self.held_out_name)

    def _open(self, name: str | None) -> SearchEngine:
        arguments = engine_arguments(str(name), self.engine_args)
        if name == "simulated":
            return open_simulated(**arguments)
        exists = name == "bm25" or "://" in str(name) or Path(str(name)).expanduser().is_dir()
        if not exists:
            raise UserError(
                f"there is no engine {name!r}{nearest(str(name), ('bm25', 'simulated'))}: use 'bm25',"
                " 'simulated', an index folder or a server URL"
            )
        return open_engine(str(name), None if self.data else self.world, arguments, self.topk)

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Return the first `n` questions of a split.

        The default is all questions of a dataset, or 8,000 (train) or 1,000 (dev, test) about the world.

        Columns: `prompt`, `task_id`, `split`, `question`, `answers`, `supporting` (ids of the passages that
        imply the answer, in the order of the hops), `queries` (one for each of these passages), `hops`,
        `answerable`, `kind` (the relations). With a dataset, `supporting` and `queries` are empty, `hops` is
        0 and `kind` is the name of the dataset.

        Raises:
            UserError: The split is unknown, or the engine cannot be opened.
        """
        import datasets

        check_choice("split", split, SPLITS)
        # Open the engine now, so that a wrong setting fails before training.
        self.engine if split == "train" else self.held_out  # noqa: B018
        if self.data is None:
            rows = [self._world_row(split, seed, i) for i in range(SIZES[split] if n is None else n)]
        else:
            rows = self._dataset_rows(split, n, seed)
        return datasets.Dataset.from_list(rows)

    def _dataset_rows(self, split: str, n: int | None, seed: int) -> list[dict[str, Any]]:
        from rlkit.envs.search.questions import read_questions, shuffled

        if self._questions.get(split) is None:
            self._questions[split] = read_questions(str(self.data), split)
        return [
            {
                "prompt": self._prompt(question.question),
                "task_id": question.id,
                "split": split,
                "question": question.question,
                "answers": list(question.answers),
                "supporting": [],
                "queries": [],
                "hops": 0,
                "answerable": True,
                "kind": question.source,
            }
            for question in shuffled(self._questions[split], seed)[:n]
        ]

    def _prompt(self, question: str) -> list[dict[str, str]]:
        text = tags.write_prompt(
            question, self.prompt_style, may_refuse=self.unanswerable > 0, tools=self.uses_tool_calls
        )
        return [{"role": "user", "content": text}]

    def _world_row(self, split: str, seed: int, i: int) -> dict[str, Any]:
        question = self.world.question(split, i, self.hops, self.unanswerable, seed)
        answers = list(question.answers) if question.answerable else list(qa.REFUSALS)
        qa.check_answers(answers)  # a generated name such as "The" could not be scored
        return {
            "prompt": self._prompt(question.text),
            "task_id": question.id,
            "split": split,
            "question": question.text,
            "answers": answers,
            "supporting": list(question.supporting),
            "queries": [step.query for step in question.steps],
            "hops": question.hops,
            "answerable": question.answerable,
            "kind": question.kind,
        }

    def advance(self, step: int, steps: int, score: float | None) -> Mapping[str, float]:
        """Set the noise of the next sampling step, and return that of the one that has just ended."""
        if not self.is_simulated:
            return {}
        noise = self.curriculum.value
        self.curriculum.advance(step, steps, score)
        return {"noise": noise}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the noise schedule."""
        return self.curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the noise schedule."""
        self.curriculum.load_state_dict(state)

    def answer(self, task: Mapping[str, Any]) -> str:
        """Return the first accepted answer between answer tags."""
        return f"<answer>{task['answers'][0]}</answer>"

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """Return one search per fact and the answer, or None if a search does not retrieve its passage.

        Tasks from a dataset have no known queries, so they have no script. Searches use the held-out engine.

        Raises:
            UserError: The engine failed.
        """
        queries = task["queries"]
        if not queries:
            return None
        results = self._search(self.held_out, [Query(query) for query in queries])
        for result, passage_id in zip(results, task["supporting"], strict=True):
            if result.error is not None:
                raise UserError(f"the search failed: {result.error}")
            if passage_id not in [document.id for document in result.documents]:
                return None
        write = tool_calls.write_call if self.uses_tool_calls else "<search>{}</search>".format
        turns = [*map(write, queries), self.answer(task)]
        if not self._is_verbose(task):
            return turns
        thoughts = [f"I need to look this up: {query}" for query in queries]
        if task["answerable"]:
            thoughts.append(f"According to the documents, the answer is {task['answers'][0]}.")
        else:
            thoughts.append("The documents do not answer the question.")
        return [f"<think>{thought}</think>\n{turn}" for thought, turn in zip(thoughts, turns, strict=True)]

    def _is_verbose(self, task: Mapping[str, Any]) -> bool:
        if self.solution_style == "mixed":
            return hashed_choice(f"style {task['task_id']}", 4) > 0
        return self.solution_style == "verbose"

    def read_tool_calls(self, turn: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the function calls that `respond` reads in a turn."""
        return [(call.name, call.arguments) for call in read_tool_calls(turn)]

    def respond_at_once(self, turn: Turn) -> Reply | None:
        """Return the reply to a turn that does not search, or may not: an answer, or an invalid action.

        An answer, or a search beyond `max_searches`, ends the rollout.
        """
        return self._reply_at_once(turn, self._read_action(turn))

    def _reply_at_once(self, turn: Turn, action: tags.Action) -> Reply | None:
        if action.kind == "invalid":
            return Reply(tool_calls.INVALID if self.uses_tool_calls else tags.INVALID)
        if action.kind == "answer" or _num_assistant_turns(turn) > self.max_searches:
            return Reply(done=True)
        return None

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Run the searches of all turns as one batch per engine, and reply with the documents.

        A failed search makes its rollout invalid.
        """
        actions = [self._read_action(turn) for turn in turns]
        replies: dict[int, Reply] = {}
        searching = []
        for i, (turn, action) in enumerate(zip(turns, actions, strict=True)):
            reply = self._reply_at_once(turn, action)
            if reply is None:
                searching.append(i)
            else:
                replies[i] = reply
        for is_train in (True, False):
            rows = [i for i in searching if (turns[i].task["split"] == "train") is is_train]
            queries = [self._query(turns[i], text) for i in rows for text in actions[i].queries]
            if not queries:
                continue
            engine = self.engine if is_train else self.held_out
            # One simulated engine may serve both splits. Evaluations then get no noise.
            if self.is_simulated and engine is self.engine:
                engine.noise = self.curriculum.value if is_train else 0.0  # type: ignore[attr-defined]
            results = iter(self._search(engine, queries))
            for i in rows:
                replies[i] = self._reply(actions[i], list(islice(results, len(actions[i].queries))))
        return [replies[i] for i in range(len(turns))]

    def _read_action(self, turn: Turn) -> tags.Action:
        message = turn.messages[-1]
        if self.uses_tool_calls:
            # In a thought that the chat template has opened, nothing is a call.
            return tool_calls.read_call(f"{message.get('prefix') or ''}{message['content']}")
        return tags.read_action(message["content"])

    def _query(self, turn: Turn, text: str) -> Query:
        task = turn.task
        # Equal queries of a group get equal documents, so that its rollouts differ only in their queries.
        key = (task["task_id"], _num_assistant_turns(turn))
        return Query(text, task["question"], tuple(task["answers"]), key)

    def _search(self, engine: SearchEngine, queries: Sequence[Query]) -> Sequence[Result]:
        try:
            return engine.search(queries, self.topk)
        except EngineError as error:
            if len(queries) == 1:  # the rollout becomes invalid, not scored 0
                return [Result(error=str(error))]
        # One query may be to blame for all.
        return [result for query in queries for result in self._search(engine, [query])]

    def _reply(self, action: tags.Action, results: Sequence[Result]) -> Reply:
        for result in results:
            if result.error is not None:
                return Reply(invalid=f"the search failed: {result.error}")
        document_ids = [document.id for result in results for document in result.documents]
        record: dict[str, Any] = {
            "query": "\n".join(action.queries),
            "documents": document_ids,
            "num_documents": [len(result.documents) for result in results],
        }
        if results[0].label:  # all queries of a turn share one draw, and so one label
            record["label"] = results[0].label
        if self.uses_tool_calls:
            text = tool_calls.write_tool_results(results, self.document_words, self.document_format)
            return Reply(text, record=record, role="tool")
        text = tags.write_results(results[0].documents, self.document_words, self.document_format)
        return Reply(text, record=record)


def _num_assistant_turns(turn: Turn) -> int:
    return sum(message["role"] == "assistant" for message in turn.messages)
