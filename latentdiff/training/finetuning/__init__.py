"""Fine-tuning a pretrained model on captioned images.

config       every key of a run, in YAML, as flags and in Python
run          a run from its configuration to its result
material     data -> held-out split, buckets, caches
samples      what each step trains on, as a pure function of seed, step and row
streaming    the same from WebDataset shards in sequence
captions     token ids of captions
store        rows of numbers on disk by key
caches       latents and text embeddings in such stores
loss         a batch -> the loss
methods      what is trained, and the result's file: full, LoRA, textual inversion
task         the above as a task of the training loop
signal       held-out split, losses with fixed noise
sheets       sample pictures during training
copying      whether samples are copies of training images
charts       line charts as SVG
report       the run's report in one HTML file
tensorboard  log and samples for TensorBoard
"""
