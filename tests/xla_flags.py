"""XLA's flags in tests: programs that run a few times are compiled without optimisation, in a fraction of the time."""

import importlib.metadata

FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"
# What LLVM gets from the older emitters compiles 2.5 times as fast. Later versions of JAX do not have them.
if importlib.metadata.version("jax").startswith("0.10."):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"

# For `jax.stages.Lowered.compile`, where a test runs a program so often that the default pays off.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
