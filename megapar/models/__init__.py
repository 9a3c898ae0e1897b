"""Transformers, written once and readable without knowing a layout."""
