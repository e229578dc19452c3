"""Plans for chips that need not be attached: compiles the training step for them and reads the program."""
