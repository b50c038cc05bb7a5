"""The default engine, which needs no extra installation: transformers in the trainer's process."""
