"""A cache of its own for every test, and stand-ins for package clients."""

from tests.package_clients import cache, client

__all__ = ["cache", "client"]
