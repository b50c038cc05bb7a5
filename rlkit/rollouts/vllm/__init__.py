"""vLLM engines: in the trainer's process, and on servers."""
