"""An address where no cluster is, told at once; Ray is not needed for it."""

from __future__ import annotations

import socket

import pytest

from rk_export.rewrite.ray_cluster import _knock


def test_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _knock(f"127.0.0.1:{listener.getsockname()[1]}")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        _knock(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:1", "no-port:"])
def test_what_is_no_host_and_port_is_left_to_ray(address: str) -> None:
    _knock(address)


def test_a_port_out_of_range_is_an_error_that_is_told() -> None:
    with pytest.raises((OSError, OverflowError)):
        _knock("127.0.0.1:99999")
