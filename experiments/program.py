"""What every program shares: it runs, its mistakes become one line and an exit code, its progress is shown."""

import errno
import logging as python_logging
import os
import pathlib
import re
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from tqdm import tqdm

from experiments.config import check_fields
from score_sde import parallel, seeds
from score_sde.errors import UserError

CACHE = str(pathlib.Path.home() / ".cache" / "score_sde")
flags.disclaim_key_flags()  # what is defined here belongs to the program that asks for it, as in its --help

REFUSALS = ("ENOSPC", "EROFS", "EACCES", "EPERM", "EDQUOT", "ENOTDIR", "EISDIR")  # of a disk, which its user can mend


def shared_flags():
    """Define the flags that every program has, once."""
    if "coordinator" in flags.FLAGS:
        return
    path_flag("dataset_at", None, "Where a run's data set is now, if not where its config says.")
    path_flag("compilation_cache", None, f"Folder of compiled programs, {CACHE} if absent; or off.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0 of several; see docs/pods.md.")
    flags.DEFINE_integer("num_processes", None, "How many processes run this program.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0 on.", lower_bound=0)


def run(main: Callable[..., None], *, files: bool = False):
    """Run a program after parsing its flags. A UserError, or a disk that refuses, is one line and exit code 2.

    Where there are several processes, the first alone talks; if one dies, the others end with exit code 75.
    files: whether it takes arguments that are no flags; main is called with them.
    """
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)  # errors of writers come back to us anyway
    # TensorStore's readers of a damaged checkpoint still answer when Orbax has given up
    sys.unraisablehook = lambda found: str(found.exc_value) == "Event loop is closed" or sys.__unraisablehook__(found)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    def guarded(argv):
        given = flags.FLAGS
        cache = given.compilation_cache or os.environ.get("JAX_COMPILATION_CACHE_DIR", CACHE)
        jax.config.update("jax_compilation_cache_dir", None if cache == "off" else cache)
        if len(argv) > 1 and not files:
            raise UserError(f"unexpected argument {argv[1]!r}: options are written --name=value")
        parallel.start(given.coordinator, given.num_processes, given.process_id)
        with parallel.together():
            return main([path_of(argument) for argument in argv[1:]]) if files else main()

    try:
        app.run(guarded, flags_parser=_parse)
    except UserError as error:
        _fail(error)
    except OSError as error:
        if errno.errorcode.get(error.errno) not in REFUSALS:
            raise
        _fail(
            f"cannot write {error.filename or 'to disk'}: {error.strerror}: free some space or choose another --workdir"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(error):
    print(f"error: {error}", file=sys.stderr, flush=True)
    parallel.leave(2)


def _parse(argv):
    """Parse flags; whatever absl, ml_collections and the code of a config raise becomes one line."""
    shared_flags()
    argv = [re.sub("(?<=^--config=)~", os.path.expanduser("~"), argument) for argument in argv]
    try:
        return flags.FLAGS(argv)
    except UserError:
        raise
    except Exception as error:  # a config is anyone's code
        flag = getattr(error, "flagname", "")
        if flag.startswith("config.") and "config" in flags.FLAGS and not flags.FLAGS["config"].present:
            raise UserError(f"--{flag} changes a field of a config, and none is given: add --config=FILE") from None
        file = next((argument for argument in argv if argument.lstrip("-").startswith("config=")), None)
        where = "" if file is None or isinstance(error, flags.Error) else f"{file}: {type(error).__name__}: "
        raise UserError(where + " ".join(str(error).replace("\\n", " ").split())) from None


def progress(*iterable, **options) -> tqdm:
    """A progress bar, shown by the process that talks."""
    return tqdm(*iterable, dynamic_ncols=True, disable=not parallel.writes(), **options)


def seed_flag(what: str):
    """Define --seed, a whole number of 64 bits; what: its help."""
    return flags.DEFINE_integer("seed", 0, what, lower_bound=0, upper_bound=seeds.LARGEST)


class PathParser(flags.ArgumentParser):
    """Paths of this machine, `~` being the home folder; a cloud address is refused, or it would become a folder."""

    def parse(self, argument: str) -> str:
        argument = argument.removeprefix("file://")
        if not argument.strip():  # absl adds the flag's name; it would mean the folder where the program runs
            raise ValueError("expected a path, and it is empty, as by a variable that is not set")
        if "://" in argument:
            raise UserError(
                f"{argument} is an address in a cloud, which is neither read nor written here: mount it as a folder "
                "(gcsfuse, mount-s3), or copy it, and give that path"
            )
        return os.path.expanduser(argument)


def path_of(argument: str) -> str:
    """A path that is no flag's, as `PathParser` reads it."""
    try:
        return PathParser().parse(argument)
    except ValueError as error:
        raise UserError(f"{argument!r}: {error}") from None


class NameParser(flags.ArgumentParser):
    """Names of files and folders to be, which are no paths."""

    def parse(self, argument: str) -> str:
        if not argument or argument[0] == "~" or argument in (".", "..") or "/" in argument or len(argument) > 150:
            raise UserError(
                f"{argument!r} is no name: expected one of at most 150 letters without a folder, as in --name=first"
            )
        return argument


def path_flag(name: str, default: str | None, what: str, **options):
    """Define a flag that takes a path, or some word for one; what: its help."""
    return flags.DEFINE(PathParser(), name, default, what, **options)


def name_flag(name: str, default: str | None, what: str, **options):
    """Define a flag that takes the name of a file or folder to be; what: its help."""
    return flags.DEFINE(NameParser(), name, default, what, **options)


def dataset_at() -> str | None:
    """The value of --dataset_at, for a program's main."""
    return flags.FLAGS.dataset_at


def config_flag():
    """Define --config=FILE with its overrides --config.x.y=value."""
    return config_flags.DEFINE_config_file(
        "config", None, "A file of configs/; fields by --config.x.y=value.", lock_config=True
    )


def config_file() -> str:
    """The file that --config names, for a program's main."""
    return flags.FLAGS["config"].config_filename


def config_of(flag) -> ConfigDict:
    """The value of `config_flag()`, for a program's main; refused where none is given, or what is given is none."""
    given = flags.FLAGS["config"]
    file = given.config_filename if given.present else "is given"
    if not pathlib.Path(file).is_file():
        raise UserError(f"no config file {file}: choose one of configs/, as in --config=configs/digits.py")
    if not isinstance(flag.value, ConfigDict):
        raise UserError(f"--config={file} gives {flag.value!r}: get_config must return configs.base.get_config()")
    check_fields(flag.value, file)
    for section, field in (("data", "dataset"), ("data", "data_dir"), ("training", "init")):
        if isinstance(flag.value.get(section, {}).get(field), str):
            flag.value[section][field] = os.path.expanduser(flag.value[section][field])
    return flag.value
