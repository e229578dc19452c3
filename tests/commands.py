"""Parses command lines that pages, notebooks and scripts have, as the commands do."""

import importlib

from gpt2_jax.config.flags import parse_args, parse_flags, take_flags

# Commands that take the flags of a config, and the dataclass of their other flags.
WITH_CONFIG = {"train": ("gpt2_jax.distributed.cluster", "ClusterFlags"), "plan": ("gpt2_jax.plan", "PlanFlags")}


def check_flags(name: str, args: list[str]) -> None:
    """Parses the arguments of `python -m gpt2_jax.NAME`. Fails if the command refuses them."""
    module = importlib.import_module("gpt2_jax.data.__main__" if name == "data" else f"gpt2_jax.{name}")
    if name not in WITH_CONFIG:
        parse_flags(module.Flags, args, prog=name, description="")
        return
    where, flags = WITH_CONFIG[name]
    kind = getattr(importlib.import_module(where), flags)
    own, rest = take_flags(kind, args)
    parse_flags(kind, own, prog=name, description="")
    parse_args(name, "", rest)
