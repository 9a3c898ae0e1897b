"""State on disk in logical coordinates: written in one layout, read in any."""

from megapar.checkpoint.format import Manifest, find_checkpoint, read_manifest
from megapar.checkpoint.load import load, load_weights
from megapar.checkpoint.save import save

__all__ = ["Manifest", "find_checkpoint", "load", "load_weights", "read_manifest", "save"]
