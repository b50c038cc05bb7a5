"""Pairs from the structure of pages: ICT, BFS and WLP (arXiv 2002.03932), and independent cropping.

    ict    a sentence; the title and the passage that it is taken from, usually without the sentence
    bfs    a sentence of the first section; a passage of the same page
    wlp    a sentence of the first section of page A; a passage of a page that links to A
    crop   a span of a page; the title and another span, drawn independently (Contriever)

Row i of a page depends on the seed, the page and i alone, and that of WLP also on the pages that link to it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product

from rlkit.envs.ranking.pairs.pages import Page, iterate_sentences, linking_pages, sentences
from rlkit.envs.ranking.pairs.rows import PairRow
from rlkit.words import has_unspaced, words

MIN_QUERY_WORDS = 4  # shorter sentences, such as "See below.", say nothing about their page
# ORQA (arXiv 1906.00300) keeps the sentence in 10% of the passages, so that matching words also count.
ICT_KEEP = 0.1
CROP_SHARES = (0.1, 0.5)  # shortest and longest span of independent cropping, as shares of the page


def ict(pages: Sequence[Page], seed: int, per_document: int, keep: float = ICT_KEEP) -> Iterator[PairRow]:
    """Yield rows of the inverse cloze task; at most one for each sentence of a page.

    Args:
        pages: Pages of the collection.
        seed: Random seed.
        per_document: Maximum number of rows per page.
        keep: Probability with which the passage keeps the sentence.
    """
    for page in pages:
        rng = _rng(seed, "ict", page.id)
        candidates = [
            (sentence, passage)
            for sentence, passage in iterate_sentences(page.passages, MIN_QUERY_WORDS)
            if len(sentences(passage)) > 1
        ]
        rng.shuffle(candidates)
        for i, (sentence, passage) in enumerate(candidates[:per_document]):
            # Drawn for the sentence, so that the other rows of the page do not depend on `keep`.
            is_kept = _rng(seed, "keep", page.id, sentence).random() < keep
            parts = [part for part in sentences(passage) if is_kept or part != sentence]
            if parts:
                yield _pair("ict", page, i, sentence, _with_title(page, " ".join(parts)))


def bfs(pages: Sequence[Page], seed: int, per_document: int) -> Iterator[PairRow]:
    """Yield rows of body first selection. A passage that contains the sentence is not used.

    The query of a page with one section is its title, and the passage is without it.

    Args:
        pages: Pages of the collection.
        seed: Random seed.
        per_document: Maximum number of rows per page.
    """
    for page in pages:
        queries = _summary(page)
        is_title = queries == [page.title]
        # Split once: a page may have thousands of pairs of a sentence and a passage.
        sentences_of = {passage: set(sentences(passage)) for passage in page.passages}
        candidates = [
            (query, passage)
            for query, passage in product(queries, page.passages)
            if query not in sentences_of[passage]
        ]
        _rng(seed, "bfs", page.id).shuffle(candidates)
        for i, (query, passage) in enumerate(candidates[:per_document]):
            yield _pair("bfs", page, i, query, passage if is_title else _with_title(page, passage))


def wlp(pages: Sequence[Page], seed: int, per_document: int) -> Iterator[PairRow]:
    """Yield rows of wiki link prediction. The answers of a query are its page and all that link to it.

    Args:
        pages: Pages of the collection.
        seed: Random seed.
        per_document: Maximum number of rows per page.
    """
    linking = linking_pages(pages)
    for page in pages:
        sources = [source for source in linking[page.id] if source.passages]
        candidates = list(product(_summary(page), sources))
        _rng(seed, "wlp", page.id).shuffle(candidates)
        answers = (page.id, *(source.id for source in linking[page.id]))
        for i, (sentence, source) in enumerate(candidates[:per_document]):
            passage = _rng(seed, "wlp", page.id, i).choice(source.passages)
            yield PairRow(
                f"wlp/{page.id}/{i}",
                sentence,
                (_with_title(source, passage),),
                (1.0,),
                "wlp",
                page.id,
                passage_documents=(source.id,),
                answers=answers,
            )


def crop(pages: Sequence[Page], seed: int, per_document: int) -> Iterator[PairRow]:
    """Yield rows of independent cropping. The two spans of a row may overlap.

    Args:
        pages: Pages of the collection.
        seed: Random seed.
        per_document: Number of rows per page; pages of fewer than twice `MIN_QUERY_WORDS` words have none.
    """
    for page in pages:
        text = " ".join(page.passages)
        if len(words(text)) < 2 * MIN_QUERY_WORDS:
            continue
        for i in range(per_document):
            rng = _rng(seed, "crop", page.id, i)
            query, passage = _span(text, rng), _span(text, rng)
            yield _pair("crop", page, i, query, _with_title(page, passage))


GENERATORS = {"ict": ict, "bfs": bfs, "wlp": wlp, "crop": crop}


def _rng(seed: int, *key: object) -> random.Random:
    """Return a random generator that depends on the seed and the key alone."""
    return random.Random(" ".join(map(str, (seed, *key))))


def _pair(source: str, page: Page, number: int, query: str, passage: str) -> PairRow:
    return PairRow(f"{source}/{page.id}/{number}", query, (passage,), (1.0,), source, page.id)


def _with_title(page: Page, passage: str) -> str:
    """Return a passage as rankers see it; see `rlkit.retrieval.documents.passage_text`."""
    return f"{page.title}: {passage}" if page.title else passage


def _summary(page: Page) -> list[str]:
    """Return the queries that stand for a page: sentences of its first section, or its title.

    A page with one section has no summary but its title.
    """
    sections = [section for section in page.sections if section.passages]
    if len(sections) > 1:
        return [sentence for sentence, _ in iterate_sentences(sections[0].passages, MIN_QUERY_WORDS)]
    return [page.title] if page.title else []


def _span(text: str, rng: random.Random) -> str:
    """Return a random span of whole words, or of characters in scripts without spaces."""
    separator = "" if has_unspaced(text) else " "
    parts = text.split(separator) if separator else list(text)
    shortest, longest = (max(round(share * len(parts)), MIN_QUERY_WORDS) for share in CROP_SHARES)
    length = rng.randint(shortest, longest)
    start = rng.randint(0, len(parts) - length)
    return separator.join(parts[start : start + length])
