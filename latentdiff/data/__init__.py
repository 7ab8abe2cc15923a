"""Captioned images: what there is, and how training sees it.

randomness      every random number as a pure function of (seed, purpose, step, row)
"""
