"""One training loop, its state on disk, and the losses that it lowers."""
