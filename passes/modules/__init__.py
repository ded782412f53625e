"""What stands in a PyTorch model after the weight passes."""
