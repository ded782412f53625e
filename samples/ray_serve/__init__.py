"""Bundles behind Ray Serve: see `app.py`."""
