"""The files of a bundle: configs of the runtimes, model card, proof and report."""
