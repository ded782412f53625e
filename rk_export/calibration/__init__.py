"""What is known about the dense model: calibration text, second moments and gradients."""
