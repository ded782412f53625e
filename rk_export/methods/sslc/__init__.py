"""Sparse and low rank together under the inputs (2510.26446)."""
