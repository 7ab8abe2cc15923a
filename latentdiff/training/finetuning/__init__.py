"""Fine-tuning a pretrained model on captioned images: what is its own.

config       every key of a run, in YAML, as flags and in Python
finetune     a run from its configuration to its result
material     data -> held-out split and buckets
streaming    batches from WebDataset shards in sequence
methods      what is trained, and the result's file: full, LoRA, textual inversion
"""
