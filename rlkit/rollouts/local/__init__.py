"""The engine that every machine has: transformers in the trainer's process."""
