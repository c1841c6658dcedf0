"""The report of a run: one HTML file that needs nothing beside itself."""

from engine.report.render import write_report

__all__ = ["write_report"]
