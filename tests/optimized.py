"""How tests are compiled: without optimization, in a fifth of the time; or with it, where they run longer than that."""

import functools

import jax

OPTIONS = ["xla_backend_optimization_level"]
OPTIONS += ["xla_cpu_use_fusion_emitters"] if jax.__version_info__ < (0, 11) else []  # later ones know no such option

QUICK = " ".join(f"--{name}=0" for name in OPTIONS)
optimized_jit = functools.partial(jax.jit, compiler_options=dict(zip(OPTIONS, (3, True), strict=False)))
