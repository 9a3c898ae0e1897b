"""megapar: 3D-parallel Transformer training for research. Importing it imports neither torch nor Hydra."""

__version__ = "0.1.0"
