"""The optimizers, and what a training run is from an empty folder to a report."""
