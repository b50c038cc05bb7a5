"""Training rows for retrievers: one format, generators that need no labels, and the environment `pairs-v1`."""
