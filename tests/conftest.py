"""Test-wide strictness: no silent dtype promotion, no silent broadcasting between ranks; and quick compilation."""

import os
import tempfile

import jax
import pytest

from tests.optimized import QUICK

# Compilation is most of the suite's time. One's own flags come last and win.
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"

# What is compiled once in a run of the tests is there for all: for both workers, and for the programs that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="score_sde_compiled_")  # lives as long as the first process
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 1)  # else the first program a test calls divides the CPU for all


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield
