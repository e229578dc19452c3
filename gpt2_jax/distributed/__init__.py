"""One run of several processes: detecting them, connecting them, agreeing, and ending together."""
