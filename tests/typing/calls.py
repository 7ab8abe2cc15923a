"""Calls that a type checker has to flag, in the lines that say so, and calls that it has to pass; see test_calls.py."""

from __future__ import annotations

from typing import assert_type

from PIL import Image
from torch import Tensor

from latentdiff import Pipeline, image_to_image, inpaint, interpolate, invert, restore, save_png, translate
from latentdiff.tasks.restoration.operators import Denoise

pipe = Pipeline.load(device="cpu", precision="bf16")

images = pipe("a cat", steps=3, guidance_scale=5, seed=[1, 2], num_images=2, sampler="unipc", spacing=None)
assert_type(images, list[Image.Image])
assert_type(pipe("a cat", output="latents", height=64), Tensor)
save_png(images[0], "cat.png")
assert_type(image_to_image(pipe, images[0], "a dog", strength=0.5, steps=4), list[Image.Image])
interpolate(pipe, ["a cat", "a dog"], frames=3, guidance_interval=(0.1, 9.0))
assert_type(restore(pipe, "damaged.png", Denoise(noise_std=0.1), seed=0).images, list[Image.Image])
translate(pipe, invert(pipe, "cat.png"), "a dog", method="direct", batch_size=1)

pipe("a cat", stepz=3)  # flagged
pipe("a cat", guidance_scale="strong")  # flagged
pipe("a cat", seed=1.5)  # flagged
pipe("a cat", sampler="heun2")  # flagged
pipe("a cat", num_inference_steps=3)  # flagged
pipe("a cat", output="numpy")  # flagged
pipe(3)  # flagged
Pipeline.load(precision="half")  # flagged
Pipeline.load(low_memry=True)  # flagged
image_to_image(pipe, images[0], "a dog", strenght=0.5)  # flagged
image_to_image(pipe, images[0], "a dog", steps="4")  # flagged
inpaint(pipe, images[0], None, "a dog", extend=(8, 0, 0))  # flagged
interpolate(pipe, ["a cat", "a dog"], height="64")  # flagged
restore(pipe, "damaged.png", Denoise(noise_std=0.1), cache_interval=2)  # flagged
translate(pipe, "cat.png", "a dog", method="magic")  # flagged
invert(pipe, "cat.png", stepz=3)  # flagged
