"""How a run went: its log, its curves and samples on one page, whether it copies.

log             log.jsonl, and the best step
page            the report in one HTML file
charts          curves, by matplotlib
memorization    whether samples are copies of training images
tensorboard     the log for TensorBoard
wandb_run       the log for Weights & Biases
"""
