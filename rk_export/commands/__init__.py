"""The public functions, a command each, put together from the stages."""
