"""What is remarkable about a model: which experts it cannot do without, and why."""
