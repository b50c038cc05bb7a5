"""Retrieval: documents, search engines, judged collections, retrievers over them, and IR measures."""
