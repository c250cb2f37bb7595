"""Prompts: read, and made the conditions of a model that draws what they say."""

import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build, parts, runs
from score_sde import latents, tokenizer
from score_sde.denoiser import by_turns
from score_sde.errors import UserError

AT_ONCE = 32  # prompts that pass the text encoder together


class Prompts(NamedTuple):
    """What samples show: sample i follows prompt i modulo their number; and what guidance leads away from."""

    texts: Sequence[str]
    negative: str = ""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join([*self.texts, self.negative]).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """A name for files."""
        words = re.sub(r"[^a-z0-9]+", "-", self.texts[0].lower()).strip("-")[:40]
        return f"{words}-{self.fingerprint}" if len(self.texts) == 1 else f"{len(self.texts)}-{self.fingerprint}"

    def record(self) -> dict:
        """For run.json and reports."""
        return dict(prompts=list(self.texts), negative_prompt=self.negative)


def read(
    prompt: str | None, file: str | None, negative: str | None = None, guidance: float | None = None
) -> Prompts | None:
    """The prompts that flags give: one, or those of a text file, one a line; None where there are none."""
    if prompt is not None and file is not None:
        raise UserError("--prompt and --prompts: give one of them")
    if prompt is None and file is None:
        if negative is not None:
            raise UserError("--negative_prompt is what guidance leads away from: it needs --prompt or --prompts too")
        return None
    if negative and guidance in (None, 1):
        raise UserError("--negative_prompt is what guidance leads away from: add its scale, as in --guidance=7.5")
    if file is None:
        return Prompts([prompt], negative or "")
    try:
        lines = pathlib.Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read --prompts={file}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--prompts={file} is no text in UTF-8: give one prompt a line") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--prompts={file} holds no prompts: give one a line")
    return Prompts(texts, negative or "")


def prompted(model: runs.Model, prompts: Prompts | None) -> runs.Model:
    """The model told the prompts; its params are the pair (its own, the contexts of prompts and of the negative one).

    A condition is then the number of a prompt. UserError where the model takes no prompts, or needs some.
    """
    if not model.config.text:
        if prompts is not None:
            raise UserError(f"{model.name} takes no prompts: it has no text encoder")
        return model
    if prompts is None:
        raise UserError(f"{model.name} draws what prompts say: give --prompt='...' or --prompts=FILE, one a line")
    folder, inner = model.workdir, model.diffusion.noise_of
    encoder = build.text_encoder_of(model.config, folder)
    contexts = encode(*encoder, tokenizer.read(folder / parts.TOKENIZER), [*prompts.texts, prompts.negative])

    def noise_of(params, condition=None, keys=None):
        own, contexts = params
        return inner(own, None if condition is None else jnp.asarray(contexts)[condition], keys)

    count = len(prompts.texts)
    told = dict(noise_of=noise_of, null=np.int32(count), conditions=by_turns(count))
    return model._replace(diffusion=model.diffusion._replace(**told), params=(model.params, contexts))


def encode(network, params: dict, read_tokens: tokenizer.Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """The contexts (P, L, D) of texts; says which of them are too long, and are cut."""
    latents.require_fit(network, read_tokens)
    tokens, cut = read_tokens(texts, network.length)
    for text, count in zip(texts, cut, strict=True):
        if count:
            print(f"prompt cut, {count} of its tokens are beyond the {network.length} that fit: {text[:60]!r} ...")
    encode = jax.jit(lambda params, tokens: network.apply({"params": params}, tokens))
    params = jax.tree.map(jnp.asarray, params)
    size = min(AT_ONCE, len(tokens))
    starts = range(0, len(tokens), size)
    rows = [tokens[np.arange(start, start + size).clip(max=len(tokens) - 1)] for start in starts]
    return np.concatenate([np.asarray(encode(params, part)) for part in rows])[: len(tokens)]
