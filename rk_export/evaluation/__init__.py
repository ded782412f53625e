"""Perplexity, tasks and speed, of dense models and bundles side by side."""
