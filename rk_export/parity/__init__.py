"""Each step from the files of a model to the running bundle, compared with the one before it."""
