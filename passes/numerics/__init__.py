"""Pure tensor functions; the passes are thin wrappers around them."""
