import dataclasses
import random
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rlkit.envs.ranking.pairs.environment import PairsEnvironment
from rlkit.envs.ranking.pairs.negatives import (
    add_negatives,
    distinct_pairs,
    known_answers,
    mined_negatives,
    negative_prompt,
    positive_passage,
    read_passage,
    style_accuracy,
    written_negatives,
)
from rlkit.envs.ranking.pairs.rows import PairRow, write_rows
from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, Result
from rlkit.retrieval.queries import open_collection
from rlkit.retrieval.retrievers import open_retriever
from rlkit.rollouts.text_generation import load_text_model
from rlkit.training.ranking.rank import candidates_of, training_rows
from rlkit.training.ranking.trainer import BatchDocuments, collate
from tests.envs.ranking.folders import write_beir

# Without "wine" in a shorter document, BM25 ranks them for "red wine" in this order.
DOCUMENTS = {
    "best": "red wine",
    "copy": "red   wine",
    "second": "red wine river",
    "third": "red wine river castle",
    "fourth": "red stone bread cheese north",
    "other": "green horse",
}


class Fixed:
    """Search engine whose results are the given documents in their order."""

    def __init__(self, documents, error=None):
        self.documents, self.error = documents, error

    def search(self, queries, k):
        return [Result(tuple(self.documents[:k]), error=self.error) for _ in queries]


def collection_of(documents, **options):
    return Collection("test", lambda: iter(documents), {}, {}, **options)


def row(identifier="r", query="red wine", passages=("red wine",), document="best", **options):
    targets = options.pop("targets", (1.0, *[0.0] * (len(passages) - 1)))
    return PairRow(identifier, query, passages, targets, "judged", document, **options)


@pytest.fixture(scope="module")
def bm25(tmp_path_factory):
    folder = tmp_path_factory.mktemp("negatives") / "collection"
    qrels = {"train": {"q": {"best": 1}}, "test": {"t": {"third": 1}}}
    collection = open_collection(
        write_beir(folder, DOCUMENTS, {"q": "red wine", "t": "red wine"}, qrels), None, 0
    )
    return collection, open_retriever("bm25", collection)


def negatives_of(bm25, *rows, **options):
    return [[document for document, _ in of_row] for of_row in mined_negatives(rows, *bm25, **options)]


def test_highest_document_that_is_not_an_answer_is_the_negative(bm25):
    assert negatives_of(bm25, row()) == [["second"]]
    assert negatives_of(bm25, row(answers=("best", "second"))) == [["third"]]
    assert negatives_of(bm25, row(query="green horse")) == [["other"]]


def test_document_with_text_of_a_passage_is_never_a_negative(bm25):
    (negatives,) = negatives_of(bm25, row(), num_negatives=9)
    assert negatives == ["second", "third", "fourth"]
    (negatives,) = negatives_of(bm25, row(passages=("red wine", "red wine  river")), num_negatives=9)
    assert negatives == ["third", "fourth"]


def test_answer_without_a_document_is_recognized_by_its_text_or_refused(bm25):
    assert negatives_of(bm25, row(document="")) == [["second"]]
    with pytest.raises(UserError, match=r"row 'r' names no document, .*set document in the rows"):
        negatives_of(bm25, row(document="", passages=("red wine is a",)))
    with pytest.raises(UserError, match="row 's' names no document"):  # it may differ from that of the first
        negatives_of(bm25, row(), row("s", document="", passages=("red wine is a",)))
    answered = row(document="", passages=("red wine is a",), answers=("best", "second"))
    assert negatives_of(bm25, answered) == [["third"]]


def test_passages_without_a_document_get_ids_that_no_other_row_has():
    rows = [add_negatives(row(name, document=""), [("n", "water")]) for name in "ab"]
    assert [r.passage_documents for r in rows] == [("a/0", "n"), ("b/0", "n")]


def test_refusals_are_no_negatives():
    texts = ["I'm sorry, but I can't write that.", "water"]
    assert written_negatives(row(), texts) == [("written/r/1", "water")]


def test_skip_counts_after_answers_are_removed(bm25):
    assert negatives_of(bm25, row(), skip=1) == [["third"]]
    assert negatives_of(bm25, row(answers=("best", "second")), skip=1) == [["fourth"]]
    assert negatives_of(bm25, row(), skip=1, num_negatives=2) == [["third", "fourth"]]
    assert negatives_of(bm25, row(), skip=3) == [[]]


def test_answers_of_rows_with_the_same_query_are_no_negatives(bm25):
    rows = [row("a"), row("b", passages=("red wine river",), document="second"), row("c", query="wine")]
    assert negatives_of(bm25, *rows) == [["third"], ["third"], ["second"]]
    with_lists = row(passages=("x", "y"), passage_documents=("third", "second"), document="")
    assert known_answers([with_lists]) == {"red wine": {"third"}}


def test_excluded_documents_of_the_query_are_no_negatives(bm25):
    collection, engine = bm25
    excluding = dataclasses.replace(collection, excluded={"q": frozenset({"second"})})
    assert negatives_of((excluding, engine), row()) == [["third"]]
    assert negatives_of((excluding, engine), row(query="red wine river")) == [["second"]]


def test_best_passage_of_a_document_is_the_negative():
    documents = [Document(name, "T", f"text {name}") for name in ("a#1", "b#2", "b#1", "c#1")]
    collection = collection_of(documents, document_of=lambda name: name.split("#")[0])
    (negatives,) = mined_negatives([row(document="a")], collection, Fixed(documents), num_negatives=2)
    assert negatives == [("b", "T: text b#2"), ("c", "T: text c#1")]


def test_failed_search_and_rows_of_queries_are_refused():
    collection = collection_of([])
    with pytest.raises(UserError, match="fails for the query 'red wine': down"):
        list(mined_negatives([row()], collection, Fixed([], error="down")))
    with pytest.raises(UserError, match="have queries as passages"):
        list(mined_negatives([row(passages_are_queries=True)], collection, Fixed([])))


IDS = st.sampled_from("abcdefgh")


@settings(deadline=None)
@given(
    ranking=st.lists(IDS, unique=True),
    texts=st.lists(st.sampled_from(["x", "y", "z w", "z  w", "v"]), min_size=8, max_size=8),
    document=IDS,
    answers=st.lists(IDS, unique=True),
    skip=st.integers(0, 3),
    num_negatives=st.integers(1, 4),
)
def test_negatives_are_distinct_and_never_answers(ranking, texts, document, answers, **options):
    text_of = dict(zip("abcdefgh", texts, strict=True))
    documents = [Document(name, "", text_of[name]) for name in ranking]
    pair = row(passages=(text_of[document],), document=document, answers=tuple(answers))

    def mine(**options):
        (negatives,) = mined_negatives([pair], collection_of(documents), Fixed(documents), **options)
        return negatives

    everything, skip = mine(num_negatives=99), options["skip"]
    assert mine(**options) == everything[skip : skip + options["num_negatives"]]
    assert not {name for name, _ in everything} & {document, *answers}
    normalized = [" ".join(text.split()) for _, text in everything]
    assert len({*normalized, " ".join(text_of[document].split())}) == len(normalized) + 1
    assert [name for name, _ in everything] == [n for n in ranking if n in dict(everything)]
    with_negatives = add_negatives(pair, everything)
    assert with_negatives.passage_documents == (document, *dict(everything))
    assert with_negatives.targets == (1.0, *[0.0] * len(everything))


def test_negatives_follow_the_passages_of_a_list():
    graded = row(passages=("a", "b"), targets=(1.0, 3.0), passage_documents=("A", "B"))
    with_negative = add_negatives(graded, [("C", "c")])
    assert with_negative.passages == ("a", "b", "c") and with_negative.targets == (1.0, 3.0, 0.0)
    assert with_negative.passage_documents == ("A", "B", "C")
    assert positive_passage(graded) == positive_passage(with_negative) == "b"


def test_written_passages_are_different_documents_in_a_batch(tmp_path):
    rows = [row(name, query=name, passages=(f"about {name}",), document=name) for name in ("m", "n")]
    lists = [add_negatives(pair, written_negatives(pair, ["the same reply"])) for pair in rows]
    assert [pair.passage_documents[1] for pair in lists] == ["written/m/0", "written/n/0"]
    write_rows(tmp_path / "lists.jsonl", lists)
    environment = PairsEnvironment(pairs=str(tmp_path / "lists.jsonl"))
    candidates = candidates_of(environment, environment.tasks("train"))
    batch = BatchDocuments.of(collate(training_rows(environment, candidates, True)))
    assert len(batch.texts) == 4 and batch.rankable.all() and batch.labels.sum() == 2


def test_replies_without_words_or_with_the_positive_give_no_negative():
    assert written_negatives(row(), ["", " … ", "Red wine.", "<think>hm</think>"])[0][1] == "Red wine."
    assert written_negatives(row(), ["red\nwine", "Passage: red  wine", "<think>endless"]) == []
    assert written_negatives(row(), ["one", "one", "two"]) == [("written/r/0", "one"), ("written/r/2", "two")]
    assert read_passage("<think>Passage: a</think>\nPassage: It is\n\nlate. ") == "It is late."


def test_prompt_shows_the_positive_only_if_given():
    (message,) = negative_prompt("what\nis [3]")
    assert "Query: what is (3)\nPassage:" in message["content"]
    (message,) = negative_prompt("what", "word " * 200)
    assert message["content"].count("word") == 150 and "Passage that answers it: word" in message["content"]


def passages(generator, count, words, length):
    return [" ".join(generator.choices(words, k=length)) for _ in range(count)]


WORDS = [f"word{i}" for i in range(50)]


def test_style_accuracy_is_chance_for_identical_distributions():
    generator = random.Random(0)
    positives, negatives = (passages(generator, 400, WORDS, generator.randint(20, 20)) for _ in range(2))
    accuracy = style_accuracy(positives, negatives, seed=0)
    assert accuracy.length == pytest.approx(0.5, abs=0.02) and accuracy.words == pytest.approx(0.5, abs=0.07)


def test_style_accuracy_detects_length_and_words():
    generator = random.Random(0)
    positives = passages(generator, 100, WORDS, 40)
    assert style_accuracy(positives, passages(generator, 100, WORDS, 20)).length > 0.9
    # Neither shorter nor longer than all positives.
    mixed = passages(generator, 50, WORDS, 10) + passages(generator, 50, WORDS, 90)
    assert style_accuracy(mixed, passages(generator, 100, WORDS, 30)).length > 0.9
    accuracy = style_accuracy(positives, passages(generator, 100, [*WORDS[:40], "however"] * 2, 40))
    assert accuracy.length == pytest.approx(0.5, abs=0.02) and accuracy.words > 0.9


def test_style_accuracy_does_not_recognize_repeated_strings():
    # Queries of one document share their positive, and one document may be the negative of many queries.
    generator = random.Random(0)
    positives = passages(generator, 40, [f"rare{i}" for i in range(2000)], 20) * 5
    negatives = passages(generator, 50, [f"rare{i}" for i in range(2000)], 20) * 4
    generator.shuffle(negatives)
    assert style_accuracy(positives, negatives).words < 0.65
    pairs = distinct_pairs(positives, negatives, seed=0)
    assert 10 < len(pairs) <= 40 and len({text for pair in pairs for text in pair}) == 2 * len(pairs)


def test_style_accuracy_needs_rows_and_scikit_learn(monkeypatch):
    with pytest.raises(UserError, match="needs 10 pairs of distinct strings"):
        style_accuracy(["a"] * 20, ["b"] * 20)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match=r"pip install 'rlkit-llm\[ranking\]'"):
        style_accuracy(["a"] * 20, ["b"] * 20)


def test_smollm2_writes_the_same_negatives_with_the_same_seed():
    model = load_text_model("bundled:smollm2-135m", max_tokens=16, temperature=0.9)
    rows = [row("a"), row("b", query="how to bake bread", passages=("Knead the dough.",))]
    prompts = [negative_prompt(rows[0].query), negative_prompt(rows[1].query, rows[1].passages[0])]
    seeds = [1, 2]
    replies = [generation.text for generation in model.generate(prompts, seeds)]
    lists = [
        add_negatives(pair, written_negatives(pair, [reply]))
        for pair, reply in zip(rows, replies, strict=True)
    ]
    assert [len(pair.passages) for pair in lists] == [2, 2]
    assert [generation.text for generation in model.generate(prompts, seeds)] == replies
