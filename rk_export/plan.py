"""What is done to each site of a model, as frozen data that can be saved, read, edited and applied again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rk_export.atomic import atomic_file
from rk_export.errors import FieldError, InputError
from rk_export.json_codec import Float, from_json, load_json, to_json
from rk_export.matrix_id import MatrixId
from rk_export.options.quantization import QuantSpec
from rk_export.options.recipe import Recipe

PLAN_MARK = "rk_export_plan"
PLAN_VERSION = 2


@dataclass(frozen=True)
class SitePlan:
    """One group of matrices in one layer.

    Args:
        site: Name, e.g. ``layers.3.qk``.
        layer: Decoder layer index.
        members: Roles in stacking order.
        paths: Module path of each member, relative to the layer.
        form: `dense` keeps the matrices, `joint` is one factor pair, `per_head` one per KV group, `identity` is
            k rows of the stacked matrix itself and coefficients for the others, `sparse` a factor pair plus a
            sparse matrix (2505.03801).
        rank: Inner dimension of each factor pair; 0 when dense, and where a sparse matrix stands alone.
        quant: Quantization of the matrix or of both factors; None keeps floats.
        reason: Why a site is not what was asked for: it stays dense, or in floats; empty otherwise.
        correction: Rank of a float branch that corrects the quantization error of a dense matrix; 0 for none.
        runner_up: What the planner would have chosen next and what it would have cost; empty without a budget.
        entries: Of the sparse form: how many entries the sparse matrix has, those in full columns included.
        carried: `quant` says how the checkpoint stores the matrices, and their codes are taken over as they are.
    """

    site: str
    layer: int
    members: tuple[str, ...]
    paths: tuple[str, ...]
    form: Literal["dense", "joint", "per_head", "identity", "sparse"]
    rank: int
    quant: QuantSpec | None
    reason: str = ""
    correction: int = 0
    runner_up: str = ""
    entries: int = 0
    carried: bool = False

    @property
    def matrices(self) -> tuple[MatrixId, ...]:
        """The members' matrices."""
        return tuple(MatrixId(self.layer, path) for path in self.paths)

    def __post_init__(self) -> None:
        if self.form not in ("dense", "joint", "per_head", "identity", "sparse"):
            raise FieldError(
                f"unknown form {self.form!r}",
                where=self.site,
                fix="choose dense, joint, per_head, identity or sparse",
            )
        if self.correction < 0 or (self.correction and (self.form != "dense" or self.quant is None)):
            raise FieldError(
                f"a correction of rank {self.correction} does not fit",
                where=self.site,
                fix="only dense quantized matrices are corrected",
            )
        if len(self.members) != len(self.paths):
            raise FieldError(
                f"{len(self.members)} members but {len(self.paths)} paths",
                where=self.site,
                fix="name one path for each member",
            )
        fits = self.form == "sparse" or (self.form == "dense") == (self.rank == 0)
        if not isinstance(self.rank, int) or not fits or self.rank < 0:
            raise FieldError(
                f"rank {self.rank} does not fit the form {self.form!r}",
                where=self.site,
                fix="dense sites have rank 0, factorized ones at least 1",
            )
        if self.entries < 0 or (self.entries and self.form != "sparse"):
            raise FieldError(
                f"{self.entries} sparse entries do not fit the form {self.form!r}",
                where=self.site,
                fix="only the sparse form has entries, 0 or more",
            )
        if self.carried and (self.form != "dense" or self.quant is None or self.correction):
            raise FieldError(
                "codes are carried over by dense quantized matrices only, and not corrected",
                where=self.site,
                fix="set carried to false",
            )
        if self.form == "sparse" and not self.rank and self.quant is not None:
            raise FieldError(
                "a sparse matrix alone has no factors to quantize",
                where=self.site,
                fix="set its quant to null",
            )
        if self.form == "sparse" and len(self.members) != 1:
            raise FieldError(
                f"{len(self.members)} members in the sparse form",
                where=self.site,
                fix="give every matrix a site of its own",
            )


@dataclass(frozen=True)
class LayerShape:
    """What one layer loses before its sites are rewritten; None leaves a dimension as it is.

    Args:
        layer: Decoder layer index.
        ffn_width: Neurons of the MLP that stay.
        value_dim: Width of a value head.
        kv_groups: Key/value heads that stay, ascending, each with its query heads.
    """

    layer: int
    ffn_width: int | None = None
    value_dim: int | None = None
    kv_groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        where = f"shapes: layer {self.layer}"
        for name in ("ffn_width", "value_dim"):
            width = getattr(self, name)
            if width is not None and (not isinstance(width, int) or width < 1):
                raise FieldError(f"{name} {width!r}", where=where, fix="give a whole number of at least 1")
        kept = self.kv_groups
        if kept is not None and (
            not kept
            or not all(isinstance(group, int) and group >= 0 for group in kept)
            or list(kept) != sorted(set(kept))
        ):
            raise FieldError(
                f"kv_groups {list(kept)}",
                where=where,
                fix="list the groups that stay, ascending, at least one",
            )
        if (self.ffn_width, self.value_dim, self.kv_groups) == (None, None, None):
            raise FieldError("nothing changes", where=where, fix="leave the layer out of the shapes")


@dataclass(frozen=True)
class Pruning:
    """The structures that a model keeps, alike in all its blocks; the numbers of `Plan.sites` are those afterwards.

    Args:
        blocks: Indices of the blocks that stay in the dense model, ascending.
        ffn_width: Neurons of every MLP that stay; None keeps all.
        kv_groups: Key/value heads that stay, a tuple for each kept block, ascending, all of one length; empty
            keeps all.
    """

    blocks: tuple[int, ...]
    ffn_width: int | None = None
    kv_groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0:
            raise FieldError(
                f"blocks {list(self.blocks)}",
                where="pruning",
                fix="list the blocks that stay, ascending, at least one",
            )
        if self.ffn_width is not None and self.ffn_width < 1:
            raise FieldError(f"ffn_width {self.ffn_width}", where="pruning", fix="give at least 1")
        sizes = {len(kept) for kept in self.kv_groups}
        if self.kv_groups and (len(self.kv_groups) != len(self.blocks) or len(sizes) != 1 or 0 in sizes):
            raise FieldError(
                "kv_groups of different length, or not one tuple for each block that stays",
                where="pruning",
                fix="keep as many key/value heads in every block",
            )


@dataclass(frozen=True)
class Plan:
    """What becomes of every matrix of one model structure; it names no machine.

    Args:
        model_type: The architecture, as in the model's config.
        structure: Fingerprint of the config's shapes; a plan applies to equal structures only.
        recipe: What was asked for.
        sites: What was decided, site by site.
        table: Format of the embedding, and of an output projection of its own; None for floats.
        shapes: The layers that lose dimensions, each once.
        predicted_loss: Increase of the mean loss that a budget's planner predicted, in nats per token; None where
            nothing was predicted.
        pruning: What whole structures the model loses first; None for none.
    """

    model_type: str
    structure: str
    recipe: Recipe
    sites: tuple[SitePlan, ...]
    table: QuantSpec | None
    shapes: tuple[LayerShape, ...] = ()
    predicted_loss: Float | None = None
    pruning: Pruning | None = None

    def __post_init__(self) -> None:
        layers = [shape.layer for shape in self.shapes]
        if twice := {layer for layer in layers if layers.count(layer) > 1}:
            raise FieldError(
                f"layer {min(twice)} has two entries", where="shapes", fix="give each layer one entry"
            )

    def of_layer(self, layer: int) -> tuple[SitePlan, ...]:
        """Return the sites of one layer."""
        return tuple(site for site in self.sites if site.layer == layer)

    def shape_of(self, layer: int) -> LayerShape | None:
        """Return what a layer loses, or None where it keeps its shape."""
        return next((shape for shape in self.shapes if shape.layer == layer), None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {PLAN_MARK: PLAN_VERSION, **to_json(self)}

    @classmethod
    def from_json(cls, data: Any, *, where: str = "plan") -> Plan:
        """Build a plan from `to_json`'s dictionary.

        Raises:
            InputError: If the version is unknown or a field is missing, unknown or out of range.
        """
        if not isinstance(data, Mapping) or data.get(PLAN_MARK) != PLAN_VERSION:
            raise InputError(
                f"not a version {PLAN_VERSION} plan",
                where=where,
                fix="write one with `rk-export plan MODEL -o plan.json`",
            )
        stored = {key: value for key, value in data.items() if key != PLAN_MARK}
        return from_json(cls, stored, where, fix="correct it, or write the plan anew with `rk-export plan`")

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            InputError: If the file is missing, is not JSON or is not a plan.
        """
        return cls.from_json(load_json(path, fix="name a plan file"), where=str(path))
