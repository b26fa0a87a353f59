"""What works on a family: each command is tried on a tiny model, and what it says is kept."""
