"""The mathematics of diffusion, on callables: no network is imported here.

config            the configuration of a noise schedule
schedule          how much signal and noise each timestep holds
parameterization  what a prediction means: noise, velocity or clean latents
guidance          classifier-free guidance: a denoiser made of a model and two texts
latents           seeds to noise, one generator per image
samplers          one step from a noise level to the next
denoise           the one loop over the steps, and watching it: bar, callback, cancelling
"""
