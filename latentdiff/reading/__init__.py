"""The one door for files: whatever comes from outside passes a reader of this wing.

Each reader has limits on size, depth and counts, follows nothing out of the file, runs nothing in it, and gives plain
checked values or an error of latentdiff that names the file, the place in it and what to do. Nothing here knows torch:
tensors are described by where they lie.
"""
