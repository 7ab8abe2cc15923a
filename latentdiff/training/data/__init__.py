"""Captioned images: what there is, and how training sees it.

dataset         sources of any layout as one indexed data set
folders         layouts: metadata files, captions beside the images
shards          layouts: WebDataset tar files
huggingface     layouts: data sets saved on disk or by hub id
images          decoding: upright, sRGB, 8 bits, transparency on a colour
buckets         sizes by aspect ratio, and the order of the batches
transforms      scaling, cropping, flipping, to numbers and back
captions        choice, shuffling and dropout of captions; those that are too long
tokens          token ids of captions, remembered
stream          WebDataset shards in order, without an index in memory
check           what training will see, before anything is spent
randomness      every random number as a pure function of (seed, purpose, step, row)
"""

from latentdiff.training.data.dataset import Dataset, DataSource, read_dataset

__all__ = ["DataSource", "Dataset", "read_dataset"]
