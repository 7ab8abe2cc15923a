"""Restoring damaged images: operators say what happened, methods bring the model and the measurement together."""
