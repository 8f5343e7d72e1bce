"""Predict the error that every rounding would cause."""
