"""Training, from nothing (`stages`) and of a model that there is (`finetuning`), on one stack.

config          what their configurations share
data            captioned images of any layout, and how training sees them
samples         captioned images as the numbers that a step takes
store, caches   what does not change, on disk: latents, embeddings of captions
material        what is trained on and measured on
objective       noise levels, targets, weights
loss            a batch -> the loss
validation      held-out split, losses with fixed noise
denoising       all of the above as a `Task`
task, loop      the one training loop, and what it needs to know of a task
checkpoint, ema, journal, lean, optimizer, prefetch, sharding, stop_signals    what the loop is made of
sheets          sample images during training, by the public pipeline
report          log, curves, samples and copies on one page
stages          from nothing: VAE, decoder, U-Net with text encoder
finetuning      full, LoRA, textual inversion
"""
