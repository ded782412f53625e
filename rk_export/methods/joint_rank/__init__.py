"""Data-free joint rank-k approximation (2402.16319)."""
