"""What a run is told: its keys, the algorithms by name, and the parser of YAML and command line."""
