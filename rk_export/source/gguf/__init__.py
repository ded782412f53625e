"""GGUF files as Hugging Face folders."""
