"""The configuration of a run: its keys, the algorithm presets, and the parser of YAML and command line."""
