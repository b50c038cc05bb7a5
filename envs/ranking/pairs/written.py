"""Training rows that a language model writes: queries for documents, and passages of four grades for queries.

- few_shot: queries like the examples of the collection (Promptagator, arXiv 2209.11755)
- question, claim, title, keywords, web_search, free: the six types of queries of Tamber et al. (arXiv
  2502.19712)
- graded: passages for a training query that answer it fully, partly, not at all, or are about something else,
  as a list with targets 3, 2, 1, 0 (SyCL, arXiv 2503.23239)

A source has two functions: one for the prompts, and one that reads the replies. With the same
model, examples and options, the prompt and the seed of row i of a document depend only on the seed of the
run, the source, the document and i.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlkit.envs.ranking.pairs.filters import copied_share
from rlkit.envs.ranking.pairs.partial import Prompt, prompt_seed
from rlkit.envs.ranking.pairs.rows import PairRow, query_key
from rlkit.envs.ranking.pairs.selection import QueryExample
from rlkit.envs.ranking.pairs.writing import (
    INSTRUCTION,
    MAX_DOCUMENT_WORDS,
    MAX_QUERY_WORDS,
    is_refusal,
    read_passage,
    read_query,
    writing_prompt,
)
from rlkit.envs.ranking.prompts import prompt_line
from rlkit.retrieval.documents import Document, passage_text
from rlkit.retrieval.queries import JudgedQuery
from rlkit.words import first_words

if TYPE_CHECKING:
    from rlkit.rollouts.text_generation import Generation

FEW_SHOT, FREE, GRADED = "few_shot", "free", "graded"
_RULES = (
    "Cover the main idea of the document. The {kind} must make sense on its own, be shorter than 20 words, "
    "and not repeat long phrases from the document. Write only the {kind}, on one line."
)
INSTRUCTIONS = {
    FEW_SHOT: INSTRUCTION,
    "question": f"Write a question that the document below answers. {_RULES.format(kind='question')}",
    "claim": f"Write a claim that the document below supports. {_RULES.format(kind='claim')}",
    "title": f"Write a new title for the document below. {_RULES.format(kind='title')}",
    "keywords": (
        "List up to 5 general keywords that someone might search for to find the document below. Write only "
        "the keywords, on one line, separated by commas."
    ),
    "web_search": (
        "Write what someone would type into a web search engine to find the document below. "
        + _RULES.format(kind="query")
    ),
    FREE: (
        "Write a search query for the document below in any form: a question, a topic, a phrase, or "
        f"something one might say in a conversation. {_RULES.format(kind='query')}"
    ),
}
SIX_TYPES = tuple(source for source in INSTRUCTIONS if source != FEW_SHOT)
GRADES = {
    3: "that answers the query below fully and precisely",
    2: "that is closely related to the query below and answers part of it, but leaves part of it unanswered",
    1: "that is about the topic of the query below, but does not answer it",
    0: "on a different topic, of no use to someone searching for the query below",
}
_GRADED_PROMPT = (
    "Write a short passage, in the style of a web page or an encyclopedia article, {kind}. Write only the "
    "passage, in two or three sentences.\n\nQuery: {query}\nPassage:"
)


@dataclass
class WrittenRows:
    """The rows of one source, and how many replies were dropped.

    Attributes:
        rows: Rows.
        dropped: Number of dropped replies (of lists, if the source is "graded"), by reason.
    """

    rows: list[PairRow] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def query_prompts(
    source: str,
    documents: Iterable[Document],
    examples: Sequence[QueryExample],
    *,
    per_document: int,
    seed: int,
    instruction: str | None = None,
    document_words: int = MAX_DOCUMENT_WORDS,
) -> Iterator[Prompt]:
    """Yield the prompts for `per_document` queries of each document.

    Args:
        source: Name of the source, a key of `INSTRUCTIONS`.
        documents: Documents.
        examples: Examples to show, none of which is for one of the documents.
        per_document: Number of queries per document.
        seed: Random seed.
        instruction: Instruction; None for that of the source.
        document_words: Maximum number of words of a document in a prompt.
    """
    shown = [(example.text, example.query) for example in examples]
    for document in documents:
        messages = writing_prompt(
            passage_text(document),
            shown,
            instruction=instruction or INSTRUCTIONS[source],
            max_words=document_words,
        )
        for number in range(per_document):
            name = f"{source}/{document.id}/{number}"
            yield Prompt(name, messages, prompt_seed(seed, name))


def query_rows(
    source: str,
    documents: Iterable[Document],
    examples: Sequence[QueryExample],
    replies: Mapping[str, Generation],
    *,
    per_document: int,
) -> WrittenRows:
    """Return a pair for each query in the replies to `query_prompts`.

    Dropped are replies without a query, truncated queries, refusals, replies that continue the prompt with
    another document, queries of more than `MAX_QUERY_WORDS` words, those of the examples, which small models
    repeat, and repetitions for one document (`query_key`).

    Args:
        source, documents, examples, per_document: As in `query_prompts`.
        replies: Replies by prompt id; those of failed prompts are missing.
    """
    result = WrittenRows()
    example_keys = {query_key(example.query) for example in examples}
    for document in documents:
        keys: set[str] = set()
        for number in range(per_document):
            name = f"{source}/{document.id}/{number}"
            if name not in replies:
                result.dropped["failed"] += 1
                continue
            reply = replies[name]
            query = read_query(reply.text)
            key = query_key(query)
            if reply.truncated and (not query or read_query(reply.text.rpartition("\n")[0]) != query):
                result.dropped["truncated"] += 1
            elif not query:
                result.dropped["empty"] += 1
            elif is_refusal(reply.text):
                result.dropped["refusal"] += 1
            elif query.casefold().startswith("document:"):
                result.dropped["another document"] += 1
            elif first_words(query, MAX_QUERY_WORDS) != query:
                result.dropped["too long"] += 1
            elif key in example_keys:
                result.dropped["copy of an example"] += 1
            elif key in keys:
                result.dropped["duplicate"] += 1
            else:
                keys.add(key)
                passage = (passage_text(document),)
                result.rows.append(PairRow(name, query, passage, (1.0,), source, document.id))
    return result


def graded_prompts(queries: Iterable[JudgedQuery], seed: int) -> Iterator[Prompt]:
    """Yield the prompts for four passages of each query, one per grade."""
    for query in queries:
        for grade, kind in GRADES.items():
            name = f"{GRADED}/{query.id}/{grade}"
            content = _GRADED_PROMPT.format(kind=kind, query=prompt_line(query.text))
            yield Prompt(name, [{"role": "user", "content": content}], prompt_seed(seed, name))


def graded_rows(queries: Iterable[JudgedQuery], replies: Mapping[str, Generation], seed: int) -> WrittenRows:
    """Return a list of four passages with targets 3, 2, 1, 0 for each query, in random order.

    A list with an empty or repeated passage, a refusal or a failed prompt is dropped. A truncated passage is
    not: the passages of retrievers end anywhere, too.

    Args:
        queries: Queries.
        replies: Replies to `graded_prompts`, by prompt id; those of failed prompts are missing.
        seed: Random seed of the order.
    """
    result = WrittenRows()
    for query in queries:
        names = {grade: f"{GRADED}/{query.id}/{grade}" for grade in GRADES}
        if any(name not in replies for name in names.values()):
            result.dropped["failed"] += 1
            continue
        passages = {grade: read_passage(replies[name].text) for grade, name in names.items()}
        if not all(passages.values()):
            result.dropped["empty"] += 1
        elif any(is_refusal(replies[name].text) for name in names.values()):
            result.dropped["refusal"] += 1
        elif len(set(passages.values())) < len(passages):
            result.dropped["duplicate"] += 1
        else:
            grades = list(GRADES)
            random.Random(f"{seed} {GRADED} {query.id}").shuffle(grades)
            result.rows.append(
                PairRow(
                    f"{GRADED}/{query.id}",
                    query.text,
                    tuple(passages[grade] for grade in grades),
                    tuple(map(float, grades)),
                    GRADED,
                    answers=tuple(query.relevant),
                )
            )
    return result


def describe(source: str, written: WrittenRows) -> str:
    """Return the numbers of a source as a line: rows, queries, copied trigrams and dropped replies."""
    rows, num_dropped = written.rows, written.dropped.total()
    total = len(rows) + num_dropped
    reasons = ", ".join(f"{reason} {count / total:.1%}" for reason, count in written.dropped.items())
    dropped = f"dropped {num_dropped / max(total, 1):.1%}" + (f" ({reasons})" if reasons else "")
    if not rows:
        return f"{source}: no rows, {dropped}"
    num_queries = len({query_key(row.query) for row in rows})
    line = (
        f"{source}: {len(rows):,} rows, {num_queries:,} distinct queries (duplicates "
        f"{1 - num_queries / len(rows):.1%}), {dropped}"
    )
    if source == GRADED:  # its queries are the collection's
        return line
    copied = sum(map(copied_share, rows)) / len(rows)
    return f"{line}, trigrams of a query from its document {copied:.1%}"
