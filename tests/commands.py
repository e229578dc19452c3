"""Parses command lines that pages, notebooks and scripts have, as the commands do."""

import importlib

from gpt2_jax.config.flags import parse_args, parse_flags, take_flags
from gpt2_jax.distributed.cluster import ClusterFlags
from gpt2_jax.plan import PlanFlags

# Commands that take the flags of a config, and the dataclass of their other flags.
WITH_CONFIG = {"train": ClusterFlags, "plan": PlanFlags}


def check_command(name, args):
    """Parses the arguments of `python -m gpt2_jax.NAME`, and validates its config. A name alone only has to exist."""
    module = importlib.import_module("gpt2_jax.data.__main__" if name == "data" else f"gpt2_jax.{name}")
    if not args:
        return
    if name not in WITH_CONFIG:
        parse_flags(module.Flags, args, prog=name, description="")
        return
    own, rest = take_flags(WITH_CONFIG[name], args)
    flags = parse_flags(WITH_CONFIG[name], own, prog=name, description="")
    if rest or not getattr(flags, "ramp", ""):
        parse_args(name, "", rest)
