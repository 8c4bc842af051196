"""One HTML page that says how a training run went, made from the files of its folder."""

from stages.train_student.report.report import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
