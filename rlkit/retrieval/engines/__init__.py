"""Search engines behind one interface (`rlkit.retrieval.documents.SearchEngine`)."""
