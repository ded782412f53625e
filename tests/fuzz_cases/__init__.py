"""Hostile files: valid ones of every kind, damaged at random and repeatably, and what they must not do."""
