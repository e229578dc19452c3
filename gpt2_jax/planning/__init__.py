"""Plans: compiles the training step for chips that need not be attached and reads its cost from the program."""
