"""What can be searched and judged: documents, engines, collections, retrievers, measures."""
