"""Train an encoder to rank the documents of a query (`rlkit rank`; Neural PG-RANK, arXiv 2310.04407).

The encoder's scores define a policy over rankings, and nDCG is the reward. In evaluations the ranking is
written out and judged like a language model's answer, so that both can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
import transformers

from rlkit.arguments.parse import RankConfig
from rlkit.environment import Candidates, Environment
from rlkit.errors import UserError
from rlkit.retrieval.encoders import load_encoder
from rlkit.rollouts.types import Rollout
from rlkit.scoring import load_rewards
from rlkit.training.ranking.scorers import AdapterScorer, EncoderScorer, ListwiseScorer
from rlkit.training.ranking.trainer import Objective, RankingTrainer, permutation
from rlkit.training.session import Session, make_environment, make_runner


def rank(run: RankConfig) -> None:
    """Train an encoder, evaluate before and after, and save the model and a report."""
    args, trainer_args = run.args, run.trainer_args
    environment = make_environment(args)
    session = Session(run, "rank", environment)
    with closing(session):
        session.prepare()
        if args.objective == "wasserstein" and trainer_args.per_device_train_batch_size < 2:
            raise UserError("objective wasserstein needs a per_device_train_batch_size of at least 2")
        rows = training_rows(environment, session.tasks())
        rewards, _ = load_rewards(None, environment, None)
        # The adapter is initialized at random, and must be the same on all processes and in a resumed run.
        transformers.set_seed(trainer_args.seed)
        scorer = load_scorer(run)
        trainer_args.remove_unused_columns = False
        objective = Objective(args.objective, args.utility, args.cutoff, args.rankings, args.estimator)
        with make_runner(args, rewards, environment) as runner:
            trainer = session.make_trainer(
                RankingTrainer, scorer, objective, args=trainer_args, train_dataset=rows
            )

            def answer(tasks: Sequence[dict[str, Any]], samples: int) -> list[list[Rollout]]:
                scorer = trainer.accelerator.unwrap_model(trainer.model)
                with torch.no_grad():
                    rankings = [rank_candidates(scorer, c) for c in candidates_of(environment, tasks)]
                return [[ranking] * samples for ranking in rankings]  # greedy: all samples are the same

            watch = {"loss": "loss", "utility": "utility"}
            session.fit(trainer, trainer.stateful(), runner, watch=watch, answer=answer)


def training_rows(environment: Environment, tasks: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the candidates of tasks whose passages have different grades; the others have no gradient.

    Raises:
        UserError: The tasks are not about ranking, or no task has different grades.
    """
    rows = [
        asdict(candidates)
        for candidates in candidates_of(environment, tasks)
        if len(set(candidates.grades)) > 1
    ]
    if not rows:
        raise UserError(
            f"{environment.id} has no training query with documents of different grades; increase num_tasks "
            "or the number of candidates"
        )
    return rows


def candidates_of(environment: Environment, tasks: Sequence[Any]) -> list[Candidates]:
    """Return the candidate documents of each task; raise UserError if a task is not about ranking."""
    candidates_by_task = []
    for task in tasks:
        candidates = environment.candidate_documents(task)
        if candidates is None:
            raise UserError(
                f"{environment.id} is not a ranking environment: its candidate_documents() returns None"
            )
        candidates_by_task.append(candidates)
    return candidates_by_task


def load_scorer(run: RankConfig) -> EncoderScorer:
    """Return the scorer that the config of a run sets; raise UserError if its encoder cannot be loaded."""
    args = run.args
    if not run.model_args.model_name_or_path:
        raise UserError(
            "no encoder given: set the key 'model_name_or_path', e.g. sentence-transformers/all-MiniLM-L6-v2"
        )
    encoder = load_encoder(run.model_args.model_name_or_path).to(run.trainer_args.device)
    if args.adapter_rank:
        return AdapterScorer(encoder, args.temperature, args.adapter_rank)
    if args.listwise:
        return ListwiseScorer(encoder, args.temperature, args.listwise)
    return EncoderScorer(encoder, args.temperature)


def rank_candidates(scorer: EncoderScorer, candidates: Candidates) -> Rollout:
    """Return the ranking of the candidates by their scores, as a rollout of one turn."""
    passages = [candidates.passages]
    if not candidates.passages:
        return Rollout.single(permutation([]), [], False)
    queries = scorer.query_texts([candidates.query], passages)
    scores = scorer(queries, passages)[0].tolist()
    return Rollout.single(permutation(scores), [], False)
