"""Query rewriting without training: baselines for `query-v4`, and a rewriter that sees a relevant document.

- Ensemble and fusion (GenQREnsemble, arXiv 2405.17658): a model writes keywords for each of ten instructions.
  An ensemble appends all keywords to the query. Fusion runs the query and each list of keywords as separate
  queries and fuses their rankings.
- Context-aware rewriting (CAR, arXiv 2308.16753), only for training queries: the model sees a relevant
  document. `leakage` and `word_leakage` measure how much it copies from the document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlkit.words import keywords, ngrams

KEYWORD_INSTRUCTIONS = (
    "List words and short phrases that a document answering this query would use.",
    "Suggest search terms that would make this query retrieve more relevant documents.",
    "List synonyms and related terms for this query.",
    "Which keywords would a librarian add to this query?",
    "Expand this query with terms that make it more precise.",
    "Write the technical terms that experts would use for the topic of this query.",
    "Which words would appear in the title of a document that answers this query?",
    "Give terms that distinguish what this query means from what it does not mean.",
    "Imagine a document that answers this query and list its most important words.",
    "Add words to this query so that a keyword search engine finds the answer.",
)
KEYWORD_PROMPT = "{instruction} Write a few, separated by commas, and nothing else.\n\nQuery: {query}"
CONTEXT_PROMPT = (
    "The query below was sent to a search engine, and the document below answers it. Rewrite the query to "
    "say clearly what the user is looking for, without giving away the answer. Write only the new query.\n\n"
    "Document: {document}\n\nQuery: {query}"
)
NGRAM_LENGTH = 3  # words


def clean_keywords(text: str) -> str:
    """Return the distinct keywords of a reply, separated by commas, without list numbers and bullets."""
    parts = (re.sub(r"^[\s\-*•\d.)]+", "", part).strip() for part in re.split(r"[,;，、；\n]", text))
    return ", ".join(dict.fromkeys(part for part in parts if part))


def ensemble(query: str, expansions: Sequence[str]) -> str:
    """Return the query followed by the distinct, non-empty expansions."""
    return " ".join([query, *dict.fromkeys(expansion for expansion in expansions if expansion)])


def leakage(rewritten: str, query: str, document: str) -> float:
    """Return the fraction of the rewritten query's trigrams that come from the document, in [0, 1].

    Trigrams that are also in the original query do not count as leaked.
    """
    rewritten_ngrams, document_ngrams, query_ngrams = (
        set(ngrams(text, NGRAM_LENGTH)) for text in (rewritten, document, query)
    )
    if not rewritten_ngrams:
        return 0.0
    return len((rewritten_ngrams & document_ngrams) - query_ngrams) / len(rewritten_ngrams)


def word_leakage(rewritten: str, query: str, document: str) -> float:
    """Return the fraction of the rewritten query's new words that occur in the document, in [0, 1].

    New words are the distinct `rlkit.words.keywords` that are not in the original query. BM25 ignores the
    order of words, so a rewrite can leak the document without sharing a trigram with it.
    """
    new_words = set(keywords(rewritten)).difference(keywords(query))
    if not new_words:
        return 0.0
    return len(new_words.intersection(keywords(document))) / len(new_words)
