"""`rlkit rank` on PROP's rows: a document as the query, and two sets of words to rank for it."""

import json
import math
import sys
from dataclasses import asdict

import datasets
import pytest

from rlkit.commands import main as cli
from rlkit.environment import Candidates, Environment
from rlkit.envs.ranking.pairs.words import prop
from rlkit.retrieval.cross_encoders import load_cross_encoder
from rlkit.retrieval.documents import Document
from rlkit.retrieval.encoders import load_encoder
from tests.tiny_encoders import save_tiny_encoder, save_tiny_transformer
from tests.toy_ranking import TEXTS


class WordSets(Environment):
    """Rank the likelier set of words first."""

    id = "word-sets-v1"
    metric = "first"
    rewards = {"first": lambda completion, answer: float(completion.startswith(answer))}  # noqa: RUF012
    reward_weights = {"first": 1.0}  # noqa: RUF012

    def tasks(self, split, n=None, seed=0):
        documents = [Document(f"{split}-{i}", "", text) for i, text in enumerate(TEXTS)]
        rows = list(prop(documents, per_document=1, seed=seed, min_count=2))[:n]
        return datasets.Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row.query}],
                    "task_id": row.id,
                    "answer": "[1]",
                    **asdict(
                        Candidates(row.query, row.passages, row.targets, [1.0], passages_are_queries=True)
                    ),
                }
                for row in rows
            ]
        )

    def answer(self, task):
        return task["answer"]

    def candidate_documents(self, task):
        return Candidates(**{name: task[name] for name in asdict(Candidates("", [], [], []))})


@pytest.mark.parametrize(("objective", "cross_encoder"), [("softmax_margin", True), ("ranknet", False)])
def test_rank_trains_on_word_sets(tmp_path, monkeypatch, objective, cross_encoder):
    save = save_tiny_transformer if cross_encoder else save_tiny_encoder
    keys = {
        "environment": f"{__name__}:WordSets",
        "model_name_or_path": save(tmp_path / "body"),
        "objective": objective,
        "cross_encoder": str(cross_encoder).lower(),
        "num_tasks": 16,
        "evaluation_tasks": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
    }
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["rlkit", "rank", *argv])
    assert cli.main() == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    load = load_cross_encoder if cross_encoder else load_encoder
    load(str(tmp_path / "run" / "model"))
