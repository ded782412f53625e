"""Model sources made from others: what they do not change is asked of the source that they wrap."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakSet

from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.report.records import Finding
from rk_export.source.stored import ModelSource


class DerivedSource(ModelSource):
    """A source with the folder, structure and sizes of another; authors override what differs.

    A prepared source stays prepared: everything that is not overridden goes through the wrapped object.

    Args:
        source: Any model source.
    """

    def __init__(self, source: ModelSource) -> None:
        # No super().__init__(): it would open the folder anew and lose what the wrapped source is.
        self._source = source
        self.folder, self.name, self.title = source.folder, source.name, source.title
        self.config, self.architecture = source.config, source.architecture
        self.variant, self.pruning = source.variant, source.pruning
        self.notices, self.changed = source.notices, source.changed
        self._done: WeakSet[nn.Module] = WeakSet()

    @property
    def source(self) -> ModelSource:
        """The source that is wrapped."""
        return self._source

    @property
    def findings(self) -> tuple[Finding, ...]:  # type: ignore[override]
        """What was done to the model on the way from its files."""
        return self._source.findings

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide what the tensors are, before any change."""
        return self._source.files

    @property
    def origin(self) -> tuple[Path, Path | None]:
        """What `open_source` opens the wrapped source by."""
        return self._source.origin

    def structure(self) -> str:
        """Return the fingerprint of names and shapes in the checkpoint."""
        return self._source.structure()

    def parameter_count(self) -> int:
        """Return the parameters of the dense model, tied weights once."""
        return self._source.parameter_count()

    def stored_bytes(self) -> int:
        """Return the bytes of the checkpoint's files."""
        return self._source.stored_bytes()

    def skeleton(self) -> PreTrainedModel:
        """Return the source's skeleton."""
        return self._source.skeleton()

    def tensor(self, key: str) -> Tensor:
        """Read one tensor as the source has it, by its name in the files."""
        return self._source.tensor(key)

    def load_layer(self, model: PreTrainedModel, index: int) -> nn.Module:
        """Fill one layer of a skeleton in float32, in canonical form, and return it."""
        return self._source.load_layer(model, index)

    def load_rest(self, model: PreTrainedModel) -> None:
        """Fill everything outside the layers."""
        self._source.load_rest(model)

    def _is_fresh(self, module: nn.Module) -> bool:
        """Whether this is the first time; what was changed in a layer since then stays as it is."""
        fresh = module not in self._done or any(item.is_meta for item in module.parameters())
        self._done.add(module)
        return fresh
