"""Query rewriting without training: baselines for `query-v2`, and a rewriter that sees the answer.

- Ensemble and fusion (GenQREnsemble, arXiv 2405.17658): a model is asked for keywords in ten ways. Ensemble:
  the query and all keywords are one query. Fusion: each list is a query, and their results are fused.
- Context-aware rewriting (CAR, arXiv 2308.16753): for training queries alone, the model sees a relevant
  document. What it copies from there is its leakage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

KEYWORDS = (
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
FORM = "{instruction} Write a few, separated by commas, and nothing else.\n\nQuery: {query}"
CONTEXT = (
    "The query below was sent to a search engine, and the document below answers it. Rewrite the query to "
    "say clearly what the user is looking for, without giving away the answer. Write only the new query.\n\n"
    "Document: {document}\n\nQuery: {query}"
)
N = 3
_WORD = re.compile(r"\w+")


def keywords(text: str) -> str:
    """The keywords of an answer in one line, without numbers and marks of a list, each once."""
    found = (re.sub(r"^[\s\-*•\d.)]+", "", part).strip() for part in re.split(r"[,;\n]", text))
    return ", ".join(dict.fromkeys(part for part in found if part))


def ensemble(query: str, expansions: Sequence[str]) -> str:
    """One query with all keywords, each once."""
    return " ".join([query, *dict.fromkeys(one for one in expansions if one)])


def leakage(rewritten: str, query: str, document: str) -> float:
    """The share of a new query's runs of three words that are the document's and not the old one's."""
    runs = [_runs(text) for text in (rewritten, query, document)]
    return sum(run in runs[2] and run not in runs[1] for run in runs[0]) / len(runs[0]) if runs[0] else 0.0


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return set(zip(*(words[i:] for i in range(N)), strict=False))
