"""Evaluation: text metrics as `evaluate.Metric` modules that need no network."""
