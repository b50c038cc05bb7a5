"""Interrupt a sequence of operations on files, as a kill does."""

import os


def interrupt_after(patch, number, *names):
    """Let functions of `os` raise KeyboardInterrupt after `number` calls: a killed process does nothing more.

    Args:
        patch: pytest's MonkeyPatch.
        number: Number of calls, of all functions together, that succeed.
        names: Names of the functions.
    """
    calls = []

    def interrupted(function):
        def call(*args, **kwargs):
            if len(calls) == number:
                raise KeyboardInterrupt
            calls.append(args)
            return function(*args, **kwargs)

        return call

    for name in names:
        patch.setattr(os, name, interrupted(getattr(os, name)))
