"""What a model is: its family, its decoder, its matrices and their places, from the config alone."""
