"""Compilation with the optimizations that conftest.py leaves out, for tests that run longer than they compile."""

import functools

import jax

optimized_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
)
