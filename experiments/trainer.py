"""The training loop: from a config and a folder to a run, which goes on where it was stopped."""

import functools
import json
import pathlib
import signal
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm import tqdm

from experiments import autoencoders, build, events, figures, parts, program, runs
from score_sde import checkpoint, data, files, parallel, power_ema, seeds, training
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError
from score_sde.guidance import Classifier
from solvers import tableau
from solvers.dpm_solver import dpm_solver_pp

UNREADABLE = 255  # the vote, greater than any signal, of a process that cannot read its next images


def train(config: ConfigDict, workdir: pathlib.Path, *, minutes: float | None = None) -> int:
    """Train what a config stands for, or continue the run of its folder; returns the exit code, 0 when it is finished.

    minutes: sets training.n_iters by the pace, so that all, the cooldown included, takes about so long.
    """
    # ------------------------------------------------------------------------------ what to train, and where
    began = time.monotonic()
    files.check_writable(workdir)
    if config.model.get("low_res"):
        raise UserError("a model that enlarges small images (model.low_res) is imported and sampled, not trained here")
    config, autoencoder = autoencoders.complete(config, workdir)
    model, fields = build.trainable(config, autoencoder), config.training
    share_of_device = parallel.batch_per_device(fields.batch_size)
    if share_of_device % fields.accumulate:
        raise UserError(
            f"training.accumulate is {fields.accumulate}: expected a divisor of a device's {share_of_device} images"
        )
    if fields.n_iters % fields.steps_per_call or fields.checkpoint_freq % fields.steps_per_call:
        raise UserError("training.steps_per_call must divide n_iters and checkpoint_freq")
    share = dict(batch_size=fields.batch_size, seed=config.seed, **parallel.process())
    stream = data.Stream(build.images_of(config, "train"), **share)
    # a test split may be smaller than a batch
    held_out = data.Stream(data.repeat(build.images_of(config, "test", tell=False), fields.batch_size), **share)
    params, start = starting_params(config, model, workdir)
    runs.claim_workdir(workdir, config)
    if autoencoder and not (workdir / parts.file_of(parts.AUTOENCODER)).exists():
        parts.save(workdir, parts.AUTOENCODER, autoencoder)
    if stream.images.classes is not None:
        names = {str(label): name for label, name in enumerate(stream.images.classes)}
        files.write(workdir / runs.CLASSES, json.dumps(names, indent=2) + "\n")
    if start is not None:
        files.write(workdir / runs.START, json.dumps(start, indent=2) + "\n")

    # ------------------------------------------------------------------------------ the state, new or resumed
    optimizer = training.make_optimizer(**config.optim)
    loss = functools.partial(build.loss_of, config, model)  # of an autoencoder's parameters, which are arguments

    def take_steps(signal, state, autoencoder, *inputs):
        steps = training.make_step(
            loss(autoencoder),
            optimizer,
            config.seed,
            ema_rate=fields.ema_rate,
            ema_warmup=fields.ema_warmup,
            cooldown=fields.cooldown,
            accumulate=fields.accumulate,
            skip_non_finite=fields.non_finite == "skip",
            power_gammas=tuple(map(power_ema.gamma_of, fields.power_ema)),
        )
        return (*steps(state, *inputs), parallel.largest(signal))

    step_on_devices = parallel.pmap(take_steps, in_axes=(0, 0, 0, 0, None, None), donate_argnums=1)
    held_out_loss = parallel.pmap(
        lambda ema, autoencoder, batch, step: parallel.mean(
            loss(autoencoder)(ema, batch, jax.random.fold_in(seeds.key(config.seed + 1), step), False).mean()
        ),
        in_axes=(0, 0, 0, None),
    )
    aids = {"classifier": accuracy, "autoencoder": autoencoders.reconstructions}
    show = aids[kind](config, model) if (kind := build.kind_of(config)) in aids else samples(model)
    checkpoints = checkpoint.Checkpoints(workdir, keep_every=fields.keep_freq)
    state = training.init_state(params, optimizer, power_averages=len(fields.power_ema))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{workdir}: {size / 1e6:.2f} M parameters, {stream.images.size} images, {jax.device_count()} device(s)")
    marks, coded_by = stream.images.marks(), checkpoint.identity(autoencoder)
    if last := checkpoints.last(lambda step: checkpoints.restore(step, state)):
        _, (state, meta) = last
        theirs = meta.get("stream", "those of another program")
        if theirs != stream_identity(config, stream):
            raise UserError(
                f"{workdir} was trained on other data ({theirs}): restore them, or start a new run, which may begin "
                f"with its parameters, --config.training.init={workdir}"
            )
        if "data" in meta and data.identity(marks, meta["data"]["without"]) != meta["data"]["identity"]:
            raise UserError(
                f"{workdir} was trained on other data: images of {stream.images.name} were replaced, renamed or given "
                "other labels: restore them or start a new run"
            )
        if (theirs := meta.get("autoencoder", coded_by)) != coded_by:
            raise UserError(
                f"{workdir} was trained in the latents of autoencoder {theirs}, not {coded_by}: "
                f"restore its {parts.file_of(parts.AUTOENCODER)}, or start a new run in another --workdir"
            )
        print(f"continuing at step {int(state.step)}")
    step = int(state.step)
    state, frozen = parallel.replicate((state, autoencoder))

    # ------------------------------------------------------------------------------ the loop
    caught, stopped, windows = catch_stop_signals(), 0, 0  # the first window of the log has compiled
    damaged = len(parallel.union(stream.images.damaged, stream.images.size))  # images passed over
    done = lambda: int(parallel.first(state.step))  # less than `step` after an update that was not finite

    def save():
        without = parallel.union(stream.images.damaged, stream.images.size)  # they may be restored before it goes on
        meta = {"stream": stream_identity(config, stream), "position": done(), "seed": config.seed}
        meta["data"] = {"identity": data.identity(marks, without), "without": without}
        meta |= {"autoencoder": coded_by} if autoencoder else {}
        checkpoints.save(parallel.first(state), meta)

    looks = (fields.log_freq, fields.eval_freq, fields.checkpoint_freq, fields.keep_freq)
    with SummaryWriter(str(workdir / "tensorboard"), write_to_disk=parallel.writes()) as board:
        board.add_text(events.DEVICES, parallel.devices(), step)
        bar = program.progress(total=fields.n_iters, initial=step, unit="step", mininterval=1.0)
        batches = stream.batches(step)
        reported, vote, skipped, unread = (time.monotonic(), step), None, 0, []
        count = fields.steps_per_call - step % fields.steps_per_call
        inputs, failure = next_batches(batches, stream, count if step < fields.n_iters else 0)
        unreadable = parallel.anywhere(failure is not None)
        while step < fields.n_iters and not unreadable:
            # The vote of the call before, so that never more than one is ahead, and all processes stop at one step.
            if vote is not None and (stopped := int(parallel.first(vote))):
                break
            before, step = step, step + count
            count = fields.steps_per_call if step < fields.n_iters else 0
            # Read before the call, so that a process that cannot read its next images says so in this call's vote.
            following, failure = next_batches(batches, stream, count)
            signals = np.full(jax.local_device_count(), max(caught, default=0) if failure is None else UNREADABLE)
            state, metrics, vote = step_on_devices(signals, state, frozen, inputs, before, np.int32(fields.n_iters))
            inputs = following
            bar.update(step - before)
            unread.append(metrics["skipped updates"])
            if (step == fields.n_iters or any(crossed(before, step, every) for every in looks)) and done() < step:
                break
            if crossed(before, step, fields.log_freq):
                metrics = parallel.first(metrics)
                skipped += sum(int(parallel.first(flags).sum()) for flags in unread)
                metrics["skipped updates"], unread = [skipped], []
                now, images = time.monotonic(), (step - reported[1]) * fields.batch_size
                report(bar, board, step, metrics, images / (now - reported[0]))
                pace, reported = (now - reported[0]) / (step - reported[1]), (now, step)
                if minutes and windows and step < fields.n_iters - fields.cooldown:
                    left = (began + 60 * minutes - now) / pace
                    fields.n_iters = parallel.agreed(ending(step, left, fields))
                    bar.total = fields.n_iters
                    runs.claim_workdir(workdir, config)
                windows += 1
                if config.data.skip_damaged:
                    damaged = tell_damaged(stream.images, damaged)
                    board.add_scalar("damaged images", damaged, step)
            if crossed(before, step, fields.eval_freq):
                try:
                    batch = numbered(held_out.batch(step // fields.eval_freq), held_out)
                except UserError as error:
                    failure = error
                if unreadable := parallel.anywhere(failure is not None):
                    break
                value = parallel.first(held_out_loss(state.ema, frozen, parallel.shard_own(batch), step))
                board.add_scalar("held-out loss (EMA)", value, step)
            if crossed(before, step, fields.checkpoint_freq) or step == fields.n_iters:
                save()
            if parallel.writes() and (crossed(before, step, fields.keep_freq) or step == fields.n_iters):
                show(parallel.first(state.ema), workdir, board, step)
        batches.close()
        bar.close()
    unreadable = unreadable or stopped == UNREADABLE
    if config.data.skip_damaged:
        tell_damaged(stream.images, damaged)
    if stopped or unreadable or done() < step:
        save()
    checkpoints.wait()
    if done() < step:
        first = ", ".join(map(str, stream.indices(done())[:8]))
        raise UserError(
            f"loss or gradient is not finite at step {done()}, batch {done()} of the stream, which begins with images "
            f"{first} of {stream.images.name}: the state before it is saved in {checkpoints.folder}: start anew with a "
            "lower optim.lr, or pass over such batches, --config.training.non_finite=skip"
        )
    if unreadable:
        reason = failure or "another process cannot read its images, as it says"
        raise UserError(
            f"{reason}: the {done()} steps before it are saved in {checkpoints.folder}: restore that image and go on "
            "by the same command, or pass over damaged ones, --config.data.skip_damaged=True"
        )
    ended = "stopped" if stopped else "finished"
    how = f"; continue with python train.py --workdir={workdir}" if stopped else ""
    print(f"{ended} at step {step}, checkpoint in {workdir / 'checkpoints'}{how}")
    return 128 + stopped if stopped else 0


def starting_params(config, model, workdir):
    """Drawn from the seed; of a new run with training.init the averaged ones of that model, and its history."""
    folder = config.training.init
    drawn = model.init(seeds.key(config.seed))
    if folder is None or checkpoint.Checkpoints(workdir).steps():
        return drawn, None
    open_autoencoder = functools.partial(runs.open_aid, kind="autoencoder")
    opened = {"classifier": runs.open_classifier, "autoencoder": open_autoencoder, "model": runs.open_model}
    begun = opened[build.kind_of(config)](folder)
    checkpoint.check_fit(folder, "params", checkpoint.layout(drawn), checkpoint.layout(begun.params))
    theirs, ours = begun.config.denoiser, config.denoiser
    for field in ours:
        if theirs[field] != ours[field]:
            raise UserError(
                f"{folder} was trained with denoiser.{field} {theirs[field]!r}, not {ours[field]!r}, so its parameters "
                "mean something else: take its value, or start from the seed"
            )
    return begun.params, runs.history(begun)


def stream_identity(config, stream) -> str:
    """What the position in the stream refers to."""
    return f"{config.data.dataset} {stream.images.size} images, batch {config.training.batch_size}, seed {config.seed}"


def tell_damaged(images: data.Images, told: int) -> int:
    """How many damaged images all processes passed over; says so if they are more than were told of."""
    found = parallel.union(images.damaged, images.size)
    if len(found) > told:
        lastly = next(reversed(images.damaged.values()), f"image {found[-1]}, by another process")
        tqdm.write(f"{images.name}: passed over {len(found)} damaged image(s), lastly: {lastly}")
    return len(found)


def ending(step: int, left: float, fields) -> int:
    """The number of steps in the end if so many are left: a multiple of steps_per_call, with room for the cooldown."""
    calls = max(left, fields.cooldown, 1) // fields.steps_per_call
    return step - step % fields.steps_per_call + fields.steps_per_call * max(1, int(calls))


def numbered(batch, stream):
    """This process' part of a batch, with each example's index in the global batch."""
    return batch | {"index": stream.block}


def next_batches(batches, stream, count: int):
    """The next batches, so many, as (devices, steps, batch per device, ...); and the UserError that ended the reading.

    The latter is of an image, or of the disk that it is on.
    """
    try:
        parts = [parallel.shard_own(numbered(next(batches)[1], stream)) for _ in range(count)]
    except UserError as error:
        return None, error
    return jax.tree.map(lambda *values: np.stack(values, axis=1), *parts) if parts else None, None


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def report(bar, board, step, metrics, rate):
    """Loss on the bar, scalars to TensorBoard."""
    values = {name: float(value[-1]) for name, value in metrics.items()}
    bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s", refresh=False)
    for name, value in (values | {"images per second": rate}).items():
        board.add_scalar(name, value, step)


def samples(model: Diffusion, n: int = 36):
    """(params, workdir, board, step): show n images by 20 evaluations of DPM-Solver++, of the same noise every time."""
    table = dpm_solver_pp(model.sde, 20)
    z = jax.random.normal(jax.random.key(0), (n, *model.space.shape)) * model.sde.prior_std
    classes = model.conditions(jax.numpy.arange(n))
    solve = jax.jit(lambda params, z: tableau.solve(model.noise_of(params, classes), table, z))

    def show(params, workdir, board, step):
        images = np.asarray(model.space.decode(solve(params, z)))
        figures.save_grid(workdir / "tensorboard" / f"samples_{step}.png", images)
        board.add_image("samples", figures.image_grid(images), step, dataformats="HWC")

    return show


def accuracy(config, classifier: Classifier, n: int = 1000, levels: int = 6):
    """(params, workdir, board, step): show a classifier's accuracy on n test images at times t_min to t_max."""
    images, sde = build.images_of(config, "test", tell=False), classifier.sde
    batch = images.take(np.arange(min(n, images.size)))
    keys = jax.random.split(jax.random.key(0), len(batch["label"]))
    times = np.linspace(sde.t_min, sde.t_max, levels, dtype=np.float32)

    @jax.jit
    def accurate(params, t):
        x0 = jax.vmap(classifier.space.encode)(keys, batch["image"])
        z = jax.random.normal(jax.random.key(1), x0.shape)
        logits = classifier.logits_of(params)(sde.perturb(x0, t, z), t)
        return (logits.argmax(1) == batch["label"]).mean()

    def show(params, workdir, board, step):
        shares = [float(accurate(params, t)) for t in times]
        for t, share in zip(times, shares, strict=True):
            board.add_scalar(f"accuracy/t={t:.2g}", share, step)
        shown = ", ".join(f"{share:.3f} at t={t:.2g}" for t, share in zip(times, shares, strict=True))
        tqdm.write(f"step {step}: accuracy on {len(keys)} test images {shown}")

    return show


def catch_stop_signals() -> list[int]:
    """A list that a first Ctrl-C or SIGTERM is added to; a second one kills."""
    caught = []

    def stop(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return caught
