"""The dense graph of every family, built from mobius' components; the only package that imports mobius."""
