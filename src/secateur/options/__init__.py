"""Every option once: the arguments of the functions, the flags of the commands, the keys of YAML files."""

from secateur.options.base import *  # noqa: F403
from secateur.options.runs import *  # noqa: F403
from secateur.options.way import *  # noqa: F403
