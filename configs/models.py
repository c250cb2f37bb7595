"""The published network families, as arguments of score_sde.models.

DDPM++ and NCSN++: Song et al. 2021, Appendix H; DDPM: Ho et al. 2020; NCSN, NCSNv2: Song & Ermon 2019, 2020; ADM and
its classifier: Dhariwal & Nichol 2021, Table 11 and section 4; what EDM makes of them: Karras et al. 2022, Table 7.
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


def edm_ddpmpp(**changes) -> ConfigDict:
    """DDPM++ as EDM trains it: told classes and augmentations before the embedding; three levels of equal width."""
    edm = dict(
        ch_mult=(2, 2, 2),
        dropout=0.13,
        class_embedding="linear",
        augment_dim=9,
        channel_mult_noise=1,
        channel_mult_emb=4,
        log_label=False,
        fir_reversed=True,
        learn_sigma=False,
    )
    return ddpmpp(**(edm | changes))


def edm_ncsnpp(**changes) -> ConfigDict:
    """NCSN++ as EDM trains it: its label enters the random Fourier features as it is."""
    fourier = dict(fir=True, progressive_input="residual", embedding_type="fourier", channel_mult_noise=2)
    return edm_ddpmpp(**(fourier | changes))


def adm(**changes) -> ConfigDict:
    """ADM, class-conditional: heads of 64 channels, blocks that resample, learned variances."""
    return _locked(
        _encoder(nf=256, ch_mult=(1, 1, 2, 2, 4, 4), attn_levels=(3, 4, 5))
        | dict(
            name="unet",
            num_heads_upsample=0,
            num_classes=1000,
            augment_dim=0,
            low_res=False,
            learn_sigma=True,
        )
        | changes
    )


def adm_64(**changes) -> ConfigDict:
    """ADM at 64x64."""
    return adm(**(dict(nf=192, ch_mult=(1, 2, 3, 4), num_res_blocks=3, attn_levels=(1, 2, 3), dropout=0.1) | changes))


def adm_512(**changes) -> ConfigDict:
    """ADM at 512x512: twice the channels of 256x256 in features of half the width; told the time as there."""
    wide = dict(nf=128, ch_mult=(1, 2, 2, 4, 4, 8, 8), attn_levels=(4, 5, 6), channel_mult_noise=2, channel_mult_emb=8)
    return adm(**(wide | changes))


def adm_upsampler(**changes) -> ConfigDict:
    """ADM-U, which enlarges small images: four heads of any width."""
    return adm(**(dict(nf=192, num_heads=4, head_channels=0, low_res=True) | changes))


def adm_classifier(**changes) -> ConfigDict:
    """The classifier that guides ADM: half of its U-Net, with attention pooling."""
    return _locked(
        _encoder(nf=128, ch_mult=(1, 1, 2, 2, 4, 4), attn_levels=(3, 4, 5))
        | dict(name="unet_classifier", num_outputs=1000, pool="attention")
        | changes
    )


def autoencoder(**changes) -> ConfigDict:
    """The KL autoencoder of latent diffusion, f = 8 (Rombach et al. 2022, appendix G)."""
    return _locked(
        dict(
            name="autoencoder",
            nf=128,
            ch_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            attn_levels=(),
            z_channels=4,
            embed_dim=4,
            num_codes=0,
            channels=3,
            groups=32,
            dtype="float32",
        )
        | changes
    )


def _encoder(**changes) -> dict:
    """What ADM and its classifier share."""
    return (
        dict(
            num_res_blocks=2,
            num_heads=1,
            head_channels=64,
            groups=32,
            scale_shift=True,
            resblock_updown=True,
            conv_resample=True,
            channel_mult_noise=1,
            channel_mult_emb=4,
            dropout=0.0,
            dtype="float32",
            remat=False,
        )
        | changes
    )


def _locked(arguments: dict) -> ConfigDict:
    return ConfigDict(arguments).lock()
