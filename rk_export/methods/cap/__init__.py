"""Global rank and sparsity optimization (2505.03801)."""
