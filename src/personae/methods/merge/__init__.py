"""Static methods, one file each: task vectors to one merged task vector."""
