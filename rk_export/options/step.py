"""The base of every step of a recipe, and of the methods that are steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.ranks import Budget

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

    from rk_export.options.recipe import Recipe

# When a step works. The first two may stand in either order: preparations are exact.
Stage = Literal["prune", "prepare", "decide", "quantize", "correct", "recover"]
STAGES: tuple[Stage, ...] = ("prune", "prepare", "decide", "quantize", "correct", "recover")


@dataclass(frozen=True)
class Step:
    """One step of a recipe; frozen, and validated on construction.

    A subclass says by class attributes how the step goes together with everything else, so that nothing outside
    its file has to know which step it is.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    # The field that a value stands for which is no mapping: `prepare: [fold]`.
    bare: ClassVar[str | None] = None
    # Whether a recipe may hold it more than once.
    repeats: ClassVar[bool] = False
    # Whether the shapes of the model alone tell the sizes of what it leaves.
    sized_by_shapes: ClassVar[bool] = True
    # Whether it judges the outputs of matrices by statistics, or needs text for anything else.
    weighs_outputs: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False

    def check_with(self, recipe: Recipe) -> None:
        """Refuse other steps and settings that contradict it.

        Raises:
            InputError: Names the contradiction.
        """

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        raise NotImplementedError

    def with_amount(self, budget: Budget) -> Step:
        """Return the step at another amount; only steps that decide every matrix hold one.

        Raises:
            InputError: If the step cannot be given this amount.
        """
        raise FieldError(
            f"the step {self.name} takes no {budget.name}",
            where=budget.flag,
            fix="drop it, or take another recipe",
        )

    def with_texts(self, files: tuple[Path, ...]) -> Step:
        """Return the step with the paths of those of its texts that are among some files, by content."""
        return self

    @property
    def budget(self) -> Budget | None:
        """What the matrices may cost together, where the step itself says so."""
        return None

    @property
    def json_tag(self) -> str:
        """The name under which its fields are saved."""
        return self.name

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read one object whose only key names the step."""
        from pydantic_core import core_schema

        if not hasattr(cls, "name"):
            kinds: tuple[type[Step], ...] = import_module("rk_export.options.kinds").step_kinds()  # above us
            known = {
                kind.name: core_schema.typed_dict_field(handler.generate_schema(kind), required=False)
                for kind in kinds
            }
            table = core_schema.typed_dict_schema(known, extra_behavior="forbid")
            return core_schema.no_info_after_validator_function(_only, table)
        return core_schema.no_info_before_validator_function(cls._as_mapping, handler(source))

    @classmethod
    def _as_mapping(cls, data: Any) -> Any:
        """Return what a file says of the step as a mapping from its fields' names."""
        if data is None:
            return {}
        if cls.bare is not None and not isinstance(data, Mapping):
            data = {cls.bare: data}
        if not isinstance(data, Mapping):
            return data
        by_key = {key_of(item): item for item in fields(cls)}
        own = {item.name: item for item in fields(cls)}
        read = {}
        for key, value in data.items():
            item = by_key.get(key)
            if item is None and key in own:
                raise FieldError(
                    "there is no such field", where=f"{cls.name}.{key}", fix=f"write {key_of(own[key])}"
                )
            if item is not None and item.metadata.get("listed") and isinstance(value, str):
                value = value if value == item.default else (value,)
            read[key if item is None else item.name] = tuple(value) if isinstance(value, list) else value
        return read

    def require_least(self, **least: int) -> None:
        """Refuse fields below the least value that is given for each."""
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise FieldError(
                    f"{getattr(self, name)} is too few",
                    where=f"{self.name}.{name}",
                    fix=f"give at least {smallest}",
                )

    def require_positive(self, *names: str) -> None:
        """Refuse fields that are no finite number above 0."""
        for name in names:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise FieldError(
                    f"{value} is out of range", where=f"{self.name}.{name}", fix="give a number above 0"
                )


@dataclass(frozen=True)
class MethodOptions(Step):
    """A step that has a folder in `rk_export.methods`; the work is in the `METHOD` of the folder's module `method`
    (`rk_export.methods.base.Method`).
    """

    sized_by_shapes: ClassVar[bool] = False
    # How a bundle came to be that cannot be made again from the dense model and the plan; empty where it can.
    trained: ClassVar[str] = ""


def key_of(item: Field[Any]) -> str:
    """Return the name of a field in a recipe file."""
    return str(item.metadata.get("key", item.name))


def listed(default: tuple[str, ...] | str) -> Any:
    """Return a dataclass field of names; one name may stand in a file without brackets.

    A default that is one word, such as `auto`, stays a word.
    """
    return field(default=default, metadata={"listed": True})


def _only(found: dict[str, Step]) -> Step:
    if len(found) != 1:
        raise FieldError(
            f"{len(found)} steps in one entry", where="steps", fix="give each step an entry of its own"
        )
    return next(iter(found.values()))
