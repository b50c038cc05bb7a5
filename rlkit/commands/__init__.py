"""The command line: one module per sub-command. No other package imports this one."""
