"""Tables of what methods score and store."""
