"""Plans from headers, and the work itself in bounded memory."""
