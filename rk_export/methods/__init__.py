"""Published methods, a folder for each."""
