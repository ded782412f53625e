"""Exact reparameterizations: the function of a layer stays, its weights become easier to quantize."""
