"""What the networks compute with on a CPU: oneDNN's matrix product, and the choice between it and torch's own forms.

onednn        the product, or what stands in for it where torch or the processor lacks it
choice        which of two forms is faster on this machine, tried once and remembered
"""
