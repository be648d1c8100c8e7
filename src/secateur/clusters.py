"""A Ray cluster: found or started here, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from secateur.errors import ConfigError, MissingPackage


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """Be connected to a Ray cluster; gives the ``ray`` module.

    Args:
        address: ``auto`` for the cluster that this machine belongs to, ``ray://host:10001``, or ``local`` for a new one
            on this machine alone. A process that is connected already stays so.

    Raises:
        MissingPackage: Ray is not installed.
        ConfigError: There is no cluster at that address.
    """
    try:
        import ray  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MissingPackage("ray", "--ray", "pip install 'secateur[ray]'") from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address=address, include_dashboard=False if address == "local" else None, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError("ray", address, f"no Ray cluster at {address} ({first:.200})") from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()  # type: ignore[no-untyped-call,unused-ignore]
