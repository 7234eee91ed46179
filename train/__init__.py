"""The command line and, built on the models, their training and evaluation."""
