"""What a method is asked for: the base of the options that every folder of `rk_export.methods` holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.ranks import Budget, RankRule

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

    from rk_export.options.recipe import Recipe

# When a method works: it takes whole structures, decides every matrix, or trains what compression left.
Stage = Literal["prune", "decide", "recover"]
STAGES: tuple[Stage, ...] = ("prune", "decide", "recover")


@dataclass(frozen=True)
class MethodOptions:
    """What one method is asked for; frozen, and validated on construction.

    A subclass says by class attributes how the method goes together with everything else, so that nothing outside
    its folder has to know which method it is. The work itself is in the `METHOD` of the folder's module `method`
    (`rk_export.methods.base.Method`).
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    # What a user writes to ask for it, as messages name it.
    asked_by: ClassVar[str]
    # Whether `--method NAME` asks for it, and whether `--keep` is then a rank rule or a budget.
    by_name: ClassVar[bool] = False
    amount: ClassVar[Literal["rank rule", "budget"]] = "rank rule"
    # Whether the shapes of the model alone tell the sizes of what it leaves.
    sized_by_shapes: ClassVar[bool] = False
    # Whether it judges the outputs of matrices by statistics, or needs text for anything else.
    weighs_outputs: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    # Whether it also chooses the form of the matrices that it decides.
    decides_form: ClassVar[bool] = False
    # How a bundle came to be that cannot be made again from the dense model and the plan; empty where it can.
    trained: ClassVar[str] = ""

    def check_with(self, recipe: Recipe) -> None:
        """Refuse other options that contradict it.

        Raises:
            InputError: Names the contradiction.
        """

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        raise NotImplementedError

    def recipe(self, amount: RankRule | Budget) -> Recipe:
        """Return all options as the method was published; of those that `--method` names.

        Args:
            amount: How much stays: a rank rule or a budget, as `amount` of the class says.
        """
        raise NotImplementedError

    @classmethod
    def needed(cls) -> str:
        """Return what says how much stays, for messages."""
        return (
            "--keep SHARE or --energy SHARE" if cls.amount == "rank rule" else "--keep SHARE or --size BYTES"
        )

    @property
    def json_tag(self) -> str:
        """The name under which its fields are saved."""
        return self.name

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read what `json_tag` saved: one object whose only key names the method."""
        if cls is not MethodOptions:
            return handler(source)
        from pydantic_core import core_schema

        kinds: tuple[type[MethodOptions], ...] = import_module(
            "rk_export.methods"
        ).METHODS  # it stands above us
        known = {
            kind.name: core_schema.typed_dict_field(handler.generate_schema(kind), required=False)
            for kind in kinds
        }
        table = core_schema.typed_dict_schema(known, extra_behavior="forbid")
        return core_schema.no_info_after_validator_function(_only, table)

    def require_least(self, **least: int) -> None:
        """Refuse fields below the least value that is given for each."""
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise FieldError(
                    f"{name} {getattr(self, name)}", where=self.name, fix=f"give at least {smallest}"
                )


def flag(
    name: str,
    help: str,
    *,
    default: Any = MISSING,
    read: Callable[[str], Any] | None = None,
    metavar: str | None = None,
) -> Any:
    """Return a dataclass field that the command line offers as a flag.

    Args:
        name: The flag, with its dashes. Methods that share one are told apart by `--method`.
        help: What it does.
        default: Of the field; without one the method needs the flag.
        read: Makes the value from the flag's text.
        metavar: How the help names the value.
    """
    return field(default=default, metadata={"flag": name, "help": help, "read": read, "metavar": metavar})


def flags_of(kind: type[MethodOptions]) -> list[Field[Any]]:
    """Return the fields of a method's options that have a flag."""
    return [item for item in fields(kind) if "flag" in item.metadata]


def _only(found: dict[str, MethodOptions]) -> MethodOptions:
    if len(found) != 1:
        raise FieldError(f"{len(found)} methods in one entry", where="methods", fix="give each its own entry")
    return next(iter(found.values()))
