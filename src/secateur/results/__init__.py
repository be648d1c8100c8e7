"""Results as tables, with their provenance."""

from secateur.results.models import *  # noqa: F403
from secateur.results.scores import *  # noqa: F403
