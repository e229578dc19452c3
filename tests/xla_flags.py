"""XLA's flags in tests: programs that run a few times are compiled without optimisation, in half of the time."""

FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# For `jax.stages.Lowered.compile`, where a test runs a program so often that the default pays off.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
