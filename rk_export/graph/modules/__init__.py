"""What stands for the rewritten PyTorch modules while the graph is traced, one stored form a file."""
