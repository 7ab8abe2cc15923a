"""What changes a model without touching its weights.

lora               low-rank changes: making, attaching, merging, reading and writing them
textual_inversion  learned words for a text encoder
"""
