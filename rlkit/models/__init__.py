"""Model weights and how they compute: loading, bundled models, attention, memory."""
