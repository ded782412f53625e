"""Whole blocks, FFN neurons and key/value heads that are left out."""
