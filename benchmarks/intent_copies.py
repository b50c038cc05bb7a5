"""What copies of the relevant snippets earn in `intent-v5`, compared with a description in one's own words.

Each row is one way to use the words of the relevant snippets, scored by the environment on the first test
tasks of its default collection. The reference is a sentence such as a person would write who has understood
the query: it lists what all relevant buildings share, with the phrases of the documents, and the towns in the
relevant snippets.

    python benchmarks/intent_copies.py
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkit.check.play import play
from rlkit.registry import load_environment
from rlkit.retrieval.collections.generated import BUILDERS, KINDS, MATERIALS, TOWNS, USES, Buildings
from rlkit.reward import call_reward

RESULT = Path(__file__).parent / "results" / "intent_copies.json"
NUM_TASKS = 60
SIZE, SEED = 2000, 0  # of the environment's default collection
SHOWN = 3  # the environment's default maximum of relevant snippets in a prompt
FORMS = ("{}", "built of {}", "put up by {}", "used today as {}", "near {}")
WORD = re.compile(r"\w+")
Task = Mapping[str, Any]


def split_snippets(task: Task) -> tuple[list[str], list[str]]:
    """Return the relevant and the irrelevant snippets of a task."""
    num_relevant = min(SHOWN, (len(task["relevant"]) + 1) // 2)
    return task["snippets"][:num_relevant], task["snippets"][num_relevant:]


def reference(task: Task, buildings: Buildings, relevant_ids: Sequence[str]) -> str:
    """Return a description in one's own words: the properties that all relevant buildings share."""
    facets = buildings.facets[[int(name.removeprefix("b")) for name in relevant_ids]]
    values = [sorted({int(value) for value in column}) for column in facets.T]
    shared = [facet for facet, facet_values in enumerate(values) if len(facet_values) == 1]
    if shared == [0]:  # a query with an alternative: "made of oak or of brick"
        shared += [facet for facet, facet_values in enumerate(values) if len(facet_values) == 2]
    relevant_snippets = " ".join(split_snippets(task)[0])
    parts = []
    for facet in shared:
        phrases: list[str] = []
        for value in values[facet]:
            if facet < len(FORMS) - 1:
                phrases += (KINDS, MATERIALS, BUILDERS, USES)[facet][value][0]
            else:
                towns = [buildings.town(value, number) for number in range(TOWNS)]
                phrases += [town for town in towns if town in relevant_snippets]
        parts.append(FORMS[facet].format(" or ".join(phrases)))
    return f"They were looking for a {' '.join(parts)}."


def copies(task: Task, random_numbers: random.Random) -> dict[str, str]:
    """Return descriptions by the way in which they use the words of the relevant snippets."""
    relevant, irrelevant = split_snippets(task)
    documents = [WORD.findall(snippet.lower()) for snippet in relevant]
    words = [word for document in documents for word in document]
    irrelevant_words = {word for snippet in irrelevant for word in WORD.findall(snippet.lower())}
    counts = {word: sum(word in document for document in documents) for word in words}
    exclusive = [word for word in counts if word not in irrelevant_words]
    rarest = sorted(exclusive, key=lambda word: (counts[word], -len(word)))
    most_frequent = sorted(exclusive, key=lambda word: -counts[word])
    interleaved = [part for i, word in enumerate(words) for part in (word, f"zzz{i}")[: 1 + (i % 3 == 2)]]
    variants = {
        "snippets copied": words,
        "words sorted": sorted(words),
        "words shuffled": random_numbers.sample(words, len(words)),
        "words reversed": words[::-1],
        "a nonsense word after every third": interleaved,
        "every second word": words[::2],
        "each word with the suffix -s": [f"{word}s" for word in words],
        "sorted, without the words of irrelevant snippets": sorted(exclusive),
        "the same, each word three times": [word for word in sorted(exclusive) for _ in range(3)],
        "the 10 rarest words": rarest[:10],
        "the 10 most frequent words": most_frequent[:10],
        "the 6 rarest words": rarest[:6],
        "the 6 most frequent words": most_frequent[:6],
        "the titles": [snippet.split(":")[0] for snippet in relevant],
    }
    return {name: " ".join(variant_words) for name, variant_words in variants.items()}


def main() -> None:
    """Score all descriptions and write the result."""
    environment = load_environment("intent-v5")
    tasks = list(environment.tasks("test", NUM_TASKS))
    judged = environment.collection.judged("test")
    buildings, random_numbers = Buildings(SIZE, SEED), random.Random(0)
    descriptions: list[dict[str, str]] = []
    for task in tasks:
        grades = judged[task["query_id"]]
        best_ids = [name for name, grade in grades.items() if grade == max(grades.values())]
        honest = {"the query": task["query"], "reference": reference(task, buildings, best_ids)}
        descriptions.append(honest | copies(task, random_numbers))
    means: dict[str, dict[str, float]] = {}
    for name in descriptions[0]:
        rows = play(environment, tasks, [[f"<intent>{variants[name]}</intent>"] for variants in descriptions])
        means[name] = {}
        for reward_name, reward in environment.rewards.items():
            scores = [call_reward(reward, row) or 0.0 for row in rows]
            means[name][reward_name] = round(sum(scores) / len(scores), 3)
            if name == "reference" and reward_name == "own_words":
                lowest = round(min(scores), 3)
    result = {"num_tasks": len(tasks), "lowest_own_words_of_the_reference": lowest, "means": means}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
