"""LoRA and its relatives: small files of changes to a model. Making, attaching, merging, reading and writing them."""
