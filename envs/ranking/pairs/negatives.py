"""Hard negatives for rows of training pairs: from a retriever, or written by a language model.

These are the sources of "Don't Retrieve, Generate" (arXiv 2504.21015). Its third version reportedly finds
that written negatives train worse retrievers than mined ones. `style_accuracy` measures a possible reason,
which is our own hypothesis: negatives that can be told from positives without the query may teach style
instead of relevance.

A negative is a pair of the id of its document and its text.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlkit.envs.ranking.pairs.rows import PairRow, answer_ids
from rlkit.envs.ranking.pairs.writing import is_refusal, read_passage
from rlkit.envs.ranking.prompts import prompt_line
from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Query, SearchEngine, passage_text
from rlkit.retrieval.retrievers import excluded_by_text, search_depth, top_documents
from rlkit.words import words

Negative = tuple[str, str]

SEARCH_BATCH = 128  # queries per call of the retriever, whose results hold the texts of all documents
MAX_DUPLICATES = 20  # documents with the text of a passage of the row, for which more results are read
MAX_POSITIVE_WORDS = 150  # of a positive in a prompt
MIN_STYLE_ROWS, MAX_STYLE_ROWS, STYLE_FOLDS = 10, 5000, 5
MAX_STYLE_ACCURACY = 0.9  # above which negatives teach style

QUERY_PROMPT = """\
Write a short passage that looks like a search result for the query below but does not answer it. Stay on \
the topic of the query, use some of its terms, and sound plausible. Write only the passage.

Query: {query}
Passage:"""

POSITIVE_PROMPT = """\
The passage below answers the query. Write another passage, similar in topic, style and length, that does \
not answer the query. Write only the passage.

Query: {query}
Passage that answers it: {positive}
Passage that does not answer it:"""


@dataclass(frozen=True)
class StyleAccuracy:
    """Cross-validated accuracy of classifiers that tell positives from negatives; .5 is chance.

    Attributes:
        length: Accuracy of a classifier that sees only the number of words.
        words: Accuracy of a classifier that sees the bag of words.
    """

    length: float
    words: float


def check_rows(rows: Sequence[PairRow]) -> None:
    """Raise UserError if the passages are queries, for which no document is a negative."""
    if any(row.passages_are_queries for row in rows):
        raise UserError("negatives are documents, but these rows have queries as passages (PROP)")


def known_answers(rows: Sequence[PairRow]) -> dict[str, frozenset[str]]:
    """Return the ids of the documents that answer each query according to any of its rows, by query."""
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        answers[row.query] |= answer_ids(row)
    return {query: frozenset(ids) for query, ids in answers.items()}


def mined_negatives(
    rows: Sequence[PairRow],
    collection: Collection,
    engine: SearchEngine,
    *,
    num_negatives: int = 1,
    skip: int = 0,
) -> Iterator[list[Negative]]:
    """Yield the negatives of each row: the documents that rank highest for its query and do not answer it.

    The document of a row and its answers are not negatives, and neither is a document with the same text as
    one of these or as a passage of the row. The same holds for the answers and positives of other rows with
    the same query, and for documents that the collection excludes from the rankings of the query.

    Args:
        rows: Rows to find negatives for. Nothing else is searched.
        collection: Collection of the documents.
        engine: Retriever of the collection.
        num_negatives: Maximum number of negatives of a row; there are fewer if the engine finds no more.
        skip: Number of documents to skip at the top of what remains, since they may be answers, too.

    Raises:
        UserError: The passages of the rows are queries, a row's answer is unknown, or the search fails.
    """
    check_rows(rows)
    answers, positives = known_answers(rows), positives_by_query(rows)
    _check_answers(rows, collection)
    excluded = excluded_by_text(collection, answers)
    num_removed = max((len(answers[text] | excluded.get(text, frozenset())) for text in answers), default=0)
    k = skip + num_negatives + num_removed + MAX_DUPLICATES
    depth = search_depth(collection, k)
    for start in range(0, len(rows), SEARCH_BATCH):
        batch = rows[start : start + SEARCH_BATCH]
        results = engine.search([Query(row.query) for row in batch], depth)
        for row, result in zip(batch, results, strict=True):
            if result.error is not None:
                raise UserError(f"the retriever fails for the query {row.query[:60]!r}: {result.error}")
            removed = answers[row.query] | excluded.get(row.query, frozenset())
            documents = [
                (document.id, passage_text(document))
                for document in top_documents(collection, row.query, result, k)
            ]
            # A passage may be a part of its document, which another document repeats.
            answer_texts = [text for name, text in documents if name in removed]
            passages = [*row.passages, *positives[row.query], *answer_texts]
            yield _distinct(documents, passages)[skip : skip + num_negatives]


def _check_answers(rows: Sequence[PairRow], collection: Collection) -> None:
    """Raise UserError if a row's answer can be recognized neither by its id nor by its text."""
    unnamed = [row for row in rows if not answer_ids(row)]
    if not unnamed:
        return
    texts = {_normalized(passage_text(document)) for document in collection.documents()}
    for row in unnamed:
        if _normalized(positive_passage(row)) not in texts:
            raise UserError(
                f"row {row.id!r} names no document, and no document of {collection.name} has the text of its "
                "passage, so its answer could become a negative: set document in the rows"
            )


def positives_by_query(rows: Sequence[PairRow]) -> dict[str, list[str]]:
    """Return the passages with a target above 0 in all rows of each query."""
    positives: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        passages = zip(row.passages, row.targets, strict=True)
        positives[row.query] += [passage for passage, target in passages if target > 0]
    return positives


def _distinct(negatives: Sequence[Negative], passages: Sequence[str]) -> list[Negative]:
    """Return the negatives whose text differs from all of the passages and all negatives before them."""
    texts = set(map(_normalized, passages))
    distinct = []
    for document, passage in negatives:
        text = _normalized(passage)
        if text and text not in texts:
            distinct.append((document, passage))
            texts.add(text)
    return distinct


def _normalized(text: str) -> str:
    return " ".join(text.split())


def negative_prompt(query: str, positive: str | None = None) -> list[dict[str, str]]:
    """Return the chat messages that ask a model for a passage that does not answer a query.

    Args:
        query: Text of the query.
        positive: Passage that answers the query, to show to the model; None shows the query alone.
    """
    if positive is None:
        content = QUERY_PROMPT.format(query=prompt_line(query))
    else:
        content = POSITIVE_PROMPT.format(
            query=prompt_line(query), positive=prompt_line(positive, MAX_POSITIVE_WORDS)
        )
    return [{"role": "user", "content": content}]


def written_negatives(row: PairRow, replies: Sequence[str]) -> list[Negative]:
    """Return the negatives in a model's replies for a row; refusals and replies without words give none.

    Their documents get ids of their own: the passages are in no collection, and no two are the same document.
    """
    passages = ["" if is_refusal(reply) else read_passage(reply) for reply in replies]
    negatives = [(f"written/{row.id}/{i}", passage) for i, passage in enumerate(passages)]
    return _distinct(negatives, row.passages)


def add_negatives(row: PairRow, negatives: Sequence[Negative]) -> PairRow:
    """Return a row with negatives, whose target is 0, after its passages.

    Passages without a document get ids of their own, by which no other row has them.
    """
    documents = row.passage_documents
    if not documents and row.document:
        documents = (row.document,) * len(row.passages)
    elif not documents:
        documents = tuple(f"{row.id}/{i}" for i in range(len(row.passages)))
    return replace(
        row,
        passages=(*row.passages, *(passage for _, passage in negatives)),
        targets=(*row.targets, *(0.0 for _ in negatives)),
        passage_documents=(*documents, *(document for document, _ in negatives)),
    )


def positive_passage(row: PairRow) -> str:
    """Return the passage of a row with the highest target."""
    return row.passages[row.targets.index(max(row.targets))]


def style_accuracy(positives: Sequence[str], negatives: Sequence[str], seed: int = 0) -> StyleAccuracy:
    """Return how well positives and negatives can be told apart without the query.

    A logistic regression is cross-validated in 5 folds; the two strings of a pair are in the same fold. Each
    string is used once, because a bag of words would recognize it. At most 5,000 pairs are used.

    Args:
        positives: A positive of each row.
        negatives: A negative of each row, in the same order.
        seed: Random seed of the folds and of the sample.

    Raises:
        UserError: scikit-learn is not installed, or there are fewer than 10 pairs of distinct strings.
    """
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise UserError(
            "the accuracy of style classifiers needs scikit-learn: pip install 'rlkit-llm[ranking]'"
        ) from None
    pairs = distinct_pairs(positives, negatives, seed)
    if len(pairs) < MIN_STYLE_ROWS:
        raise UserError(f"the accuracy of style classifiers needs {MIN_STYLE_ROWS} pairs of distinct strings")
    passages = [passage for pair in pairs for passage in pair]
    labels = np.tile([1, 0], len(pairs))
    groups = np.repeat(np.arange(len(pairs)), 2)
    lengths = np.log1p([len(words(passage)) for passage in passages])
    # With the square, negatives that are neither short nor long are recognized, too.
    length_features = np.stack([lengths, lengths**2], axis=1)
    # Hashed words need no vocabulary, which would be empty for passages without words.
    word_features = HashingVectorizer(analyzer=words, n_features=2**16, alternate_sign=False)
    folds = GroupKFold(STYLE_FOLDS, shuffle=True, random_state=seed)
    classifiers = (
        (make_pipeline(StandardScaler(), LogisticRegression()), length_features),
        (LogisticRegression(C=10.0, max_iter=1000), word_features.transform(passages)),
    )
    accuracies = [
        float(np.mean(cross_val_score(classifier, features, labels, groups=groups, cv=folds)))
        for classifier, features in classifiers
    ]
    return StyleAccuracy(*accuracies)


def distinct_pairs(positives: Sequence[str], negatives: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """Return at most `MAX_STYLE_ROWS` random pairs of a positive and a negative, without repeated strings."""
    pairs = list(zip(positives, negatives, strict=True))
    random.Random(seed).shuffle(pairs)
    distinct: list[tuple[str, str]] = []
    strings: set[str] = set()
    for positive, negative in pairs:
        if strings.isdisjoint((positive, negative)) and len(distinct) < MAX_STYLE_ROWS:
            distinct.append((positive, negative))
            strings |= {positive, negative}
    return distinct
