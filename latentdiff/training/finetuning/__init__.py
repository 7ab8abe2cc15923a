"""Fine-tuning a pretrained model on captioned images: what is its own.

config       every key of a run, in YAML, as flags and in Python
finetune     a run from its configuration to its result
preparation  model, data, caches and trainer of a run
finishing    the result, the look for copies, the report
forecast     what a run will take; `trial` measures it
material     data -> held-out split and buckets
streaming    batches from WebDataset shards in sequence
methods      what is trained, and the result's file: full, LoRA, textual inversion
"""
