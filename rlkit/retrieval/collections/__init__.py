"""Collections of documents, and of queries with relevance judgments, loaded by name."""
