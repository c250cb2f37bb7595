"""The published network families, as arguments of score_sde.models.

DDPM++ and NCSN++: Song et al. 2021, Appendix H; DDPM: Ho et al. 2020; NCSN, NCSNv2: Song & Ermon 2019, 2020.
"""

from ml_collections import ConfigDict


def ddpmpp(**changes) -> ConfigDict:
    """DDPM++: BigGAN blocks, rescaled skips, no FIR, positional embedding; 4 blocks per level, 8 when deep."""
    return _locked(
        dict(
            name="ncsnpp",
            nf=128,
            ch_mult=(1, 2, 2, 2),
            num_res_blocks=4,
            attn_resolutions=(16,),
            dropout=0.1,
            resblock_type="biggan",
            resamp_with_conv=True,
            skip_rescale=True,
            fir=False,
            fir_kernel=(1, 3, 3, 1),
            progressive="none",
            progressive_input="none",
            progressive_combine="sum",
            embedding_type="positional",
            fourier_scale=16.0,
            nonlinearity="swish",
            init_scale=0.0,
            conditional=True,
            num_classes=0,
            dtype="float32",
            remat=False,
            patch_size=1,
        )
        | changes
    )


def ncsnpp(**changes) -> ConfigDict:
    """NCSN++: DDPM++ with FIR resampling and a residual input pyramid."""
    return ddpmpp(**(dict(fir=True, progressive_input="residual") | changes))


def ncsnpp_ve(**changes) -> ConfigDict:
    """NCSN++ for the VE SDE: told log sigma through random Fourier features."""
    return ncsnpp(**(dict(embedding_type="fourier") | changes))


def ncsnpp_256(**changes) -> ConfigDict:
    """NCSN++ for the VE SDE at 256x256: seven resolutions, input and output as sums over them."""
    large = dict(
        ch_mult=(1, 1, 2, 2, 2, 2, 2),
        num_res_blocks=2,
        dropout=0.0,
        progressive="output_skip",
        progressive_input="input_skip",
    )
    return ncsnpp_ve(**(large | changes))


def ncsnpp_1024(**changes) -> ConfigDict:
    """NCSN++ for the VE SDE at 1024x1024: eight resolutions, from 16 features up."""
    return ncsnpp_256(**(dict(nf=16, ch_mult=(1, 2, 4, 8, 16, 32, 32, 32), num_res_blocks=1) | changes))


def ddpm(**changes) -> ConfigDict:
    """The U-Net of DDPM."""
    return _locked(
        dict(
            name="ddpm",
            nf=128,
            ch_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attn_resolutions=(16,),
            dropout=0.1,
            resamp_with_conv=True,
            nonlinearity="swish",
            conditional=True,
            dtype="float32",
        )
        | changes
    )


def ddpm_256(**changes) -> ConfigDict:
    """DDPM at 256x256."""
    return ddpm(**(dict(ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0) | changes))


def ncsnv2(size: int) -> ConfigDict:
    """NCSNv2 for images of side 64 (and 32), 128 or 256: an unconditional RefineNet."""
    return _locked(dict(name=f"ncsnv2_{size}", nf=128, nonlinearity="elu"))


def ncsn(*, num_scales: int) -> ConfigDict:
    """NCSN: a RefineNet whose normalizations are conditional on the index of the noise level, one of num_scales."""
    return _locked(dict(name="ncsn", nf=128, nonlinearity="elu", num_scales=num_scales))


def _locked(arguments: dict) -> ConfigDict:
    return ConfigDict(arguments).lock()
