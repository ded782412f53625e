"""One module for each kin of model families: the names of their tensors, and what their configs say."""
