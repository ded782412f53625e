"""Recovery at work: text is taken, and the compressed model is trained towards its teacher on it."""

from __future__ import annotations

from dataclasses import replace

from rk_export.calibration.streamed_moments import calibration_tokens
from rk_export.errors import InputError
from rk_export.methods.base import Method, Work
from rk_export.methods.heal.distil import heal
from rk_export.methods.heal.options import HealOptions
from rk_export.options.recipe import Recipe
from rk_export.rewrite.apply import Rewritten
from rk_export.source.protocol import Source


class Heal(Method[HealOptions]):
    """Distils the teacher's next-token distribution into the compressed model."""

    @property
    def doing(self) -> str:
        """What it does in its stage, for the log."""
        return f"{self.options.steps} steps towards the dense model"

    def check(self, source: Source, recipe: Recipe) -> None:
        """Refuse encoders, and recovery without text."""
        if source.architecture.is_encoder or not recipe.calibration.uses_text:
            raise InputError(
                "recovery trains a decoder on text",
                where="heal",
                fix="set calibration.text to self or to a file",
            )

    def recover(self, rewritten: Rewritten, teacher: Source, work: Work) -> Rewritten:
        """Train in place; the state stays until the bundle is there, so a failed export loses nothing."""
        wanted = self.options.steps * self.options.batch_tokens
        calibration = replace(work.recipe.calibration, tokens=wanted)
        tokens = calibration_tokens(work.source, calibration, work.device)
        result = heal(rewritten, teacher, tokens, self.options, device=work.device, state=work.state)
        return replace(rewritten, findings=(*rewritten.findings, result.finding))


METHOD = Heal
