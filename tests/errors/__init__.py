"""Every error message of the library, each beside a call that is answered with it."""
