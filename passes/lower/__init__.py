"""Turn decisions the target has no plain operation for into ones it runs."""
