"""The dense model rewritten by a plan, layer by layer, recovered, and saved as a checkpoint."""
