"""Evaluation: models, and the answers of any system, scored with controls and intervals, as tables, plots and reports."""
