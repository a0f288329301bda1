"""Work items cut from headers, done in bounded memory by workers, written whole or not at all."""
