"""Train an encoder to rank the documents of a query (`rlkit rank`; Neural PG-RANK, arXiv 2310.04407).

The encoder's scores are a policy over rankings; nDCG is the reward. Its answers to held-out tasks are judged
as a language model's are.
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
from rlkit.scoring import RewardRunner, load_rewards
from rlkit.training.ranking.scorers import AdapterScorer, EncoderScorer, ListwiseScorer
from rlkit.training.ranking.trainer import Objective, RankingTrainer, permutation
from rlkit.training.session import Session, make_environment


def rank(run: RankConfig) -> None:
    """Train, with evaluation before and after, model and report at the end."""
    args, trainer_args = run.args, run.trainer_args
    environment = make_environment(args)
    session = Session(run, "rank", environment)
    with closing(session):
        session.prepare()
        if args.objective == "wasserstein" and trainer_args.per_device_train_batch_size < 2:
            raise UserError("objective wasserstein needs per_device_train_batch_size of at least 2")
        rows = training_rows(environment, session.tasks())
        rewards, _ = load_rewards(None, environment, None)
        # All processes, and a resumed run, begin with the same adapter.
        transformers.set_seed(trainer_args.seed)
        scorer = load_scorer(run)
        trainer_args.remove_unused_columns = False
        objective = Objective(args.objective, args.utility, args.cutoff, args.rankings, args.estimator)
        with RewardRunner(
            rewards, args.reward_time_limit, args.reward_workers, metric=environment.metric
        ) as runner:
            trainer = session.make_trainer(
                RankingTrainer, scorer, objective, args=trainer_args, train_dataset=rows
            )

            def answer(tasks: Sequence[dict[str, Any]], samples: int) -> list[list[Rollout]]:
                scorer = trainer.accelerator.unwrap_model(trainer.model)
                with torch.no_grad():
                    return [
                        [judge(scorer, documents)] * samples
                        for documents in candidates_of(environment, tasks)
                    ]

            watch = {"loss": "loss", "utility": "utility"}
            session.fit(trainer, trainer.stateful(), runner, watch=watch, answer=answer)


def training_rows(environment: Environment, tasks: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the candidates of the tasks that can be learned from: some of them are better than others.

    Raises:
        UserError: the tasks are not about ranking, or none can be learned from.
    """
    rows = [asdict(one) for one in candidates_of(environment, tasks) if len(set(one.grades)) > 1]
    if not rows:
        raise UserError(f"{environment.id} has no training query with documents of different grades")
    return rows


def candidates_of(environment: Environment, tasks: Sequence[Any]) -> list[Candidates]:
    """Return the candidates of each task; raises UserError where a task is not about ranking."""
    candidates = []
    for task in tasks:
        documents = environment.candidate_documents(task)
        if documents is None:
            raise UserError(
                f"{environment.id} gives an encoder nothing to rank: its candidate_documents returns None"
            )
        candidates.append(documents)
    return candidates


def load_scorer(run: RankConfig) -> EncoderScorer:
    """Return the scorer that the keys name; raises UserError where its encoder cannot be loaded."""
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


def judge(scorer: EncoderScorer, candidates: Candidates) -> Rollout:
    """Return the permutation of the candidates by their scores, as a rollout of one turn."""
    passages = [candidates.passages]
    if not candidates.passages:
        return Rollout.single(permutation([]), [], False)
    scores = scorer(scorer.ask([candidates.query], passages), passages)[0].tolist()
    return Rollout.single(permutation(scores), [], False)
