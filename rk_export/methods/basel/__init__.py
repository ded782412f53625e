"""Basis selection for target tasks (2405.15877)."""
