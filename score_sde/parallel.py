"""The only file that knows devices and hosts. Everything else is written for one device.

Data-parallel by `jax.pmap`: arguments carry a leading device axis, `mean` averages over it. Each process of a job runs
the same program on its own devices. It holds its own rows of a batch, results are gathered on all of them, so that all
take the same decisions, and the first process alone writes.
"""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils

from score_sde.errors import UserError, one_line

AXIS = "devices"
HEARTBEAT_SECONDS = 30  # after so long without a sign of life a process counts as dead, and the others end
SHUTDOWN_SECONDS = 5  # a process that has failed waits so long for the others to fail too
LOST = 75  # exit code of a process that lost another: all may be started again
CPU_DEVICES = 2  # of a program that runs alone on a machine without accelerator

# ------------------------------------------------------------------------------------------------ processes


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None):
    """Join the other processes of this job, before anything is computed; a program that runs alone divides its CPU.

    coordinator: host:port of process 0. Without arguments, the others are those that SLURM, Open MPI or a Cloud TPU
        tell of.
    """
    address = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    if None not in address.values():
        address["cluster_detection_method"] = "deactivate"
    elif any(value is not None for value in address.values()):
        raise UserError("several processes need all of --coordinator=HOST:PORT, --num_processes and --process_id")
    elif not _launched():
        _divide_cpu()
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            **address, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=2 * SHUTDOWN_SECONDS
        )
    except (ValueError, RuntimeError, OSError, IndexError) as error:
        raise UserError(
            f"cannot join the other processes at {coordinator}: {one_line(error)}: give each the "
            "--coordinator=HOST:PORT of process 0, --num_processes, and --process_id from 0 on"
        ) from None
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        raise UserError(
            f"this process has {jax.local_device_count()} of the {jax.device_count()} devices of "
            f"{jax.process_count()} processes: give each process the same number"
        )


def _launched() -> bool:
    """Whether a cluster that jax knows started several processes, or may have: a Cloud TPU."""
    sizes = (os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(size != "1" for size in sizes) or os.environ.get("TPU_ML_PLATFORM") == "JAX"  # set by jax on such a host


def _divide_cpu():
    """Two devices on a CPU of several cores, unless the user has said how many.

    XLA keeps one core alone busy in many operations; two devices fill each other's gaps (`python -m benchmarks.run`).
    """
    flagged = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not flagged and jax.config.jax_num_cpu_devices < 1 and os.cpu_count() >= CPU_DEVICES:
        with contextlib.suppress(RuntimeError):  # this process has computed before, and keeps the devices it has
            jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def alone() -> bool:
    """Whether this job is one process."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def writes() -> bool:
    """Whether this process is the one that writes files and talks."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def process() -> dict[str, int]:
    """Which of how many processes this is, as `data.Stream` asks for it."""
    return dict(process_index=jax.process_index(), process_count=jax.process_count())


def wait_for_all(place: str):
    """Until every process is at this place."""
    if not alone():
        multihost_utils.sync_global_devices(place)


@contextlib.contextmanager
def together():
    """A program's work, of which the first process alone tells on stdout.

    It ends when every process has done it, and if one dies, with one line and the exit code LOST.
    """
    try:
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(sys.stdout if writes() else silence):
            if not alone():
                _connect()
            yield
        wait_for_all("the end")
    except (RuntimeError, ValueError) as error:  # what collectives raise that lose a connection
        signs = ("Gloo", "NCCL", "UNAVAILABLE", "Connection", "heartbeat")
        if alone() or not any(sign in str(error) for sign in signs):
            raise
        print(
            f"error: process {jax.process_index()} lost another process ({one_line(error, 150)}): "
            "start all again, what was saved is continued",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)  # an orderly end would wait for the lost one


def _connect():
    """First collectives, among the devices and among the processes, while all are together.

    On CPU they connect there, and give each other up if they come 30 seconds apart, as they may once one of them has
    compiled for longer than another. Connected, they wait for each other as long as it takes.
    """
    jax.block_until_ready(pmap(mean)(np.zeros(jax.local_device_count())))
    wait_for_all("the start")


def leave(code: int):
    """Exit after a failure: with the other processes if they fail too, after SHUTDOWN_SECONDS without them."""
    if not alone():
        timer = threading.Timer(SHUTDOWN_SECONDS, os._exit, [code])
        timer.daemon = True
        timer.start()
    sys.exit(code)


def agreed(number: int) -> int:
    """The first process' number, in every process."""
    return number if alone() else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def anywhere(flag: bool) -> bool:
    """Whether it is true in any process."""
    return flag if alone() else bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def union(indices: Iterable[int], size: int) -> list[int]:
    """The numbers below `size` that any process gives, sorted."""
    mask = np.zeros(size, bool)
    mask[list(indices)] = True
    every = mask if alone() else multihost_utils.process_allgather(mask).any(axis=0)
    return np.flatnonzero(every).tolist()


# ------------------------------------------------------------------------------------------------ devices


def pmap(function: Callable, **options) -> Callable:
    """jax.pmap over all devices, with the axis that `mean` averages over."""
    return jax.pmap(function, axis_name=AXIS, **options)


def full_precision(function: Callable) -> Callable:
    """The function with all its products of float32 in float32, where by default a TPU takes bfloat16, a GPU TF32.

    For what does not survive those: steps under error control, small differences of large numbers, figures to cite.
    """

    @functools.wraps(function)
    def precise(*args, **options):
        with jax.default_matmul_precision("highest"):
            return function(*args, **options)

    return precise


def mean(x):
    """Mean of a tree over the devices inside a `pmap`; outside, where one device holds the batch, x itself."""
    try:
        return jax.lax.pmean(x, AXIS)
    except NameError:  # no such axis is bound
        return x


def largest(x):
    """The largest of the devices' x, inside a `pmap`."""
    return jax.lax.pmax(x, AXIS)


def devices() -> str:
    """How many devices of what kind compute, as in "8 x NVIDIA H100 80GB HBM3"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def batch_per_device(batch_size: int) -> int:
    """The share of one device in a global batch."""
    n = jax.device_count()
    if batch_size % n:
        remedy = f"use a multiple of {n}"
        if alone() and jax.default_backend() == "cpu":
            remedy += ", or one device, by XLA_FLAGS=--xla_force_host_platform_device_count=1"
        raise UserError(f"a batch of {batch_size} does not divide over {n} devices: {remedy}")
    return batch_size // n


def round_up(n: int) -> int:
    """The least number from n on that divides over the devices."""
    return -(-n // jax.device_count()) * jax.device_count()


def replicate(tree):
    """A copy of a host tree on each local device, with a leading device axis."""
    return pmap(lambda _, tree: tree, in_axes=(0, None))(np.zeros(jax.local_device_count()), tree)


def own(tree):
    """This process' rows of host arrays that hold the global batch."""
    i, n = jax.process_index(), jax.process_count()
    return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:])[i], tree)


def shard_own(tree):
    """Split this process' rows over its devices: (n, ...) -> (devices, n / devices, ...)."""
    n = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), tree)


def shard(tree):
    """Split the leading axis of host arrays, which every process has whole, over the devices of all processes."""
    return shard_own(own(tree))


def first(tree):
    """The first local device's copy of a replicated tree, as NumPy arrays of their own memory."""
    return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree)


def gather(tree):
    """Undo `shard` for outputs of a pmapped function: all devices' results in every process, as NumPy arrays."""
    join = lambda x: np.concatenate([np.asarray(s.data) for s in x.addressable_shards]).reshape(-1, *x.shape[2:])
    own = jax.tree.map(join, tree)
    return own if alone() else multihost_utils.process_allgather(own, tiled=True)
