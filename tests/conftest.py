"""Test-wide strictness: no silent dtype promotion, no silent broadcasting between ranks."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 1)  # else the first program a test calls divides the CPU for all


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield
