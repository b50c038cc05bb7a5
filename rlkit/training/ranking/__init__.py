"""Training an encoder to rank documents."""
