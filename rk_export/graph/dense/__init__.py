"""The dense graph; the only folder that imports mobius."""
