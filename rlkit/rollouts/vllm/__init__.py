"""vLLM in the trainer's process, and as servers."""
