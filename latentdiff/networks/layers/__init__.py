"""Building blocks shared by the U-Net and the autoencoder. Parameter names are those of the diffusers layout."""
