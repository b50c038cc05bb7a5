"""Training rows for retrievers: one format, generators without labels, and the environment `pairs-v1`."""
