"""A ranking environment of 60 documents, each of which is the answer to the query with the same words."""

import itertools
from dataclasses import asdict

import datasets

from rlkit.environment import Candidates, Environment
from tests.tiny_encoders import WORDS

TEXTS = [" ".join(words) for words in itertools.islice(itertools.combinations(WORDS.split(), 3), 0, 1800, 30)]


class Echo(Environment):
    """Rank the document with the query's words first."""

    id = "echo-v1"
    metric = "first"
    rewards = {"first": lambda completion, answer: float(completion.startswith(answer))}  # noqa: RUF012
    reward_weights = {"first": 1.0}  # noqa: RUF012

    def tasks(self, split, n=None, seed=0):
        offset = 0 if split == "train" else 20
        return datasets.Dataset.from_list([self.task(i, split) for i in range(offset, offset + (n or 20))])

    def task(self, i, split):
        ids = [i, (i + 1) % 60, (i + 7) % 60]
        grades = [1, 0, 0]
        if split == "train" and i == 0:
            ids, grades = ids[:1], grades[:1]
        if split == "train" and i in (1, 2):
            grades = [1, 1, 1]
        return {
            "prompt": [{"role": "user", "content": TEXTS[i]}],
            "task_id": f"{split}-{i}",
            "answer": "[1]",
            "query": TEXTS[i],
            "passages": [TEXTS[j] for j in ids],
            "grades": grades,
            "ideal": [1],
            "ids": [f"d{j}" for j in ids],
            "relevant": [f"d{i}"],
            "excluded": [],
            "possible_answers": [],
            "passages_are_queries": False,
        }

    def answer(self, task):
        return task["answer"]

    def candidate_documents(self, task):
        return Candidates(**{name: task[name] for name in asdict(Candidates("", [], [], []))})

    def documents(self):
        return ((f"d{i}", text) for i, text in enumerate(TEXTS))
