"""The text of a target task becomes sequences, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rk_export.calibration.target_text import target_tokens
from rk_export.errors import InputError
from rk_export.text import tokens_of


def test_sequences_are_consecutive_pieces_of_the_text(prose: Path, llama: Path) -> None:
    whole = torch.from_numpy(tokens_of(prose, llama))
    ids = target_tokens(prose, llama, 16, 5)
    assert ids.dtype == torch.int64
    assert ids.shape == (5, 16)
    assert torch.equal(ids.flatten(), whole[:80])
    assert target_tokens(str(prose), llama, 16, 10**6).shape == (len(whole) // 16, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a\0b", "binary"),
        (b"two words", "one sequence takes 16"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, llama: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "task.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        target_tokens(path, llama, 16, 4)
    assert caught.value.exit_code == 2
    assert caught.value.where == str(path)
    assert caught.value.fix


@pytest.mark.parametrize(("length", "count"), [(1, 4), (16, 0)])
def test_sequences_that_train_nothing_are_refused(prose: Path, llama: Path, length: int, count: int) -> None:
    with pytest.raises(InputError, match="train nothing"):
        target_tokens(prose, llama, length, count)
