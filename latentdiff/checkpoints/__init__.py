"""Models on disk: loading them in whichever layout they lie, saving, converting, and saying what a file is.

components    a model's parts, loaded from any layout; written as a folder
conversion    from one layout to another, to the bit
inspection    what a file or folder is
folder        the diffusers folder layout: reading and writing
original      the single-file layout of the original code
hub           hub ids and the local cache
files         tensors of .safetensors, .ckpt and .bin files, without running code from them
mapping       tensors as views of a file's pages
raw           a model as names and tensors, before modules are made
modules       modules without weights, and putting weights into them
architecture  what the configurations of a folder must be
infer         configurations from the shapes of tensors
prediction    what a U-Net predicts, found by trying
tables        the names of tensors in foreign layouts
keymap        tables of names that read in both directions
tokenizer     the files of a tokenizer
layout        where a folder keeps its weights
hashing       what a model is called in recipes
embedded      where the model that comes along lies
writing       files that are there whole or not at all
"""
