"""Families of models, one file each: a tuple FAMILIES of those that share a table of names."""
