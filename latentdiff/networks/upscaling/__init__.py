"""Enlarging images by networks that were trained for it, of the ESRGAN family, through spandrel."""
