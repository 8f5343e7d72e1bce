"""Carry the assignment out on the graph."""
