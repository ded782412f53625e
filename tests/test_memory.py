"""How much memory is free, as the machine and as a container tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rk_export import memory


def test_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, container = tmp_path / "meminfo", tmp_path / "group"
    monkeypatch.setattr(memory, "_MEMINFO", machine)
    monkeypatch.setattr(memory, "_CONTAINER", container)
    assert memory.available_memory() is None
    machine.write_text("MemTotal:  900 kB\nMemAvailable:  500 kB\n", encoding="ascii")
    assert memory.available_memory() == 500 * 1024
    container.mkdir()
    for name, text in {"max": "300000", "current": "250000", "stat": "anon 1\ninactive_file 40000\n"}.items():
        (container / f"memory.{name}").write_text(text, encoding="ascii")
    assert memory.available_memory() == 90_000
    (container / "memory.max").write_text("max\n", encoding="ascii")
    assert memory.available_memory() == 500 * 1024
