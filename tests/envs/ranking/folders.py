"""Small collections in BEIR's layout."""

import json


def write_beir(folder, documents, queries, qrels):
    """Write a collection and return its path as a string.

    Args:
        folder: Folder to create.
        documents: Texts, or pairs of title and text, by document id.
        queries: Texts by query id.
        qrels: Grades by split, query and document.
    """
    (folder / "qrels").mkdir(parents=True)
    pairs = {name: ("", d) if isinstance(d, str) else d for name, d in documents.items()}
    rows = [{"_id": name, "title": title, "text": text} for name, (title, text) in pairs.items()]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    rows = [{"_id": name, "text": text} for name, text in queries.items()]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for split, judged in qrels.items():
        lines = [f"{query}\t{name}\t{g}" for query, grades in judged.items() for name, g in grades.items()]
        header = "query-id\tcorpus-id\tscore"
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return str(folder)
