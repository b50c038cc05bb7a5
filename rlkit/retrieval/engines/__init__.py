"""Search engines that implement `rlkit.retrieval.documents.SearchEngine`."""
