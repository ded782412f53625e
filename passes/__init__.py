"""Passes over weights and graphs, and the numerics under them."""
