"""The server's own fixtures: a real server around a stand-in worker."""

from tests.unit.server.conftest import stand_in, start

__all__ = ["stand_in", "start"]
