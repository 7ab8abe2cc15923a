"""A model in memory: how it is loaded and moved, adapted, prompted, and shared among threads and processes."""
