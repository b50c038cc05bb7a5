"""`rlkit rank`: train an encoder to rank the documents of a query (Neural PG-RANK, arXiv 2310.04407).

The encoder's scores are a policy over rankings; nDCG is the reward. Its answers to held-out tasks of an
environment such as `rerank-v1` are judged as a language model's are. Also a module for launchers:
`accelerate launch -m rlkit.rank --config FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rlkit.errors import UserError

NEEDED = ("query", "passages", "grades", "ideal")  # columns of the tasks


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the keys say and return the exit code."""
    from rlkit.config import parse_rank
    from rlkit.launch import use_one_gpu
    from rlkit.preemption import shield_children

    use_one_gpu()
    shield_children()
    rank(parse_rank(sys.argv[1:] if arguments is None else arguments))
    return 0


def rank(run: Any) -> None:
    """Train, with evaluation before and after, model and report at the end."""
    import transformers

    from rlkit.algorithms.ranking import Objective, RankingTrainer
    from rlkit.rewarding import RewardRunner, load_rewards

    keys, args = run.task, run.trainer
    environment = keys.make_environment()
    session = ranking_session(run, environment)
    tasks = session.tasks()
    if missing := [name for name in NEEDED if name not in tasks.column_names]:
        raise UserError(f"{environment.id} has no tasks for an encoder: they lack {', '.join(missing)}")
    rows = [{name: task[name] for name in NEEDED} for task in tasks if learnable(task)]
    if not rows:
        raise UserError(f"{environment.id} has no training query with documents of different grades")
    rewards, _ = load_rewards(None, environment, None)
    transformers.set_seed(args.seed)  # of the adapter: all processes, and a resumed run, begin with the same
    scorer = load_scorer(run)
    args.remove_unused_columns = False
    objective = Objective(keys.objective, keys.utility, keys.cutoff, keys.rankings, keys.estimator)
    session.open()
    with RewardRunner(
        rewards, keys.reward_time_limit, keys.reward_workers, metric=environment.metric
    ) as runner:
        trainer = RankingTrainer(scorer, objective, args=args, train_dataset=rows)
        session.fit(trainer, runner, {"loss": "loss", "utility": "utility"})


def learnable(task: dict[str, Any]) -> bool:
    """Whether some documents are better than others: nothing else can be learned from."""
    return len(set(task["grades"])) > 1


def load_scorer(run: Any) -> Any:
    """The scorer that the keys name; raises UserError where its encoder cannot be loaded."""
    from rlkit.algorithms.scorers import AdapterScorer, EncoderScorer, ListwiseScorer, load_encoder

    keys = run.task
    if not run.model.model_name_or_path:
        raise UserError(
            "no encoder given: set the key 'model_name_or_path', e.g. sentence-transformers/all-MiniLM-L6-v2"
        )
    encoder = load_encoder(run.model.model_name_or_path).to(run.trainer.device)
    if keys.adapter_rank:
        return AdapterScorer(encoder, keys.temperature, keys.adapter_rank)
    if keys.listwise:
        return ListwiseScorer(encoder, keys.temperature, keys.listwise)
    return EncoderScorer(encoder, keys.temperature)


def ranking_session(run: Any, environment: Any) -> Any:
    """A `Session` whose evaluations ask a scorer for a permutation."""
    import torch

    from rlkit.algorithms.ranking import permutation
    from rlkit.rollouts import Rollout
    from rlkit.session import Session, evaluating, in_shares

    class RankingSession(Session):
        def _answer(self, trainer: Any, tasks: Sequence[Any], samples: int) -> list[list[Rollout]]:
            scorer = trainer.accelerator.unwrap_model(trainer.model)

            def answer(share: Sequence[Any]) -> list[list[Rollout]]:
                with evaluating(scorer), torch.no_grad():
                    return [[judge(scorer, task)] * samples for task in share]

            return in_shares(trainer.accelerator, tasks, answer)

    def judge(scorer: Any, task: Any) -> Rollout:
        passages = [task["passages"]]
        scores = scorer(scorer.ask([task["query"]], passages), passages)[0].tolist() if passages[0] else []
        return Rollout.single(permutation(scores), [], False)

    return RankingSession(run, "rank", environment, 0)


if __name__ == "__main__":
    from rlkit.cli import run_command

    raise SystemExit(run_command(main))
