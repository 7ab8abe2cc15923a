"""From an image back to noise, in ways that sampling can come back from."""

from latentdiff.tasks.inversion.artefact import Inversion as Inversion
from latentdiff.tasks.inversion.artefact import is_inversion as is_inversion
from latentdiff.tasks.inversion.run import invert as invert
from latentdiff.tasks.inversion.run import reconstruct as reconstruct
