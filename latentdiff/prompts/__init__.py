"""From a prompt to token ids and weights; nothing here knows a network.

syntax      what a prompt says: tags, parts joined by AND, stages over the steps, runs of one weight, chunks of tokens
tags        `<lora:name:weight>`
stages      text that changes on the way: `[from:to:when]`, `[a|b]`
weights     attention weights, as AUTOMATIC1111 and as ComfyUI read them
account     what a prompt means, as a table
lines       prompt files with options on each line
wildcards   `{a|b}` and `__name__`
tokenizer   CLIP's byte-pair encoding
tokenize    which words of a plain prompt do not fit
words       which words a small model knows
notice      what is said when a prompt is not read as its author may think
"""
