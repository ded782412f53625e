"""A model as it comes: found, opened, dequantized and named as transformers names it, one layer at a time."""
