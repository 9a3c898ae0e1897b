"""Images, sounds and texts in shards: found (`files`), decoded (`decode`), read once in the launcher (`read`), and
their index, by which every rank reads what it needs (`index`)."""
