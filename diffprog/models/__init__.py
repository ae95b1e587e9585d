"""Published networks, one paper a file, written in the layers of the library."""
