"""Does a retriever of demonstrations gain from training on the language model's own correctness?

A frozen SmolLM2-135M names the tool for a request (MetaTool) after k demonstrations: none, random ones,
those of BM25, of all-MiniLM-L6-v2, and of three residuals of the latter. The first is distilled from the
probability of the correct answer after each demonstration (`scripts/score_demonstrations.py`), with 0.1 times
InfoNCE. The controls are trained on labels instead, which say whether the two tools are the same, for those
of the questions that have such a demonstration: one with the same loss, and one with InfoNCE. The learning
rate of each training is the one whose retriever finds the demonstrations with the highest probability of the
correct answer, for a fifth of the training questions. The score is whether the model's greedy answer is the
tool. Three seeds of each training, and of the random demonstrations; paired permutation tests over the tools,
with Holm's correction.

Three ways to use the demonstrations of the encoder are compared by the log-probability of the correct answer:
the first one alone, the per-token marginal of k prompts with one each, and one prompt with all k.

The probabilities and the model's answers are stored in the folder and not computed again.

    python benchmarks/demonstrations.py --collection data/metatool
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from residuals import ENCODER, ResidualTraining
from retrieval import Scores, compare_pairs, mean_by_document, save, summarize
from trl import ModelConfig

from rlkit.envs.ranking.demonstrate import (
    DemonstrateEnvironment,
    Example,
    demonstration_prompt,
    same_question,
)
from rlkit.envs.ranking.pairs.demonstrations import (
    add_random,
    answer_probabilities,
    demonstration_rows,
    token_log_probs,
    token_marginal,
)
from rlkit.envs.ranking.pairs.rows import PairRow, read_rows, write_rows
from rlkit.files import atomic_write
from rlkit.models.load import load_model
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.collections.write import write_beir
from rlkit.rewards.identification import hit
from rlkit.rollouts.local.generate import left_pad
from rlkit.rollouts.tokenize import tokenize
from rlkit.training.ranking.scorers import AdapterScorer

RESULTS = Path(__file__).parent / "results" / "demonstrations.json"
MODEL = "bundled:smollm2-135m"
NUM_RETRIEVED, NUM_RANDOM = 8, 4  # scored demonstrations of a training question
TEMPERATURE = 0.05  # of the cosines, in training and in the weights of the marginal
TRAINING: dict[str, Any] = {"steps": 100, "batch_size": 32, "temperature": TEMPERATURE}
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
HELD_OUT = 0.2  # share of the training questions on which the learning rate is chosen
BATCH_SIZE = 16  # prompts
MAX_TOKENS = 16  # of an answer
TRAINED = {
    "probabilities": "distillation",
    "labels": "distillation",
    "labels, InfoNCE": "infonce",
}
PAIRS = [
    ("no demonstrations", "random"),
    ("random", "bm25"),
    ("random", "dense"),
    ("bm25", "dense"),
    ("dense", "probabilities"),
    ("dense", "labels"),
    ("labels", "probabilities"),
    ("labels, InfoNCE", "probabilities"),
]


def write_sample(name: str, num_examples: int, num_questions: int, folder: Path) -> str:
    """Write a collection with some of the queries of another one that have one relevant document each.

    Args:
        name: Name of the collection to sample from.
        num_examples: Number of training queries.
        num_questions: Number of test queries.
        folder: Folder to write to.
    """
    collection = load_collection(name)
    qrels = {}
    for split, num_queries in (("train", num_examples), ("test", num_questions)):
        judged = {query: grades for query, grades in collection.judged(split).items() if len(grades) == 1}
        sample = random.Random(0).sample(sorted(judged), min(num_queries, len(judged)))
        qrels[split] = {query: judged[query] for query in sample}
    queries = {query: collection.queries[query] for judged in qrels.values() for query in judged}
    write_beir(folder, collection.documents(), queries, qrels)
    return str(folder)


class Benchmark:
    """Questions, demonstrations and models of the benchmark.

    Args:
        collection: Folder of the sample.
        k: Number of demonstrations in a prompt.
    """

    def __init__(self, collection: str, k: int):
        self.collection, self.k = collection, k
        self.environment = DemonstrateEnvironment(collection=collection, demonstrations=k)
        self.questions = self.environment.questions("test")
        self.residuals = ResidualTraining(ENCODER)
        self.model, self.tokenizer = load_model(ModelConfig(model_name_or_path=MODEL, dtype="float32"))
        self.answers_file = Path(collection) / "answers.json"  # of the model, by prompt
        self.answers: dict[str, str] = {}
        if self.answers_file.exists():
            self.answers = json.loads(self.answers_file.read_text(encoding="utf-8"))

    def rank(
        self, scorer: AdapterScorer, questions: Sequence[Example], k: int
    ) -> tuple[list[list[Example]], list[list[float]]]:
        """Return the `k` demonstrations of each question with the highest scores, and the scores."""
        examples = list(self.environment.examples.values())
        with torch.no_grad():
            vectors = scorer.embed([example.text for example in examples], "document")
            scores = scorer.embed([question.question for question in questions], "query") @ vectors.T
        rankings, values = [], []
        for question, row in zip(questions, scores, strict=True):
            order = row.argsort(descending=True, stable=True).tolist()
            best = [i for i in order[: k + 1] if not same_question(examples[i], question)][:k]
            rankings.append([examples[i] for i in best])
            values.append(row[best].tolist())
        return rankings, values

    def score(self, rankings: Sequence[Sequence[Example]]) -> Scores:
        """Return for each test question whether the answer is right, and whether a demonstration has it."""
        prompts = [
            demonstration_prompt(question.question, ranking[::-1])
            for question, ranking in zip(self.questions, rankings, strict=True)
        ]
        self.generate(prompts)
        return {
            question.id: {
                "hit": hit(self.answers[prompt_key(prompt)], question.answers),
                "shown": float(any(example.answers == question.answers for example in ranking)),
            }
            for question, prompt, ranking in zip(self.questions, prompts, rankings, strict=True)
        }

    def generate(self, prompts: Sequence[list[dict[str, str]]]) -> None:
        """Generate the greedy answers to prompts that have none, and store them."""
        missing = [prompt for prompt in prompts if prompt_key(prompt) not in self.answers]
        missing.sort(key=lambda prompt: len(str(prompt)))
        for start in range(0, len(missing), BATCH_SIZE):
            batch = missing[start : start + BATCH_SIZE]
            ids, mask = left_pad(tokenize(self.tokenizer, batch), self.tokenizer.pad_token_id)
            # In float32: bfloat16 is many times slower on most CPUs.
            output = self.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_TOKENS)
            replies = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for prompt, reply in zip(batch, replies, strict=True):
                self.answers[prompt_key(prompt)] = reply
            atomic_write(self.answers_file, json.dumps(self.answers, ensure_ascii=False))

    def scored_rows(self, num_questions: int, path: Path) -> list[PairRow]:
        """Return the training rows with the model's probabilities, from a file if it exists."""
        if not path.exists():
            questions = self.environment.questions("train")[:num_questions]
            rankings, _ = self.rank(self.residuals.scorer(), questions, NUM_RETRIEVED)
            candidates = add_random(self.environment, questions, rankings, NUM_RANDOM)
            targets = answer_probabilities(self.model, self.tokenizer, questions, candidates)
            bank = self.environment.examples.values()
            write_rows(path, demonstration_rows(questions, candidates, targets, bank))
        return read_rows(path)

    def labeled_rows(self, rows: Sequence[PairRow]) -> list[PairRow]:
        """Return the rows with the target 1 for demonstrations with the question's answer, and 0 for others.

        Rows without such a demonstration have nothing to learn from and are left out.
        """
        examples = self.environment.examples
        labeled = []
        for row in rows:
            answer = examples[row.id.rpartition("/")[2]].answers
            targets = tuple(float(examples[name].answers == answer) for name in row.passage_documents)
            if any(targets):
                labeled.append(replace(row, targets=targets, source="labels"))
        return labeled

    def choose_learning_rate(
        self, rows: Sequence[PairRow], training_rows: Sequence[PairRow], objective: str
    ) -> dict[float, float]:
        """Return the mean target of the demonstrations that each learning rate finds for held-out questions.

        Args:
            rows: Rows with the model's probabilities.
            training_rows: Rows to train on, for the same questions or some of them.
            objective: Key `objective` of `rlkit rank`.
        """
        held_out = random.Random(0).sample(rows, round(HELD_OUT * len(rows)))
        names = {row.id for row in held_out}
        remaining = [row for row in training_rows if row.id not in names]
        return {
            rate: self.mean_target(
                self.residuals.train(remaining, seed=0, learning_rate=rate, objective=objective, **TRAINING),
                held_out,
            )
            for rate in LEARNING_RATES
        }

    def mean_target(self, scorer: AdapterScorer, rows: Sequence[PairRow]) -> float:
        """Return the mean target of the `k` candidates of each row with the highest scores."""
        means = []
        with torch.no_grad():
            for row in rows:
                scores = (scorer.embed([row.query], "query") @ scorer.embed(row.passages, "document").T)[0]
                best = scores.argsort(descending=True, stable=True)[: self.k].tolist()
                means.append(fmean(row.targets[i] for i in best))
        return fmean(means)

    def combinations(self) -> dict[str, list[Scores]]:
        """Return the log-probability of the correct answer for three ways to use the encoder's ranking."""
        rankings, scores = self.rank(self.residuals.scorer(), self.questions, self.k)
        answers = [question.answers[0] for question in self.questions]
        singles = [
            demonstration_prompt(question.question, [example])
            for question, ranking in zip(self.questions, rankings, strict=True)
            for example in ranking
        ]
        repeated = [answer for answer in answers for _ in range(self.k)]
        of_singles = token_log_probs(self.model, self.tokenizer, singles, repeated)
        together = [
            demonstration_prompt(question.question, ranking[::-1])
            for question, ranking in zip(self.questions, rankings, strict=True)
        ]
        of_together = token_log_probs(self.model, self.tokenizer, together, answers)
        systems: dict[str, dict[str, dict[str, float]]] = {"first": {}, "marginal": {}, "concatenation": {}}
        for i, question in enumerate(self.questions):
            log_probs = of_singles[i * self.k : (i + 1) * self.k]
            weights = torch.tensor(scores[i]).softmax(0).tolist()  # the temperature is in the scores
            systems["first"][question.id] = {"log_prob": sum(log_probs[0])}
            systems["marginal"][question.id] = {"log_prob": token_marginal(weights, log_probs)}
            systems["concatenation"][question.id] = {"log_prob": sum(of_together[i])}
        return {name: [by_question] for name, by_question in systems.items()}


def prompt_key(prompt: Sequence[dict[str, str]]) -> str:
    """Return the messages of a prompt as one string."""
    return json.dumps(prompt, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", required=True, help="collection with the splits train and test")
    parser.add_argument("--k", type=int, default=3, help="demonstrations in a prompt (default: 3)")
    parser.add_argument("--examples", type=int, default=1500, help="demonstrations in all (default: 1500)")
    parser.add_argument("--training", type=int, default=200, help="training questions (default: 200)")
    parser.add_argument("--questions", type=int, default=200, help="test questions (default: 200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--folder", type=Path, default=Path("runs/demonstrations"),
        help="default: runs/demonstrations")  # fmt: skip
    options = parser.parse_args()
    start = time.perf_counter()
    name = f"{Path(options.collection).name}-{options.examples}-{options.questions}"
    folder = options.folder / name
    sample = write_sample(options.collection, options.examples, options.questions, folder)
    benchmark = Benchmark(sample, options.k)
    environment, questions, k = benchmark.environment, benchmark.questions, options.k
    rows = benchmark.scored_rows(options.training, folder / f"rows-{options.training}.jsonl")
    labeled = benchmark.labeled_rows(rows)
    dense, _ = benchmark.rank(benchmark.residuals.scorer(), questions, k)
    systems = {
        "no demonstrations": [benchmark.score([[] for _ in questions])],
        "random": [
            benchmark.score([environment.draw(question, k, seed) for question in questions])
            for seed in options.seeds
        ],
        "bm25": [benchmark.score(environment.find(questions, k))],
        "dense": [benchmark.score(dense)],
    }
    held_out_targets = {}
    for system, objective in TRAINED.items():
        systems[system] = []
        training_rows = rows if system == "probabilities" else labeled
        by_rate = benchmark.choose_learning_rate(rows, training_rows, objective)
        held_out_targets[system] = {f"{rate:g}": round(target, 4) for rate, target in by_rate.items()}
        settings = {**TRAINING, "learning_rate": max(by_rate, key=by_rate.__getitem__)}
        for seed in options.seeds:
            scorer = benchmark.residuals.train(training_rows, seed=seed, objective=objective, **settings)
            systems[system].append(benchmark.score(benchmark.rank(scorer, questions, k)[0]))
    combinations = benchmark.combinations()
    by_tool = {
        system: [mean_by_document(scores, sample) for scores in by_seed]
        for system, by_seed in systems.items()
    }
    combinations_by_tool = {
        system: [mean_by_document(scores, sample) for scores in by_seed]
        for system, by_seed in combinations.items()
    }
    result = {
        "demonstrations": len(environment.examples),
        "training_questions": {"probabilities": len(rows), "labels": len(labeled)},
        "test_questions": len(questions),
        "tools_with_test_questions": len(by_tool["dense"][0]),
        "k": k,
        "held_out_targets_by_learning_rate": held_out_targets,
        "means": summarize(systems, ["hit", "shown"]),
        "tests_of_hit_by_tool": compare_pairs(by_tool, "hit", PAIRS),
        "log_prob_of_dense": summarize(combinations, ["log_prob"]),
        "tests_of_log_prob_by_tool": compare_pairs(
            combinations_by_tool,
            "log_prob",
            [("first", "marginal"), ("first", "concatenation"), ("marginal", "concatenation")],
        ),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    save(result, RESULTS)


if __name__ == "__main__":
    main()
