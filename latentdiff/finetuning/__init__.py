"""Fine-tuning a pretrained model on captioned images."""
