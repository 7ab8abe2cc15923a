"""Training from nothing: captioned images -> VAE -> cached latents -> U-Net and text encoder -> model folder.

config      the YAML of a run, validated
networks    made with seeded weights, written and read between the stages
pixels      decoded images, mapped into memory
vae         Task: images -> latents -> images
scenes      what the metadata says of composed scenes
text        Task: captions -> what their scenes hold
close_ups   batches of parts of scenes around one thing
diffusion   captions, noisy latents -> prediction, as a denoising task
words       which words a model was trained on, in a file of its folder
train       the stages in order, and the model folder at the end
"""
