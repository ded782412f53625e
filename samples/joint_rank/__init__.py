"""The parts of samples/joint_rank_paper.py, a module each."""
