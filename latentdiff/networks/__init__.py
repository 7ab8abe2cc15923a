"""The networks of a latent diffusion model, and how they are called.

config        what a U-Net and a VAE look like, as diffusers' files say it
unet          noisy latents, timestep and text to a prediction
vae           images to latents and back
text_encoder  token ids to embeddings
conditioning  what steers the U-Net
steering      the U-Net as a denoiser that follows prompts, and never gives NaN
taps          reading and replacing what named modules take and give
layers        what they are built from
attention     one function, several back ends
"""
