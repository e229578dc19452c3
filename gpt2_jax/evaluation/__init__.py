"""Evaluation: the numbers that people compare GPT-2s by, computed as the published protocols do."""
