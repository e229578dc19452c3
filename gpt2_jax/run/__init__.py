"""A training run: its directory, its initial state, its reports and its evaluations."""
