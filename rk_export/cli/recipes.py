"""The command `recipes`: presets to choose from, to edit and to read about."""

from __future__ import annotations

import argparse

from rk_export.cli.terminal import print_json, show
from rk_export.errors import InputError
from rk_export.json_codec import to_json


def add_recipes_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `recipes`."""
    parser.add_argument("name", nargs="?", help="a preset: print its file")
    parser.add_argument("--steps", action="store_true", help="every step and field, with defaults")
    parser.add_argument("--schema", action="store_true", help="JSON schema of recipe files, for editors")


def run_recipes(args: argparse.Namespace) -> int:
    """`recipes`: a table, one file, all fields, or the schema."""
    from rk_export.options.choices import nearest
    from rk_export.recipes.fields import json_schema, section_help
    from rk_export.recipes.presets import presets
    from rk_export.recipes.tables import fields_tables, presets_table

    if sum((args.name is not None, args.steps, args.schema)) > 1:
        raise InputError("name, --steps and --schema print different things", where="recipes", fix="give one")
    if args.schema:
        print_json(json_schema())
    elif args.steps:
        print_json(to_json(section_help())) if args.json else show(*fields_tables(section_help()))
    elif args.name is None:
        known = {name: preset.about for name, preset in presets().items()}
        print_json(to_json(known)) if args.json else show(presets_table(known))
    else:
        if args.name not in presets():
            raise InputError(
                "no preset",
                where=args.name,
                fix=f"{nearest(args.name, presets())}`rk-export recipes` lists them",
            )
        preset = presets()[args.name]
        print_json(to_json(preset)) if args.json else print(preset.text, end="")
    return 0
