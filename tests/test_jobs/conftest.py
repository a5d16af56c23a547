"""The toys, for every test of this folder."""

from toy_training import _toys, make_runner  # noqa: F401  (fixtures)
