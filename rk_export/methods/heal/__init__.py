"""Recovery: a short distillation of the compressed model against the dense one."""
