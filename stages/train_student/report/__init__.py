"""Report page of a training run: one HTML file, made from the files of the run's folder."""

from stages.train_student.report.report import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
