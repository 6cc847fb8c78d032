"""One HTML page per run, made from its artifacts alone: it opens from disk and asks nothing of the network."""

from danube_ray.report.page import write_report

__all__ = ["write_report"]
