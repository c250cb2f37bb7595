"""Files of EDM and of guided diffusion: read without running anything in them, and equal to what they hold."""

import pickle
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from score_sde.denoiser import noise_fn
from score_sde.errors import UserError
from score_sde.foreign import read_checkpoint
from score_sde.models.ddpm import DDPM
from score_sde.models.published import convert, to_torch
from score_sde.models.published_unets import from_edm, from_guided_diffusion
from score_sde.sde import EDM
from tests import reference
from tests.test_fuzz import damaged, refusals, watched
from tests.test_unet import adm, compared, edm, figures_of, quick_jit

EDM_FILES = ["edm_tiny.pkl", "edm_tiny_torch2.pkl"]
FILES = [*EDM_FILES, "adm_tiny.pt"]


@pytest.mark.parametrize("file", EDM_FILES)
def test_an_edm_file_gives_every_tensor_and_the_arguments(file):
    case = reference.cases("X_edm")[f"ckpt/{file}"]
    foreign = read_checkpoint(reference.file(f"ckpt/{file}"))
    assert (foreign.kind, foreign.model, foreign.step) == ("edm", None, None)
    assert list(foreign.ema) == [name for name, _, _ in case["state_dict"]]
    for name, array in foreign.ema.items():
        assert zlib.crc32(np.ascontiguousarray(array, "<f4").tobytes()) == case["crc32"][name], name
    assert foreign.arguments == case["kwargs"] | {"class_name": case["precond"]}


@pytest.mark.parametrize("file", FILES)
def test_tiny_files_give_the_stored_outputs(file, x64):
    foreign = read_checkpoint(reference.file(f"ckpt/{file}"))
    group = "X_adm" if file.startswith("adm") else "X_edm"
    case, figures = reference.cases(group)[f"ckpt/{file}"], figures_of(group, f"ckpt/{file}")
    x = reference.nhwc(figures["x"]).astype(np.float64)
    if group == "X_adm":
        network, shape = adm(case["network"], case["kwargs"], dtype="float64")
        params = {"params": from_guided_diffusion(foreign.model, network, shape)}
        t, y = figures["t"].astype(np.float64), figures["y"].astype(np.int32)
        compared(quick_jit(network.apply)(params, x, t, y), reference.nhwc(figures["out_f64"]), 1e-9, file)
        return
    network, shape = edm(case["precond"], case["kwargs"], dtype="float64")
    params = {"params": from_edm(foreign.ema, network, shape)}
    sigma = jnp.asarray(figures["sigma"], jnp.float64)
    y = figures["class_labels"].astype(np.float64) if "class_labels" in figures else None
    output, label = {"EDMPrecond": ("edm", "edm"), "iDDPMPrecond": ("vp", "iddpm")}[case["precond"]]
    augment = figures["augment_labels"].astype(np.float64) if "augment_labels" in figures else None
    apply = lambda u, told: network.apply(params, u, told, y, augment=augment)
    eps = jax.jit(noise_fn(apply, EDM(), output=output, label=label))(jnp.asarray(x), sigma)
    D = x - sigma[:, None, None, None] * eps
    compared(D, reference.nhwc(figures["D_f64"]), 1e-9, file)


@pytest.mark.parametrize("file", EDM_FILES)
def test_damaged_edm_files(file, tmp_path):
    """Refused in one line or read, in bounded memory; nothing is executed."""
    content = reference.file(f"ckpt/{file}").read_bytes()
    assert refusals(read_checkpoint, tmp_path / "a.pkl", content, 30 * [damaged]) > 5  # most bytes are numbers


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def module(class_name: str = "EDMPrecond", **state) -> bytes:
    """Pickles {"ema": an object with these attributes}, by hand: its class is in no module here."""
    meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": class_name, "state": state}
    inner = pickle.dumps(meta, 4)[2:-1]
    start = b"\x80\x04}\x8c\x03ema\x8c\x17torch_utils.persistence\x8c\x1b_reconstruct_persistent_obj\x93"
    return start + inner + b"\x85Rs."


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps({"ema": Calls(exec, "raise SystemExit")}, 4), "asks for builtins.exec"),
        (pickle.dumps({"ema": Calls(getattr, 1, "real")}, 4), "asks for builtins.getattr"),
        (pickle.dumps({"ema": 3}, 4), "a int where a _Object belongs"),
        (pickle.dumps([1, 2], 4), "a list where a dict belongs"),
        (pickle.dumps({"other": 3}, 4), "a NoneType where a _Object belongs"),
        (module(_parameters={"w": 3}), "w is no tensor"),
        (module(_modules={"w": 3}), "a int where a _Object belongs"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged"),
    ],
)
def test_hostile_pickles_are_refused_in_one_line(content, told, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    watched.clear()
    with pytest.raises(UserError, match=told) as refusal:
        read_checkpoint(path)
    assert "\n" not in str(refusal.value)
    assert "pickle.find_class" not in watched


def test_program_text_is_not_executed(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(module(_parameters={"w": None}, _init_kwargs={"label_dim": 0}))
    foreign = read_checkpoint(path)
    assert foreign.ema == {} and foreign.arguments == {"label_dim": 0, "class_name": "EDMPrecond"}


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, np.float16)}
    safetensors.numpy.save_file(arrays, path)
    foreign = read_checkpoint(path)
    assert foreign.kind == "torch" and foreign.ema is None and foreign.model.keys() == arrays.keys()
    assert all(np.array_equal(foreign.model[name], arrays[name]) for name in arrays)
    content = path.read_bytes()
    for broken in (content[:-1], content[:20], content.replace(b"F32", b"F99"), b"\xff" * 8 + b"{}"):
        path.write_bytes(broken)
        with pytest.raises(UserError) as refusal:
            read_checkpoint(path)
        assert "\n" not in str(refusal.value)


def test_a_file_of_another_network_is_refused():
    foreign = read_checkpoint(reference.file("ckpt/edm_tiny.pkl"))
    network, shape = edm("EDMPrecond", reference.cases("X_edm")["ckpt/edm_tiny.pkl"]["kwargs"])
    for changes, told in (
        (dict(nf=32), "gives shape"),
        (dict(num_res_blocks=2), "has no enc"),
        (dict(augment_dim=0), "no place for"),
        (dict(resblock_type="ddpm"), "has no "),
        (dict(fir=True, fir_kernel=(1, 3, 3, 1)), "not the filter"),
    ):
        with pytest.raises(UserError, match=told):
            from_edm(foreign.ema, network.clone(**changes), shape)
    with pytest.raises(UserError, match="none of guided diffusion"):
        from_guided_diffusion(foreign.ema, *adm("UNetModel", reference.cases("X_adm")["adm256_like"]["kwargs"]))


def test_the_importer_takes_the_converter_of_file_and_network():
    read = lambda file: read_checkpoint(reference.file(f"ckpt/{file}"))
    adm_tiny, edm_tiny = (
        adm("UNetModel", reference.cases("X_adm")["ckpt/adm_tiny.pt"]["kwargs"]),
        edm("EDMPrecond", reference.cases("X_edm")["ckpt/edm_tiny.pkl"]["kwargs"]),
    )
    for file, (network, shape) in (("adm_tiny.pt", adm_tiny), ("edm_tiny.pkl", edm_tiny)):
        foreign = read(file)
        assert convert(foreign.kind, foreign.ema or foreign.model, network, shape)
    for file, (network, shape), told in (
        ("adm_tiny.pt", edm_tiny, "has no all_modules"),
        ("edm_tiny.pkl", adm_tiny, "gives shape|has no"),
        ("edm_tiny.pkl", (DDPM(), (8, 8, 3)), "networks ncsnpp and unet, the configured one is DDPM"),
        ("torch_checkpoint_7.pth", adm_tiny, "none of guided diffusion"),
    ):
        foreign = read(file)
        with pytest.raises(UserError, match=told):
            convert(foreign.kind, foreign.ema or foreign.model, network, shape)
    with pytest.raises(UserError, match="no network of this family"):
        to_torch({}, *adm_tiny)
