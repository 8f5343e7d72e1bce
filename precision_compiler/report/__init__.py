"""Plans and targets for people to read."""
