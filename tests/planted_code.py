"""Model folders that bring Python code, as a checkpoint of somebody else might."""

from __future__ import annotations

from pathlib import Path

from checkpoint_files import change_json


class Planted:
    """A folder with planted code, and whether anything ran it or asked about it."""

    def __init__(self, folder: Path, marker: Path) -> None:
        self.folder, self.marker = folder, marker
        self.questions: list[str] = []

    def plant(self, kind: str) -> Path:
        """Name code in the file of this kind and lay it beside; return the file that a refusal should name."""
        files = {"config": "config", "model": "config", "tokenizer": "tokenizer_config"}
        autos = {"config": "AutoConfig", "model": "AutoModelForCausalLM", "generation": "GenerationConfig"}
        if kind == "decoding":
            return self._write_code(self.folder / "custom_generate" / "generate.py", "generate")
        self._write_code(self.folder / f"{kind}_evil.py", "Evil")
        path = self.folder / f"{files.get(kind, 'generation_config')}.json"
        named = f"{kind}_evil.Evil"
        change_json(
            path,
            auto_map={autos[kind]: named} if kind in autos else {"AutoTokenizer": [named, named]},
        )
        return path

    def _write_code(self, path: Path, name: str) -> Path:
        path.parent.mkdir(exist_ok=True)
        lines = [f"open({str(self.marker)!r}, 'w').close()", f"class {name}:", "    pass"]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    @property
    def is_untouched(self) -> bool:
        """Whether no code ran and nobody was asked."""
        return not self.marker.exists() and not self.questions
