"""Operators: tensors in, tensors out. Nothing here knows of rewards, models or trainers."""
