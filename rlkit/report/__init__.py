"""Reports: a self-contained HTML page about one run, or about several side by side."""

from rlkit.report.build import build_report

__all__ = ["build_report"]
