"""Parity as a test of your own: copy this file into your test suite and name your bundle.

    RK_BUNDLE=out/demo/bundle pytest samples/parity_in_your_tests.py
    RK_BUNDLE=out/demo/bundle RK_MODEL=path/of/the/dense/model pytest samples/parity_in_your_tests.py

Without the dense model the bundle is checked against itself: checksums, cache, padding, the greedy tokens that
PyTorch confirmed at export. With it, the bundle's plan is applied to it again and every tier is measured.
"""

from __future__ import annotations

import os

import pytest

from rk_export.testing import assert_parity


@pytest.fixture(scope="module")
def bundle() -> str:
    """The bundle under test."""
    folder = os.environ.get("RK_BUNDLE")
    if not folder:
        pytest.skip("set RK_BUNDLE to a bundle folder")
    return folder


@pytest.fixture(scope="module")
def dense_model() -> str:
    """The model that the bundle was made from."""
    model = os.environ.get("RK_MODEL")
    if not model:
        pytest.skip("set RK_MODEL to the dense model")
    return model


def test_bundle_keeps_its_promises(bundle: str) -> None:
    """Every tier that has a bound and needs no PyTorch model."""
    assert_parity(bundle)


def test_cache_and_padding_are_exact(bundle: str) -> None:
    """Tiers e and f: cached decode equals prefill, a left-padded batch equals single rows."""
    assert_parity(bundle, tier=("e", "f"))


def test_onnxruntime_computes_what_pytorch_computes(bundle: str, dense_model: str) -> None:
    """Tier c: the compressed PyTorch model against ONNX Runtime at accuracy level 0."""
    assert_parity(bundle, dense_model, tier="c")


def test_compression_moves_logits_no_more_than_this(bundle: str, dense_model: str) -> None:
    """Tiers a and b are the method's own error, so that only you can say how much is acceptable."""
    assert_parity(bundle, dense_model, tier=("a", "b"), bound=0.5)
