"""Find the fastest assignment within the budget."""
