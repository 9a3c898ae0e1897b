"""Hugging Face folders: config.json and safetensors under the names that transformers gives them, read and written.

| file        | what                                                                          |
|-------------|-------------------------------------------------------------------------------|
| `family.py` | what a family is: one name table, and its keys of config.json                 |
| `families/` | one file for each                                                             |
| `fields.py` | the keys of config.json that several families share                           |
| `folder.py` | a folder's config and its weights, in slices                                  |
| `write.py`  | safetensors files written a tensor at a time                                  |

`megapar import` and `megapar export` are in `megapar/convert.py`.
"""
