"""The network families of Song et al. 2021, Appendix H, as arguments of score_sde.models."""

from ml_collections import ConfigDict


def ddpmpp(**changes) -> ConfigDict:
    """DDPM++: BigGAN blocks, rescaled skips, no FIR, positional embedding; 4 blocks per level, 8 when deep."""
    return ConfigDict(
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
            scale_by_sigma=False,
            nonlinearity="swish",
            init_scale=0.0,
            conditional=True,
            num_classes=0,
            dtype="float32",
            remat=False,
        )
        | changes
    )


def ncsnpp(**changes) -> ConfigDict:
    """NCSN++: DDPM++ with FIR resampling and a residual input pyramid."""
    return ddpmpp(**(dict(fir=True, progressive_input="residual") | changes))


def ncsnpp_ve(**changes) -> ConfigDict:
    """NCSN++ for the VE SDE: told log sigma through random Fourier features, its output divided by sigma."""
    return ncsnpp(**(dict(embedding_type="fourier", scale_by_sigma=True) | changes))
