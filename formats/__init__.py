"""Every kind of file the program reads or writes, one module each, both ends."""
