"""What is differentiated where a model predicts no next token."""

from __future__ import annotations

import torch
from torch import Tensor

from rk_export.calibration.text_run import Objective, TextRun


def output_error(run: TextRun, seed: int = 0) -> Objective:
    """Return the objective of an encoder: its hidden states along a random direction, relative to how much they differ.

    So half of the mean square of a change of it, over directions, is half the squared relative error of the states:
    the outer products of its gradients are the Gauss-Newton matrix of that error.

    Args:
        run: A text that has run forward.
        seed: Of the directions.
    """
    states = torch.cat(list(run.logits()))
    spread = (states - states.mean(0)).square().sum(1).mean().sqrt()
    along = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed)) / spread.cpu()

    def error(output: Tensor, where: slice) -> Tensor:
        return (output * along[where].to(output.device)).sum()

    return error
