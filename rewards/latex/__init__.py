r"""Read and compare mathematical answers in LaTeX or plain text.

`tokens` splits a string, `parser` builds the nodes of `nodes`, `values` evaluates them, and `compare`
decides whether two answers are equal. Numbers are compared exactly: as fractions, or with as many digits as
their size requires. Formulas are compared by their values at random points.
"""
