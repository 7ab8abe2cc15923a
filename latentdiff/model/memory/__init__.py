"""How much memory an image takes, how much there is, and doing with less of it.

parts        networks whose weights are read when they are first used and can be given back
streaming    a U-Net whose weights pass through memory block by block
estimate     how much an image will take, known before anything is allocated, and how much there is
"""
