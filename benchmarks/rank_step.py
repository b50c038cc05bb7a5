"""Time of a step of `rlkit rank` with InfoNCE, compared with sentence-transformers' trainer.

    python benchmarks/rank_step.py            # 10 minutes on two CPU cores

Both train the bundled encoder on the same batches of queries, one positive and two negatives each, with the
same loss (`MultipleNegativesRankingLoss`) and optimizer. All texts are distinct, so that neither side gains
from embedding a document once. The sides alternate every few steps in one process; each pair of turns gives
a ratio, and the ratio of the medians over all steps is the result. Above 1, rlkit is faster.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as TheirArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback, TrainingArguments

from rlkit.models.cpu import tune_for_cpu
from rlkit.retrieval.encoders import load_encoder
from rlkit.training.ranking.scorers import EncoderScorer
from rlkit.training.ranking.trainer import Objective, RankingTrainer, collate

RESULT = Path(__file__).parent / "results" / "rank_step.json"
ENCODER = "bundled:all-minilm-l6-v2"
BATCH_SIZE, NEGATIVES, TEMPERATURE = 16, 2, 0.05


class Steps(TrainerCallback):
    """Callback that measures the seconds between the ends of steps, so with loading and tokenizing."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()


def make_rows(num_queries: int) -> list[dict[str, str]]:
    """Return queries of 5 to 15 words with passages of 10 to 150 words, most of them short.

    The words are tokens of the encoder, so that a word is a token as in English prose.
    """
    generator = random.Random(0)
    vocabulary = load_encoder(ENCODER).tokenizer.get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 3)

    def text(num_words: int) -> str:
        return " ".join(generator.choices(words, k=num_words))

    rows = []
    for _ in range(num_queries):
        lengths = [min(150, 10 + int(generator.expovariate(1 / 30))) for _ in range(NEGATIVES + 1)]
        row = {"query": text(generator.randint(5, 15)), "positive": text(lengths[0])}
        rows.append(row | {f"negative_{i}": text(length) for i, length in enumerate(lengths[1:], 1)})
    return rows


def candidates(row: dict[str, str], number: int) -> dict[str, Any]:
    """Return a row as `rlkit rank` reads it."""
    passages = [text for name, text in row.items() if name != "query"]
    ids = [f"{number}-{i}" for i in range(len(passages))]
    judged = {"grades": [1] + [0] * NEGATIVES, "ideal": [1], "ids": ids, "relevant": ids[:1], "excluded": []}
    return {"query": row["query"], "passages": passages} | judged


def make_trainers(rows: list[dict[str, str]], steps: int, folder: str) -> dict[str, tuple[Any, Steps]]:
    """Return the trainer and the timer of each side."""
    common = {
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": steps,
        "learning_rate": 2e-5,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    ours = EncoderScorer(load_encoder(ENCODER), TEMPERATURE)
    theirs = load_encoder(ENCODER)
    arguments = TrainingArguments(f"{folder}/ours", remove_unused_columns=False, **common)
    our_rows = [candidates(row, i) for i, row in enumerate(rows)]
    our_trainer = RankingTrainer(ours, Objective("infonce"), args=arguments, train_dataset=our_rows)
    their_trainer = SentenceTransformerTrainer(
        theirs,
        TheirArguments(f"{folder}/theirs", **common),
        train_dataset=datasets.Dataset.from_list(rows),
        loss=MultipleNegativesRankingLoss(theirs, scale=1 / TEMPERATURE),
    )
    trainers = {}
    for name, trainer in {"rlkit": our_trainer, "sentence_transformers": their_trainer}.items():
        timer = Steps()
        trainer.add_callback(timer)
        trainers[name] = (trainer, timer)
    return trainers


def check_losses(trainers: dict[str, tuple[Any, Steps]], rows: list[dict[str, str]]) -> None:
    """Raise AssertionError unless both losses are equal on the first batch, without dropout."""
    batch = rows[:BATCH_SIZE]
    trainer = trainers["rlkit"][0]
    inputs = collate([candidates(row, i) for i, row in enumerate(batch)])
    encoder: SentenceTransformer = trainers["sentence_transformers"][0].model
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model.eval(), inputs)
        features = [encoder.preprocess([row[name] for row in batch]) for name in batch[0]]
        theirs = trainers["sentence_transformers"][0].loss.to(encoder.device)(
            [
                {k: v.to(encoder.device) for k, v in f.items() if isinstance(v, torch.Tensor)}
                for f in features
            ],
            None,
        )
    trainer.metrics.clear()
    assert abs(ours.item() - theirs.item()) < 1e-4, (ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=12, help="pairs of turns")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps per turn, the first of which is a warm-up"
    )
    options = parser.parse_args()
    tune_for_cpu()
    rows = make_rows(BATCH_SIZE * options.steps)
    times: dict[str, list[float]] = {}
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(rows, options.steps, folder)
        check_losses(trainers, rows)
        for pair in range(options.pairs + 1):  # the first pair is a warm-up
            order = list(trainers) if pair % 2 else list(reversed(trainers))
            medians = {}
            for name in order:
                trainer, timer = trainers[name]
                timer.seconds.clear()
                trainer.train()
                medians[name] = statistics.median(timer.seconds[1:])
                if pair:
                    times.setdefault(name, []).extend(timer.seconds[1:])
            if pair:
                pairs.append(round(medians["sentence_transformers"] / medians["rlkit"], 3))
    milliseconds = {name: round(1000 * statistics.median(values), 1) for name, values in times.items()}
    result = {
        "command": "python benchmarks/rank_step.py",
        "encoder": ENCODER,
        "queries_per_step": BATCH_SIZE,
        "passages_per_query": NEGATIVES + 1,
        "milliseconds_per_step": milliseconds,
        "ratio": round(milliseconds["sentence_transformers"] / milliseconds["rlkit"], 3),
        "ratio_by_pair": pairs,
        "threads": torch.get_num_threads(),
        "device": "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
