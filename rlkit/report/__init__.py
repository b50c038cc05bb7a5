"""The report: one self-contained HTML page of a run, or of several side by side."""

from rlkit.report.build import build_report

__all__ = ["build_report"]
