"""Collections of documents, and of queries with judgments, by name."""
