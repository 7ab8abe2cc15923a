"""Training from nothing: captioned folder -> VAE -> cached latents -> U-Net and text encoder -> model folder.

config          the YAML of a run, validated
data            captioned folders, decoded images (what fine-tuning reads is in `latentdiff.training.data`)
loop            the one training loop; a `Task` says what is trained
vae_stage       Task: images -> latents -> images
latent_cache    latents of a data set as distributions, on disk
diffusion_stage Task: captions, noisy latents -> prediction
run             the stages in order, and the model folder at the end
"""
