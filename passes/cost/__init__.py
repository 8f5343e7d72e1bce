"""Predict the time that every choice would take on the target."""
