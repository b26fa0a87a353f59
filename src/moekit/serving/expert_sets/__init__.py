"""Expert set files: the experts of a task for every budget, found again from a prompt."""
