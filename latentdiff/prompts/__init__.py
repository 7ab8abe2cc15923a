"""From a prompt to token ids.

tokenizer  CLIP's byte-pair encoding
tokenize   token ids of prompts, and which words do not fit
"""
