"""The family report and the model cards."""
