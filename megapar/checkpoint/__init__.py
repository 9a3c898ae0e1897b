"""State on disk in logical coordinates: written in one layout, read in any."""

from megapar.checkpoint.format import Manifest, find_checkpoint, read_manifest
from megapar.checkpoint.load import load, load_parameters, load_weights
from megapar.checkpoint.save import HostCopies, Saving, keep_newest, save

__all__ = [
    "HostCopies",
    "Manifest",
    "Saving",
    "find_checkpoint",
    "keep_newest",
    "load",
    "load_parameters",
    "load_weights",
    "read_manifest",
    "save",
]
