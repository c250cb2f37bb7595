"""The Inception port against figures of torch-fidelity and pytorch-fid on synthetic weights; its weights file."""

import functools
import hashlib
import io
import json
import os
import pickle
import struct
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde.errors import UserError
from score_sde.metrics import features, inception
from tests import reference
from tests.programs import ROOT, ok, program

GROUP = "I_inception"
CROSSED = {"tf_s127": ("tf1", 127.5), "pf_s128": ("half_pixel", 128.0)}
MODES = inception.MODES | CROSSED
# the network runs once on these; ALL_NETWORKS=1 runs it on every preprocessing mode and size
ALWAYS = ("tf/32",)


def cases() -> list[str]:
    """All mode/size pairs of the figures."""
    if not reference.find(f"{GROUP}.json"):
        return []
    keys = reference.description(GROUP)["arrays"]
    return sorted({"/".join(key.split("/")[:2]) for key in keys if key.endswith("/feat_2048")})


def selected(names: list[str]) -> list[str]:
    return [name for name in names if os.environ.get("ALL_NETWORKS") or name in ALWAYS]


def weight(name: str, shape) -> np.ndarray:
    """An entry of the synthetic state_dict, by the figures' recipe."""
    value = reference.normal(name, shape)
    if name.endswith("conv.weight"):
        return value * np.float32(np.sqrt(2) / np.sqrt(np.prod(shape[1:])))
    if name == "fc.weight":
        return value * np.float32(1 / np.sqrt(2048))
    if name.endswith("bn.weight"):
        return 1 + np.float32(0.1) * value
    return 1 + np.float32(0.1) * abs(value) if name.endswith("running_var") else np.float32(0.1) * value


@functools.cache
def synthetic_state() -> dict[str, np.ndarray]:
    entries = reference.description(GROUP)["state_dict"]
    return {name: weight(name, shape) for name, shape, _ in entries if not name.endswith("num_batches_tracked")}


@functools.cache
def network():
    """The jitted network on the synthetic weights."""
    params = jax.tree.map(np.float32, inception.params_of(synthetic_state()))
    return functools.partial(jax.jit(inception.Inception().apply), {"params": params})


def images(case: str) -> np.ndarray:
    stored = reference.arrays(GROUP)
    if case.endswith("/32"):
        return stored["img32"]
    noise = np.floor(256 * reference.uniform("fixI/img299/0", (299, 299, 3))).astype(np.uint8)
    return np.stack([noise, stored["img299_1_blocks"].repeat(23, 0).repeat(23, 1)])


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def test_synthetic_weights():
    for name, first in reference.description(GROUP)["weight_check_first3"].items():
        np.testing.assert_allclose(synthetic_state()[name].ravel()[:3], first, rtol=1e-6)


@pytest.mark.parametrize("case", selected(cases()))
def test_network_equals_published(case):
    """Features, logits, and mean, spread, crops and corners of every layer."""
    stored = reference.arrays(GROUP)
    theirs = lambda key: stored[f"{case}/{key}"]
    x = inception.preprocess(images(case), *MODES[case.split("/")[0]])
    features, logits, layers = jax.tree.map(np.asarray, network()(x))
    unbiased = logits - synthetic_state()["fc.bias"]
    means = {"64": "MaxPool_1", "192": "MaxPool_2", "768": "Mixed_6e"}
    ours = {"feat_2048": features, "feat_2048_f64": features, "feat_logits": logits, "feat_logits_f64": logits}
    ours |= {"feat_logits_unbiased": unbiased}
    ours |= {f"feat_{size}": layers[layer].mean((1, 2), np.float64) for size, layer in means.items()}
    pixels = [layers[name].astype(np.float64) for name in reference.description(GROUP)["stages"]]
    ours |= {"stage_mean": np.stack([layer.mean((1, 2, 3)) for layer in pixels])}
    ours |= {"stage_std": np.stack([layer.std((1, 2, 3)) for layer in pixels])}
    ours |= {"stage_absmax": np.stack([abs(layer).max((1, 2, 3)) for layer in pixels])}
    ours |= {"input_mean_std": np.stack([f(np.asarray(x, np.float64), (1, 2, 3)) for f in (np.mean, np.std)])}
    for name, layer in layers.items():
        c = layer.shape[1] // 2
        ours[f"chan_mean/{name}"] = layer.mean((1, 2), np.float64)
        ours[f"crop/{name}"] = layer[:, c : c + 3, c : c + 3, :8].transpose(0, 3, 1, 2)
        ours[f"corner/{name}"] = layer[:, :3, :3, :8].transpose(0, 3, 1, 2)
    errors = {key: relative_error(value, theirs(key)) for key, value in ours.items() if f"{case}/{key}" in stored}
    worst = max(errors, key=errors.get)
    print(f"{case}: {len(errors)} arrays, worst {worst} {errors[worst]:.1e}, features {errors['feat_2048']:.1e}")
    assert {"feat_2048", "feat_logits"} <= errors.keys()
    assert errors[worst] < 1e-5


@pytest.mark.parametrize("mode", inception.MODES)
def test_resize_equals_published(mode):
    stored = reference.arrays(GROUP)
    grid, _ = inception.MODES[mode]
    unit = 1.0 if mode == "tf" else 255.0
    resized = lambda x: np.asarray(inception.resize(x.astype(np.float32), grid)).transpose(0, 3, 1, 2) / unit
    small = resized(stored["img32"])
    ours = {"resized_img0": small[0], "resized_img12_sub": small[1:, :, ::13, ::13]}
    for name, shape in {"imgbig": (1, 400, 330, 3), "imgrect": (1, 48, 64, 3)}.items():
        image = np.floor(256 * reference.uniform(f"fixI/{name}", shape)).astype(np.uint8)
        ours[f"resize_only_{name}"] = resized(image)
    compared = 0
    for key in stored.files:
        name = key.removeprefix(f"{mode}/")
        if key.startswith(f"{mode}/resize"):
            label = next(n for n in ours if name == n or name.startswith(n))
            theirs = stored[key]
            value = ours[label]
            value = value if value.shape == theirs.shape else value[..., ::13, ::13].reshape(theirs.shape)
            assert relative_error(value, theirs) < 1e-5, key
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("grid", ["tf1", "half_pixel"])
def test_resize_identities(grid):
    """Nothing changes at the target size or on a constant; linear ramps stay linear away from the border."""
    x = np.random.default_rng(0).random((1, 12, 12, 3), np.float32)
    np.testing.assert_array_equal(inception.resize(x, grid, 12), x)
    np.testing.assert_allclose(inception.resize(np.full((1, 5, 7, 1), 3.0, np.float32), grid, 12), 3.0, rtol=1e-6)
    ramp = np.broadcast_to(np.arange(6, dtype=np.float32)[None, :, None, None], (1, 6, 6, 1))
    out = np.asarray(inception.resize(ramp, grid, 12))[0, 2:9, 0, 0]
    first = {"tf1": 1.0, "half_pixel": 0.75}[grid]  # output pixel 2 of 12 over 6
    np.testing.assert_allclose(out, first + 0.5 * np.arange(7), rtol=1e-6)


def test_input_range():
    levels = jnp.array([0, 255], jnp.uint8).reshape(1, 1, 2, 1).repeat(3, 3)
    for mode, (low, high) in {"tf": (-1, 127 / 128), "pf": (-1, 1)}.items():
        x = inception.preprocess(levels, *inception.MODES[mode])
        assert x.shape == (1, 299, 299, 3)
        np.testing.assert_allclose([x.min(), x.max()], [low, high], rtol=1e-6)


# -- The file --


def torch_sequence(state: dict[str, np.ndarray]) -> bytes:
    """A state_dict as PyTorch before 1.6 saved it."""
    text = lambda word: b"X" + struct.pack("<I", len(word)) + word.encode()
    whole = lambda n: b"J" + struct.pack("<i", n)
    tuple_of = lambda numbers: b"(" + b"".join(whole(n) for n in numbers) + b"t"
    program = b"\x80\x02ccollections\nOrderedDict\n)R("
    for name, array in state.items():
        kind = {"float32": "Float", "int64": "Long"}[array.dtype.name]
        storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(name) + text("cpu")
        storage += whole(array.size) + b"NtQ"
        strides = [n // array.itemsize for n in array.strides]
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(0) + tuple_of(array.shape)
        program += text(name) + tensor + tuple_of(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    program += b"u."
    machine = dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4))
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    keys = sorted(state)
    data = [struct.pack("<q", state[key].size) + state[key].tobytes() for key in keys]
    return b"".join([*head, program, pickle.dumps(keys, 2), *data])


def zeros_state() -> dict[str, np.ndarray]:
    """Shapes alone, from the network itself."""
    template = jax.eval_shape(inception.Inception().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))["params"]
    state = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    leaves = {name: leaf for name, leaf in template.items() if "kernel" in leaf and name != "fc"}
    leaves |= {f"{a}.{b}": leaf for a in template if a.startswith("Mixed") for b, leaf in template[a].items()}
    for name, leaf in leaves.items():
        height, width, channels_in, channels = leaf["kernel"].shape
        state[f"{name}.conv.weight"] = np.zeros((channels, channels_in, height, width), np.float32)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.bn.{entry}"] = np.ones(channels, np.float32)
        state[f"{name}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    return state


def random_state() -> dict[str, np.ndarray]:
    """Weights that keep the size of activations."""
    random, state = np.random.default_rng(0), zeros_state()
    for name, array in state.items():
        if name.endswith("conv.weight"):
            state[name] = random.normal(size=array.shape, scale=np.sqrt(2 / array[0].size)).astype(np.float32)
    return state


def test_weights_file(tmp_path):
    """Read without executing it; known by its hash; anything but the network's own arrays is refused."""
    state = zeros_state()
    state["Mixed_6b.branch7x7_2.conv.weight"] = np.random.default_rng(0).random((128, 128, 1, 7), np.float32)
    path = tmp_path / "weights.pth"
    path.write_bytes(torch_sequence(state))
    with pytest.raises(UserError, match="not the standard FID network"):
        inception.load(path)
    params, sha256 = inception.load(path, any_weights=True)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    gains = sum(array.size for name, array in state.items() if name.endswith("bn.weight"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 23_850_960 - gains
    kernel = state["Mixed_6b.branch7x7_2.conv.weight"].transpose(2, 3, 1, 0) / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(params["Mixed_6b"]["branch7x7_2"]["kernel"], kernel, rtol=1e-6)

    for change, told in (
        ({"fc.bias": np.zeros(1000, np.float32)}, "fc.bias of shape"),
        ({"AuxLogits.fc.bias": np.zeros(3, np.float32)}, "no place for 1 entries"),
    ):
        with pytest.raises(UserError, match=told):
            inception.params_of(state | change)
    del state["fc.bias"]
    with pytest.raises(UserError, match=r"fc.bias .* found none"):
        inception.params_of(state)


def test_damaged_files(tmp_path):
    whole = torch_sequence({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(2)})
    path = tmp_path / "weights.pth"
    path.write_bytes(whole)
    found = inception.read_checkpoint(path).model
    np.testing.assert_array_equal(found["a"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(found["b"], np.arange(2))
    for bad in (
        whole[:-1],
        whole[:200],
        whole[:20],
        pickle.dumps({"a": 1}, 2),
        whole.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
        whole.replace(b"little_endian", b"little_endiaN"),
        b"",
    ):
        path.write_bytes(bad)
        with pytest.raises(UserError) as told:
            inception.load(path, any_weights=True)
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="cannot read"):
        inception.load(tmp_path / "absent.pth")


@pytest.mark.parametrize("answer", [b"an error page", OSError("no route to host")])
def test_failed_download(tmp_path, monkeypatch, answer):
    """Says what to do in one line and leaves nothing behind."""

    def urlopen(url, timeout):
        if isinstance(answer, OSError):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match="--inception_weights=PATH") as told:
        inception.download(tmp_path)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.environ.get("ALL_NETWORKS"), reason="takes a minute; set ALL_NETWORKS=1")
def test_unknown_weights_to_distances(tmp_path):
    """From a weights file through features and a statistics file to every distance; named for what it is, not FID."""
    path = tmp_path / "weights.pth"
    path.write_bytes(torch_sequence(random_state()))
    network = features.standard(path, mode="pf", any_weights=True)
    assert network.distance == f"FD-inception-{network.sha256[:8]} (pf)"
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)
    found = features.measure(network, lambda start, stop: images[start:stop], 5, batch_size=2)
    file = tmp_path / "statistics.npz"
    features.save(file, features.statistics(found, network.identity()))
    result = features.compare(found, features.load(file, network), subsets=2)
    scale = np.trace(found.moments.covariance)
    assert scale > 0
    assert abs(result["frechet"]) < 1e-9 * scale
    with pytest.raises(UserError, match="made with network"):
        features.load(file, features.standard(path, mode="tf", any_weights=True))


@pytest.mark.skipif(not os.environ.get("ALL_NETWORKS"), reason="takes a minute; set ALL_NETWORKS=1")
def test_unknown_inception_weights_in_the_program(tmp_path):
    """From samples to every distance with the Inception network of random weights; named for their hash, never FID."""
    images = np.random.default_rng(1).integers(0, 256, (12, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "noise.npz", train_images=images[:4], test_images=images[4:8])
    np.savez(tmp_path / "theirs.npz", samples=images[8:])
    (tmp_path / "weights.pth").write_bytes(torch_sequence(random_state()))
    common = [f"--config={ROOT}/configs/digits.py", "--config.data.dataset=noise.npz", "--samples=theirs.npz"]
    weights = ["--inception_weights=weights.pth", "--inception_mode=pf"]
    refused = program("evaluate", *common, *weights, folder=tmp_path)
    assert refused.returncode == 2
    assert "not the standard FID network" in refused.stderr
    out = ok(program("evaluate", *common, *weights, "--any_inception_weights", folder=tmp_path))
    sha256 = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    name = f"FD-inception-{sha256[:8]} (pf)"
    assert f"| {name} | floor: 4 test images |" in out
    assert "gray images as RGB" in out
    assert "Warning: 4 images do not determine a covariance of 2048 features" in out
    result = json.loads((tmp_path / f"runs/evaluated/theirs-{name}.json").read_text())
    assert (result["num_samples"], result["num_reference"], result["weights_sha256"]) == (4, 4, sha256)
    assert result["frechet"] > 0
    assert result["inception_score"] >= 1
    assert {"kernel", "precision", "recall"} <= result.keys()
