"""megapar from a notebook or a script: what `import megapar` offers. docs/library.md shows it.

`settings` turns the arguments of a call into a configuration, `model` is the module, `gradients` makes them `.grad`,
`batch` deals a batch out, `optimizer` is ours, `schedules` looks at pipeline schedules.
"""
