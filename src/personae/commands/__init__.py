"""What the command line and the library do: each with its plan from headers alone."""
