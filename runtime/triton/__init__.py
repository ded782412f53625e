"""Answers of a bundle in Triton's Python backend: what the server hands over goes to one engine, pieces come back."""
