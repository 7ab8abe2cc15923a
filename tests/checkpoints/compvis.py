"""Names and shapes of original single files, listed the way the original programs build their modules.

A reference that shares nothing with the tables under test: it walks through `input_blocks`, `middle_block` and
`output_blocks` as latent-diffusion's openaimodel.py and autoencoder do, and names OpenCLIP's tower as open_clip does.
"""

from __future__ import annotations

import torch

Shapes = dict[str, tuple[int, ...]]


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, out: int, into: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)}


def _linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _resblock(name: str, into: int, out: int, time: int) -> Shapes:
    shapes = _norm(f"{name}.in_layers.0", into) | _conv(f"{name}.in_layers.2", out, into)
    shapes |= _linear(f"{name}.emb_layers.1", out, time)
    shapes |= _norm(f"{name}.out_layers.0", out) | _conv(f"{name}.out_layers.3", out, out)
    return shapes | (_conv(f"{name}.skip_connection", out, into, 1) if into != out else {})


def _transformer(name: str, width: int, context: int, linear: bool, depth: int = 1, crossed: bool = False) -> Shapes:
    shapes = _norm(f"{name}.norm", width)
    for proj in ("proj_in", "proj_out"):
        full = f"{name}.{proj}"
        shapes |= _linear(full, width, width) if linear else _conv(full, width, width, 1)
    for number in range(depth):
        shapes |= _block(f"{name}.transformer_blocks.{number}", width, context, crossed)
    return shapes


def _block(block: str, width: int, context: int, crossed: bool = False) -> Shapes:
    shapes: Shapes = {}
    for attention, into in (("attn1", context if crossed else width), ("attn2", context)):
        shapes |= _linear(f"{block}.{attention}.to_q", width, width, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_k", width, into, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_v", width, into, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_out.0", width, width)
    shapes |= _linear(f"{block}.ff.net.0.proj", 8 * width, width) | _linear(f"{block}.ff.net.2", width, 4 * width)
    for norm in ("norm1", "norm2", "norm3"):
        shapes |= _norm(f"{block}.{norm}", width)
    return shapes


def unet(
    width: int = 320,
    mults: tuple[int, ...] = (1, 2, 4, 4),
    attention: tuple[bool, ...] = (True, True, True, False),
    blocks: int = 2,
    context: int = 768,
    linear: bool = False,
    in_channels: int = 4,
    prefix: str = "model.diffusion_model.",
    depth: tuple[int, ...] = (1, 1, 1, 1),
    told: int = 0,
    labels: int = 0,
    crossed: tuple[bool, ...] = (False,) * 4,
) -> Shapes:
    """`UNetModel` of latent-diffusion, and of generative-models, which has `depth` and is `told` a vector.

    Of the x4 upscaler it has `labels`, and `crossed` are its `disable_self_attentions`.
    """
    time = 4 * width
    shapes = _linear("time_embed.0", time, width) | _linear("time_embed.2", time, time)
    shapes |= _linear("label_emb.0.0", time, told) | _linear("label_emb.0.2", time, time) if told else {}
    shapes |= {"label_emb.weight": (labels, time)} if labels else {}
    shapes |= _conv("input_blocks.0.0", width, in_channels)
    channels, skips, index = width, [width], 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            shapes |= _resblock(f"input_blocks.{index}.0", channels, mult * width, time)
            channels = mult * width
            if attention[level]:
                shapes |= _transformer(
                    f"input_blocks.{index}.1", channels, context, linear, depth[level], crossed[level]
                )
            skips.append(channels)
            index += 1
        if level < len(mults) - 1:
            shapes |= _conv(f"input_blocks.{index}.0.op", channels, channels)
            skips.append(channels)
            index += 1
    shapes |= _resblock("middle_block.0", channels, channels, time)
    shapes |= _transformer("middle_block.1", channels, context, linear, depth[-1])
    shapes |= _resblock("middle_block.2", channels, channels, time)
    index = 0
    for level in reversed(range(len(mults))):
        for block in range(blocks + 1):
            shapes |= _resblock(f"output_blocks.{index}.0", channels + skips.pop(), mults[level] * width, time)
            channels, layer = mults[level] * width, 1
            if attention[level]:
                shapes |= _transformer(
                    f"output_blocks.{index}.1", channels, context, linear, depth[level], crossed[level]
                )
                layer = 2
            if level and block == blocks:
                shapes |= _conv(f"output_blocks.{index}.{layer}.conv", channels, channels)
            index += 1
    shapes |= _norm("out.0", channels) | _conv("out.2", 4, width)
    return {prefix + name: shape for name, shape in shapes.items()}


def _vae_block(name: str, into: int, out: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", into) | _conv(f"{name}.conv1", out, into)
    shapes |= _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out)
    return shapes | (_conv(f"{name}.nin_shortcut", out, into, 1) if into != out else {})


def _vae_middle(name: str, width: int) -> Shapes:
    shapes = _vae_block(f"{name}.mid.block_1", width, width) | _norm(f"{name}.mid.attn_1.norm", width)
    for proj in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.mid.attn_1.{proj}", width, width, 1)
    return shapes | _vae_block(f"{name}.mid.block_2", width, width)


def vae(
    width: int = 128,
    mults: tuple[int, ...] = (1, 2, 4, 4),
    blocks: int = 2,
    latents: int = 4,
    prefix: str = "first_stage_model.",
) -> Shapes:
    """`AutoencoderKL` of latent-diffusion."""
    shapes = _conv("encoder.conv_in", width, 3)
    channels = width
    for level, mult in enumerate(mults):
        for block in range(blocks):
            shapes |= _vae_block(f"encoder.down.{level}.block.{block}", channels, mult * width)
            channels = mult * width
        if level < len(mults) - 1:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    shapes |= _vae_middle("encoder", channels) | _norm("encoder.norm_out", channels)
    shapes |= _conv("encoder.conv_out", 2 * latents, channels)
    shapes |= _conv("quant_conv", 2 * latents, 2 * latents, 1) | _conv("post_quant_conv", latents, latents, 1)
    shapes |= _conv("decoder.conv_in", channels, latents) | _vae_middle("decoder", channels)
    for level in reversed(range(len(mults))):
        for block in range(blocks + 1):
            shapes |= _vae_block(f"decoder.up.{level}.block.{block}", channels, mults[level] * width)
            channels = mults[level] * width
        if level:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    shapes |= _norm("decoder.norm_out", channels) | _conv("decoder.conv_out", 3, channels)
    return {prefix + name: shape for name, shape in shapes.items()}


def clip(
    width: int = 768, layers: int = 12, vocabulary: int = 49408, positions: int = 77, prefix: str = "cond_stage_model."
) -> Shapes:
    """transformers' `CLIPTextModel` as SD 1.x holds it, with the position table that older versions saved."""
    shapes: Shapes = {"embeddings.position_ids": (1, positions)}
    shapes |= {"embeddings.token_embedding.weight": (vocabulary, width)}
    shapes |= {"embeddings.position_embedding.weight": (positions, width)}
    for layer in range(layers):
        name = f"encoder.layers.{layer}"
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{name}.self_attn.{proj}", width, width)
        shapes |= _norm(f"{name}.layer_norm1", width) | _norm(f"{name}.layer_norm2", width)
        shapes |= _linear(f"{name}.mlp.fc1", 4 * width, width) | _linear(f"{name}.mlp.fc2", width, 4 * width)
    shapes |= _norm("final_layer_norm", width)
    return {f"{prefix}transformer.text_model.{name}": shape for name, shape in shapes.items()}


def open_clip(
    width: int = 1024,
    layers: int = 24,
    vocabulary: int = 49408,
    positions: int = 77,
    prefix: str = "cond_stage_model.",
    pooled: int | None = None,
) -> Shapes:
    """The whole text tower of open_clip, as SD 2.x and SDXL hold it."""
    shapes: Shapes = {"positional_embedding": (positions, width), "logit_scale": ()}
    shapes |= {"text_projection": (width, width if pooled is None else pooled)}
    shapes |= {"token_embedding.weight": (vocabulary, width)} | _norm("ln_final", width)
    shapes |= _resblocks(width, layers)
    return {f"{prefix}model.{name}": shape for name, shape in shapes.items()}


def visual(width: int, layers: int, patch: int, projection: int, prefix: str = "embedder.model.visual.") -> Shapes:
    """The image tower of open_clip and of OpenAI's clip, for 224 pixels, as unCLIP files hold it."""
    shapes: Shapes = {"class_embedding": (width,), "positional_embedding": (1 + (224 // patch) ** 2, width)}
    shapes |= {"conv1.weight": (width, 3, patch, patch), "proj": (width, projection)}
    shapes |= _norm("ln_pre", width) | _norm("ln_post", width)
    shapes |= _resblocks(width, layers)
    return {prefix + name: shape for name, shape in shapes.items()}


def x4_upscaler() -> Shapes:
    """The file x4-upscaler-ema, whose `low_scale_model` has a noise schedule."""
    shapes = unet(
        width=256, mults=(1, 2, 2, 4), attention=(False, True, True, True), context=1024, linear=True, in_channels=7,
        labels=1000, crossed=(True, True, True, False),
    )  # fmt: skip
    shapes |= vae(mults=(1, 2, 4)) | open_clip() | {name: (1000,) for name in SCHEDULE_BUFFERS}
    return shapes | {f"low_scale_model.{name}": (1000,) for name in SCHEDULE_BUFFERS[:3]}


def unclip(width: int, layers: int, projection: int) -> Shapes:
    """The files sd21-unclip-h and -l: besides the image tower, the rest of CLIP without its text transformer."""
    shapes = unet(context=1024, linear=True, told=2 * projection) | vae() | open_clip()
    shapes |= visual(width, layers, 14, projection) | {"embedder.model.logit_scale": ()}
    shapes |= {"embedder.model.token_embedding.weight": (49408, projection)}
    return shapes | {f"noise_augmentor.{name}": (1000,) for name in SCHEDULE_BUFFERS[:3]}


SCHEDULE_BUFFERS = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar"
).split()


def tiny_sd1(**unet_options) -> Shapes:
    """A whole SD 1.x file in small: 32 groups and 8 heads, as the layout implies, fit these widths."""
    shapes = unet(width=32, context=32, mults=(1, 2, 2, 2), **unet_options) | vae(width=32, mults=(1, 1, 2, 2))
    return shapes | clip(width=32, layers=3) | {name: (1000,) for name in SCHEDULE_BUFFERS}


def tiny_sd2(**unet_options) -> Shapes:
    """A whole SD 2.x file in small."""
    shapes = unet(width=32, context=32, mults=(1, 2, 2, 2), linear=True, **unet_options)
    return shapes | vae(width=32, mults=(1, 1, 2, 2)) | open_clip(width=32, layers=3)


_FIRST, _SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."


def xl() -> Shapes:
    """The file of SDXL base 1.0."""
    shapes = unet(
        mults=(1, 2, 4), attention=(False, True, True), context=2048, linear=True, depth=(0, 2, 10), told=2816
    )
    return shapes | vae() | clip(prefix=_FIRST) | open_clip(width=1280, layers=32, prefix=_SECOND)


def tiny_xl(**unet_options) -> Shapes:
    """A whole SDXL file in small: six sizes of eight numbers beside twenty of pooled text."""
    shapes = unet(
        width=32, mults=(1, 2, 2), attention=(False, True, True), context=32 + 24, linear=True, depth=(0, 2, 3),
        told=20 + 6 * 8, **unet_options,
    )  # fmt: skip
    shapes |= vae(width=32, mults=(1, 1, 2, 2)) | clip(width=32, layers=3, prefix=_FIRST)
    return shapes | open_clip(width=24, layers=4, pooled=20, prefix=_SECOND)


def tiny_refiner() -> Shapes:
    """A whole file of SDXL's refiner in small."""
    shapes = unet(
        width=32, mults=(1, 2, 2, 2), attention=(False, True, True, False), context=24, linear=True, depth=(0, 2, 2, 2),
        told=20 + 5 * 8,
    )  # fmt: skip
    return shapes | vae(width=32, mults=(1, 1, 2, 2)) | open_clip(width=24, layers=4, pooled=20, prefix=_FIRST)


def with_ema(shapes: Shapes) -> Shapes:
    """Add what LitEma stores: every weight of the U-Net under its name without dots, and two counters."""
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): shape
        for name, shape in shapes.items()
        if name.startswith("model.diffusion_model.")
    }
    return shapes | averaged | {"model_ema.decay": (), "model_ema.num_updates": ()}


def tensors(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Small random values for every name, and Stable Diffusion's for the training schedule."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "alphas_cumprod" in made:
        made["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().float()
        made["alphas_cumprod"] = torch.cumprod(1 - made["betas"], dim=0)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def _resblocks(width: int, layers: int) -> Shapes:
    """The transformer of open_clip's towers."""
    shapes: Shapes = {}
    for layer in range(layers):
        name = f"transformer.resblocks.{layer}"
        shapes |= {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{name}.attn.out_proj", width, width)
        shapes |= _norm(f"{name}.ln_1", width) | _norm(f"{name}.ln_2", width)
        shapes |= _linear(f"{name}.mlp.c_fc", 4 * width, width) | _linear(f"{name}.mlp.c_proj", width, 4 * width)
    return shapes
