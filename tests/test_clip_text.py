"""CLIP's text encoder and tokenizer: equal to the published ones."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import tokenizer
from score_sde.errors import UserError
from score_sde.models import clip_text
from tests import reference
from tests.latent import TINY, compared, figures_of, needs_tiny, state_of, tree_in

CASES = [name for name in reference.cases("L_text") if not name.startswith("tokenizer")]
FOLDER = TINY / "tokenizer"


def ran(name: str, dtype: str, layers_less: int = 0):
    config, state = reference.cases("L_text")[name]["config"], state_of("L_text", name)
    network = clip_text.of_state(
        state,
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"] - layers_less,
        activation=config["hidden_act"],
        dtype=dtype,
    )
    params = tree_in(jnp.dtype(dtype), clip_text.from_published(state, network))
    return jax.jit(network.apply)({"params": params}, figures_of("L_text", name)["input_ids"])


@pytest.mark.parametrize("name", CASES)
def test_equal_in_float64(name, x64):
    stored = figures_of("L_text", name)
    h = ran(name, "float64")
    compared(h, stored["last_hidden_state_f64"], 1e-13, name)
    end = stored["input_ids"].argmax(1) if name != "gelu_pad0" else (stored["input_ids"] == 99).argmax(1)
    compared(np.asarray(h)[np.arange(len(h)), end], stored["pooler_output_f64"], 1e-13, f"{name} pooled")
    if "penultimate_final_norm_f64" in stored:
        compared(ran(name, "float64", 1), stored["penultimate_final_norm_f64"], 1e-13, f"{name} penultimate")


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_pad0", "full_width_one_layer"])
def test_equal_in_float32(name):
    compared(ran(name, "float32"), figures_of("L_text", name)["last_hidden_state"], 2e-6, name)


def test_names_of_openclip():
    """The single files' names give the same states, without the last layer."""
    state, theirs = state_of("L_text", "gelu_pad0"), {}
    for name, ours in clip_text.OPENCLIP_TOP.items():
        theirs[name] = state[ours]
    for i in range(3):
        prefix, block = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for leaf in ("weight", "bias"):
            for layer, ours in clip_text.OPENCLIP_LAYER.items():
                theirs[f"{block}{layer}.{leaf}"] = state[f"{prefix}{ours}.{leaf}"]
            rows = [state[f"{prefix}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            theirs[f"{block}attn.in_proj_{leaf}"] = np.concatenate(rows)
    theirs |= {"text_projection": np.zeros((32, 8)), "logit_scale": np.zeros(())}
    network = clip_text.of_state(theirs, heads=4)
    assert (network.layers, network.activation) == (2, "gelu")
    stored = figures_of("L_text", "gelu_pad0")
    h = network.apply({"params": clip_text.from_published(theirs, network)}, stored["input_ids"])
    compared(h, stored["penultimate_final_norm"], 2e-6, "OpenCLIP")


def test_names_of_transformers_5():
    """They lack the prefix; the parameters are the same."""
    state = state_of("L_text", "quick_gelu")
    bare = {name.removeprefix("text_model."): array for name, array in state.items()}
    assert not set(bare) & set(state)
    network = clip_text.of_state(bare, heads=4)
    assert network == clip_text.of_state(state, heads=4)
    jax.tree.map(
        np.testing.assert_array_equal,
        clip_text.from_published(bare, network),
        clip_text.from_published(state, network),
    )


def test_full_size():
    case = reference.description("L_text")["full_size"]["clip_vit_l14_text"]
    state = {entry: np.broadcast_to(np.float32(0), shape) for entry, shape, *_ in case["state_dict"]}
    network = clip_text.of_state(state)
    assert network == clip_text.CLIPText()
    assert sum(leaf.size for leaf in jax.tree.leaves(clip_text.from_published(state, network))) == case["n_params"]


def test_another_familys_file_is_refused():
    with pytest.raises(UserError, match="no text encoder"):
        clip_text.of_state({"a.weight": np.zeros(3)})


@needs_tiny
def test_tokens():
    case, stored = reference.cases("L_text")["tokenizer_sd_tiny"], figures_of("L_text", "tokenizer_sd_tiny")
    read = tokenizer.read(FOLDER)
    assert read.vocab_size == case["vocab_size"]
    tokens, cut = read([row["text"] for row in case["rows"]])
    for row, numbers, excess in zip(case["rows"], tokens.tolist(), cut, strict=True):
        assert numbers == row["fast_77"], row["text"]
        assert excess == max(0, len(row["fast"]) - 77)
    np.testing.assert_array_equal(tokens, stored["fast_input_ids_77"])


@needs_tiny
def test_padding_of_its_own(tmp_path):
    for name in tokenizer.FILES[:2]:
        shutil.copy(FOLDER / name, tmp_path)
    assert tokenizer.read(tmp_path)([""])[0][0, -1] == 673
    for pad in ("!", {"content": "!"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
        np.testing.assert_array_equal(tokenizer.read(tmp_path)([""])[0][0], [672, 673] + [0] * 75)


@needs_tiny
@pytest.mark.parametrize(
    "name, content",
    [
        ("vocab.json", None),
        ("vocab.json", "{"),
        ("vocab.json", "[1]"),
        ("vocab.json", '{"a": 0, "b": 7}'),
        ("vocab.json", '{"a": 0, "b": 1}'),
        ("merges.txt", None),
        ("merges.txt", "no such"),
        ("merges.txt", "a b c"),
        ("tokenizer_config.json", '{"pad_token": "nothing like it"}'),
    ],
)
def test_bad_files_are_one_line(name, content, tmp_path):
    for file in tokenizer.FILES:
        shutil.copy(FOLDER / file, tmp_path)
        (tmp_path / file).chmod(0o644)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as refused:
        tokenizer.read(tmp_path)
    assert "\n" not in str(refused.value)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        tokenizer.read(tmp_path)
