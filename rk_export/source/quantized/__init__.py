"""Quantized checkpoints as float ones, a module for each format."""
