"""Composed digits under their public name; see `engine.data.images.digits`."""

from engine.data.images.digits import *  # noqa: F403
